"""The kernel does what the plan says, to the signal and to the bit, whatever delays its parts meet."""

from __future__ import annotations

import pytest
from gpu.models import check_lost_signal, ids_of

from mpk_spec.errors import UserError
from mpk_spec.runtime.cuda_probe import find_place
from mpk_spec.testing.conform import conform

pytestmark = pytest.mark.gpu

SEEDS = (0, 1, 2, 3)  # 0: no delays
LOG_ENTRIES = 8192


def step_tokens(backend, first: int) -> list[int]:
    """Of a prompt of 20 tokens, in chunks of 16, and what came after it."""
    return [16, 4] + [1] * (backend.launcher.steps - first - 2)


@pytest.mark.parametrize("size", ["tiny", "0.6b"])
def test_waits_and_signals_are_the_plans_under_any_delays(models, probe, size):
    plain = models.backend("qwen3", size)
    prompt = ids_of(plain, 20)
    expected = list(plain.stream(prompt, max_new_tokens=5))
    backend = models.backend("qwen3", size, probed=True)
    watched = probe(backend, log_entries=LOG_ENTRIES)
    for seed in SEEDS:
        watched.clear()
        watched.delay_seed = seed
        backend.reset()
        first = backend.launcher.steps
        assert list(backend.stream(prompt, max_new_tokens=5)) == expected, seed
        assert conform(backend.emitted, watched.log(), first, step_tokens(backend, first)) == [], seed


@pytest.mark.parametrize("size", ["tiny", "0.6b"])
def test_the_same_bits_again_with_delays_and_token_by_token(models, probe, size):
    import torch

    plain = models.backend("qwen3", size)
    ids = ids_of(plain, 40, salt=1)
    logits = plain.logits(ids)
    assert logits.isfinite().all()
    assert torch.equal(plain.logits(ids), logits)
    parts = []
    for position, token in enumerate(ids):
        plain.launcher.start([token], position, 0)
        plain.launcher.finish()
        parts.append(plain.value("logits", 1)[:, : plain.vocab_size].cpu())
    assert torch.equal(torch.cat(parts), logits)
    backend = models.backend("qwen3", size, probed=True)
    delayed = probe(backend)
    for seed in SEEDS[1:]:
        delayed.delay_seed = seed
        assert torch.equal(backend.logits(ids), logits), seed


def test_streamed_tokens_are_the_largest_logits(models):
    backend = models.backend("qwen3", "0.6b")
    prompt = ids_of(backend, 37)
    made = list(backend.stream(prompt, max_new_tokens=40))
    replay = backend.logits(prompt + made)
    assert replay[len(prompt) - 1 : -1].argmax(-1).tolist() == made


@pytest.mark.parametrize("size", ["tiny", "0.6b"])
def test_a_lost_signal_is_reported_and_the_engine_goes_on(models, probe, size):
    backend = models.backend("qwen3", size, probed=True)
    prompt = ids_of(backend, 20)
    expected = list(backend.stream(prompt, max_new_tokens=5))
    broken = probe(backend)
    broken.defect, broken.at = "dropped-signal", find_place(backend.emitted, "gate_up", stage=1, task=3)
    check_lost_signal(backend, prompt)
    broken.defect = None
    assert list(backend.stream(prompt, max_new_tokens=5)) == expected


def test_a_wait_with_too_low_a_threshold_does_not_conform(models, probe):
    backend = models.backend("qwen3", "tiny", probed=True)
    early = probe(backend, log_entries=LOG_ENTRIES)
    early.defect, early.at = "early-event", find_place(backend.emitted, "down_add")
    first = backend.launcher.steps
    with pytest.raises(UserError, match=r"NaN|aborted"):  # what it read too early was poisoned, or what others wait for
        list(backend.stream(ids_of(backend, 20), max_new_tokens=2))
    problems = conform(backend.emitted, early.log(), first, [16, 4])
    assert any("waits until gate_up.done" in problem for problem in problems)
