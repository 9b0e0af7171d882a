"""Attention's splits merged by tasks of their own: token by token, in chunks of 16, and against Hugging Face."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu.models import PROBED, TIMEOUT_S, ids_of
from gpu.test_plan_on_gpu import LOG_ENTRIES, step_tokens

pytestmark = pytest.mark.gpu

# splits, context: fewer splits than blocks; so few that readers would merge them; more than one load of a thread
CASES = {"7 splits": (7, 512), "3 splits": (3, 256), "36 splits": (36, 2560)}


def opened(gpu: str, splits: int, context: int, merge: str = "apart", defines: tuple[str, ...] = ()):
    from mpk_spec.planner import plan
    from mpk_spec.runtime.cuda_backend import CudaBackend
    from mpk_spec.runtime.random_model import checkpoint_of_plan
    from mpk_spec.schema import load_spec
    from mpk_spec.schema.models import Rule

    spec = load_spec("qwen3")
    tiny = spec.sizes["tiny"]
    sizes = {"tiny": replace(tiny, config={**tiny.config, "max_position_embeddings": 4096})}
    rule = Rule.model_validate({"set": {"attend": {"kv_splits": splits, "kv_merge": merge}}})
    spec = replace(spec, sizes=sizes, schedule=[*spec.schedule, rule])
    made = plan(spec, size="tiny", target=gpu, context=context)
    assert any(g.task == "attention_merge" for g in made.steps["decode"].templates[1].groups) == (merge == "apart")
    checkpoint = checkpoint_of_plan(made, 0)
    backend = CudaBackend(made, checkpoint, defines=defines)
    backend.launcher.timeout_s = TIMEOUT_S
    return backend, checkpoint


@pytest.fixture(scope="module", params=CASES)
def merging(gpu, request):
    return opened(gpu, *CASES[request.param])


def test_token_by_token_has_the_bits_of_chunks(merging):
    """Positions of the last blocks alone, where every split is live, and of the first."""
    backend, _ = merging
    ids = ids_of(backend, backend.context - 5)
    last = min(200, len(ids))
    chunks, alone = (backend.logits(ids, last=last, alone=n) for n in (0, last))
    assert chunks.isfinite().all() and torch.equal(chunks, alone)
    first = ids[:150]
    assert torch.equal(backend.logits(first), backend.logits(first, alone=len(first)))


def test_an_answer_over_several_blocks_is_what_its_logits_say(merging):
    """One launch, in which split after split comes to life."""
    backend, _ = merging
    backend.reset()
    prompt = ids_of(backend, 50)
    made = list(backend.stream(prompt, max_new_tokens=200))
    assert made == backend.logits(prompt + made)[49:-1].argmax(-1).tolist()
    backend.reset()
    assert list(backend.stream(prompt, max_new_tokens=200)) == made


def test_it_is_near_the_truth(merging):
    from mpk_spec.testing.yardstick import Yardstick

    backend, checkpoint = merging
    length = backend.context - 8
    ids = [ids_of(backend, length + n)[n:] for n in range(max(1, 2048 // length))]
    verdict = Yardstick(checkpoint, ids).judge(backend)
    assert verdict.passed, verdict.rows


def test_up_to_four_splits_have_the_bits_of_a_merge_by_readers(gpu):
    found = []
    for merge in ("apart", "fused"):
        backend, _ = opened(gpu, 4, 256, merge)
        found.append(backend.logits(ids_of(backend, 250), alone=60))
        backend.close()
    assert torch.equal(*found)


def test_under_random_delays_it_keeps_its_bits_and_the_plan(gpu):
    from mpk_spec.runtime.cuda_probe import Probe
    from mpk_spec.testing.conform import conform

    backend, _ = opened(gpu, 7, 512, defines=PROBED)
    ids = ids_of(backend, 430)
    wanted = backend.logits(ids, last=60, alone=60)
    answer = list(backend.stream(ids[:20], max_new_tokens=5))
    backend.launcher.probe = watched = Probe(backend.emitted, backend.memory.arena.device, log_entries=LOG_ENTRIES)
    for seed in (1, 2):
        watched.delay_seed = seed
        assert torch.equal(backend.logits(ids, last=60, alone=60), wanted), seed
        watched.clear()
        backend.reset()
        first = backend.launcher.steps
        assert list(backend.stream(ids[:20], max_new_tokens=5)) == answer, seed
        assert conform(backend.emitted, watched.log(), first, step_tokens(backend, first)) == [], seed
    backend.close()
