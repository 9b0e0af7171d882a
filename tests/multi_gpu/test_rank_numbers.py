"""Several ranks compute what one does, what the reference does, and always the same."""

from __future__ import annotations

import pytest
import torch
from nearness import IDS, SAME_BUT_SUMS_OVER_RANKS, SAME_ROUNDING, apart, reference_logits, true_logits, verdict
from one_gpu import open_here
from tiny_ranks import open_tiny, same_bits_with_delays, skip_without_gpu

from mpk_spec.runtime.transport import DEFINES


@pytest.fixture(scope="module")
def truth(checkpoint):
    return true_logits(checkpoint)


def test_logits_are_those_of_the_reference(ranks, checkpoint, truth):
    ours, reference = ranks.logits(IDS), reference_logits(ranks.plan, checkpoint)
    assert ours.isfinite().all()
    found = verdict(ours, reference, truth)
    assert found.passed, found.rows
    assert apart(ours, reference, truth) < SAME_ROUNDING


def test_logits_are_close_to_those_of_one_gpu(ranks, truth):
    one = open_tiny(1)
    alone = one.logits(IDS)
    one.close()
    assert apart(ranks.logits(IDS), alone, truth) < SAME_BUT_SUMS_OVER_RANKS


def test_the_same_bits_twice_and_token_by_token(ranks):
    first = ranks.logits(IDS)
    assert torch.equal(first, ranks.logits(IDS))
    ranks.reset()
    for n, token in enumerate(IDS[:20]):
        ranks.launcher.start([token], n, 0)
        ranks.launcher.finish()
        assert torch.equal(ranks.value("logits", 1)[:, :515], first[n : n + 1])


def test_the_ranks_hold_the_same_bits(ranks):
    for new in (0, 9):
        ranks.launcher.start(IDS[:16], 0, new)
        ranks.launcher.finish()
        residual = "y.sum" if "y.sum" in ranks.plan.tensors else "y"
        for name in (residual, "next_ids"):
            here, *others = ranks.ranks.call("value", name, 1)
            assert all(torch.equal(here, there) for there in others), name


def test_an_answer_is_what_its_logits_say(ranks):
    made = list(ranks.stream(IDS[:37], max_new_tokens=60))
    again = list(ranks.stream(IDS[:37], max_new_tokens=60))
    assert made == again
    assert made == ranks.logits(IDS[:37] + made)[36:-1].argmax(-1).tolist()


def test_answers_start_and_stop_many_times(ranks):
    whole = list(ranks.stream(IDS[:20], max_new_tokens=30))
    for n in range(1, 25):
        tokens = ranks.stream(IDS[:20], max_new_tokens=30)
        assert [next(tokens) for _ in range(n)] == whole[:n]
        tokens.close()
    stop = whole[5]
    assert list(ranks.stream(IDS[:20], max_new_tokens=30, stop=frozenset({stop}))) == whole[: whole.index(stop) + 1]


def test_counters_that_wrap_around(ranks):
    whole = list(ranks.stream(IDS[:20], max_new_tokens=30))
    ranks.ranks.call("reset_events", 2**32 - 10)
    ranks.reset()
    assert list(ranks.stream(IDS[:20], max_new_tokens=30)) == whole
    ranks.ranks.call("reset_events", 0)


@pytest.mark.gpu
@pytest.mark.parametrize(("transport", "two_shots"), [*((t, False) for t in DEFINES), ("peer", True)])
def test_random_delays_change_no_bit(monkeypatch, transport, two_shots):
    skip_without_gpu(transport)
    slow = open_here(2, monkeypatch, ("MPK_DELAYS",), transport, two_shots)
    same_bits_with_delays(slow)
    slow.close()


@pytest.mark.gpu
@pytest.mark.parametrize("count", [2, 4])
def test_two_shots_give_the_bits_of_one(count, monkeypatch):
    skip_without_gpu("peer")
    found = []
    for two_shots in (False, True):
        backend = open_here(count, monkeypatch, two_shots=two_shots)
        assert any(t.shares == "gathered" for t in backend.plan.tensors.values()) == two_shots
        found.append((backend.logits(IDS), list(backend.stream(IDS[:20], max_new_tokens=30))))
        backend.close()
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
