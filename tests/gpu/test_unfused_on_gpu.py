"""The kernel where a fusion is left out: near the truth, and with the same bits however its tokens come."""

from __future__ import annotations

import pytest
import torch
from gpu.models import PROBED, TIMEOUT_S, ids_of
from gpu.test_plan_on_gpu import LOG_ENTRIES, step_tokens
from unfused import WITHOUT, spec_without

pytestmark = pytest.mark.gpu

SAME_BITS = {"embed", "qkv", "head"}  # what is stored in between is what the fused tasks make of it, not rounded again


def opened(models, case: str, defines: tuple[str, ...] = ()):
    from mpk_spec.planner import plan
    from mpk_spec.runtime.cuda_backend import CudaBackend

    made = plan(spec_without(case), size="tiny", target=models.target, context=256)
    backend = CudaBackend(made, models.checkpoint("qwen3", "tiny"), defines=defines)
    backend.launcher.timeout_s = TIMEOUT_S
    return backend


@pytest.fixture(scope="module", params=WITHOUT)
def unfused(models, request):
    backend = opened(models, request.param)
    yield request.param, backend
    backend.close()


def test_token_by_token_has_the_bits_of_chunks(unfused):
    """Steps of one token look at values, of which two copies take turns; those of 16, and of 13, wait for events."""
    _, backend = unfused
    ids = ids_of(backend, 109)
    chunks = backend.logits(ids)
    assert chunks.isfinite().all()
    assert torch.equal(backend.logits(ids, alone=len(ids)), chunks)
    assert torch.equal(backend.logits(ids, alone=31), chunks)  # the first one's turn comes after that of chunks
    assert torch.equal(backend.logits(ids), chunks)


def test_an_answer_is_what_its_logits_say(unfused):
    _, backend = unfused
    backend.reset()
    prompt = ids_of(backend, 21)
    made = list(backend.stream(prompt, max_new_tokens=60))
    assert made == backend.logits(prompt + made)[20:-1].argmax(-1).tolist()


def test_it_is_near_the_truth(unfused, models):
    case, backend = unfused
    ids = ids_of(backend, 200)
    if case in SAME_BITS:
        assert torch.equal(backend.logits(ids), models.backend("qwen3", "tiny").logits(ids))
    verdict = models.yardstick("qwen3", "tiny").judge(backend)
    assert verdict.passed, verdict.rows


@pytest.mark.parametrize("case", ["layers and head", "all"])  # values as data, and by event
def test_under_random_delays_it_keeps_its_bits_and_the_plan(models, case):
    from mpk_spec.runtime.cuda_probe import Probe
    from mpk_spec.testing.conform import conform

    backend = opened(models, case, PROBED)
    ids = ids_of(backend, 70)
    wanted = backend.logits(ids, alone=40)
    prompt, answer = ids[:20], []
    backend.launcher.probe = watched = Probe(backend.emitted, backend.memory.arena.device, log_entries=LOG_ENTRIES)
    for seed in (0, 1, 2):  # 0: no delays
        watched.delay_seed = seed
        assert torch.equal(backend.logits(ids, alone=40), wanted), seed
        watched.clear()
        backend.reset()
        first = backend.launcher.steps
        answer.append(list(backend.stream(prompt, max_new_tokens=5)))
        assert conform(backend.emitted, watched.log(), first, step_tokens(backend, first)) == [], seed
    assert answer[0] == answer[1] == answer[2]
    backend.close()
