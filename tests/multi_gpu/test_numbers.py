"""Two ranks compute what one does, what the reference does, and always the same."""

from __future__ import annotations

import pytest
import torch
from tiny_ranks import open_on

pytestmark = [pytest.mark.multi_gpu, pytest.mark.timeout(120)]

IDS = [(7 + 29 * n + 5 * n * n) % 515 for n in range(75)]


def test_logits_are_those_of_the_reference_with_two_ranks(backend, checkpoint):
    from mpk_spec.reference.backend import ReferenceBackend

    ours, reference = backend.logits(IDS), ReferenceBackend(backend.plan, checkpoint).logits(IDS)
    assert ours.isfinite().all()
    error = (ours - reference).abs().max().item()
    assert error < 0.02 * reference.std().item(), f"{error:.4f} of {reference.std():.4f}"
    best = reference.topk(2).values
    clear = best[:, 0] - best[:, 1] > 2 * error
    assert clear.float().mean() > 0.8
    assert torch.equal(ours.argmax(-1)[clear], reference.argmax(-1)[clear])


def test_logits_are_close_to_those_of_one_gpu(backend, checkpoint):
    one = open_on(1, checkpoint)
    alone = one.logits(IDS)
    one.close()
    assert (backend.logits(IDS) - alone).abs().max() < 0.02 * alone.std()


def test_the_same_bits_twice_and_token_by_token(backend):
    first = backend.logits(IDS)
    assert torch.equal(first, backend.logits(IDS))
    backend.reset()
    for n, token in enumerate(IDS[:20]):
        backend.launcher.start([token], n, 0)
        backend.launcher.finish()
        assert torch.equal(backend.value("logits", 1)[:, :515], first[n : n + 1])


def test_the_ranks_hold_the_same_bits(backend):
    for new in (0, 9):
        backend.launcher.start(IDS[:16], 0, new)
        backend.launcher.finish()
        for name in ("y", "next_ids"):
            here, there = backend.ranks.call("value", name, 1)
            assert torch.equal(here, there), name


def test_an_answer_is_what_its_logits_say(backend):
    made = list(backend.stream(IDS[:37], max_new_tokens=60))
    again = list(backend.stream(IDS[:37], max_new_tokens=60))
    assert made == again
    assert made == backend.logits(IDS[:37] + made)[36:-1].argmax(-1).tolist()


def test_answers_start_and_stop_many_times(backend):
    whole = list(backend.stream(IDS[:20], max_new_tokens=30))
    for n in range(1, 25):
        tokens = backend.stream(IDS[:20], max_new_tokens=30)
        assert [next(tokens) for _ in range(n)] == whole[:n]
        tokens.close()
    stop = whole[5]
    assert list(backend.stream(IDS[:20], max_new_tokens=30, stop=frozenset({stop}))) == whole[: whole.index(stop) + 1]


def test_counters_that_wrap_around(backend):
    whole = list(backend.stream(IDS[:20], max_new_tokens=30))
    backend.ranks.call("reset_events", 2**32 - 10)
    backend.reset()
    assert list(backend.stream(IDS[:20], max_new_tokens=30)) == whole
    backend.ranks.call("reset_events", 0)


def test_no_further_from_float32_than_hugging_face_in_bf16(two_gpus):
    from mpk_spec.cli.main import main

    options = ["--weights", "random:0", "--backend", "cuda", "--tp", "2", "--positions", "1000"]
    assert main(["compare", "qwen3", "--size", "tiny", *options]) == 0
