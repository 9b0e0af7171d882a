"""The yardstick of several ranks' numbers, on the CPU: it lets the order of sums pass, and no defect."""

from __future__ import annotations

import pytest
import torch
from nearness import IDS, SAME_BUT_SUMS_OVER_RANKS, SAME_ROUNDING, apart, reference_logits, true_logits, verdict
from tiny_ranks import CONTEXT, SIZE, SPEC

from mpk_spec.ops.reduce import AllReduce
from mpk_spec.planner import plan
from mpk_spec.reference import evaluate
from mpk_spec.schema import load_spec
from mpk_spec.testing.defects import find_defect
from mpk_spec.testing.ours import open_ours


def on_cpu(checkpoint, tp: int) -> torch.Tensor:
    return reference_logits(plan(load_spec(SPEC), size=SIZE, target="h100", tp=tp, context=CONTEXT), checkpoint)


@pytest.fixture(scope="module")
def truth(checkpoint):
    return true_logits(checkpoint)


@pytest.fixture(scope="module")
def reference(checkpoint):
    return on_cpu(checkpoint, 1)


def test_sums_over_ranks(checkpoint, reference, truth):
    ours = on_cpu(checkpoint, 4)
    assert verdict(ours, reference, truth).passed
    assert 0 < apart(ours, reference, truth) < SAME_BUT_SUMS_OVER_RANKS


def test_noise_in_the_last_bits(checkpoint, reference, truth, monkeypatch):
    exact, generator = evaluate._multiply, torch.Generator().manual_seed(0)

    def noisy(x, parts):
        y, size = exact(x, parts), exact(x.abs(), parts.abs())
        return y + 3e-7 * size * torch.randn(y.shape, generator=generator)

    monkeypatch.setattr(evaluate, "_multiply", noisy)
    ours = on_cpu(checkpoint, 1)
    assert verdict(ours, reference, truth).passed
    assert apart(ours, reference, truth) < SAME_ROUNDING


@pytest.mark.parametrize("defect", ["wrong-eps", "swapped-heads"])
def test_defects_do_not_pass(defect, checkpoint, reference, truth):
    ours = open_ours(load_spec(SPEC), SIZE, checkpoint, context=CONTEXT, defect=find_defect(defect)).logits(IDS)
    assert not verdict(ours, reference, truth).passed
    assert apart(ours, reference, truth) > 2


def test_a_rank_is_left_out_of_the_sums(checkpoint, reference, truth, monkeypatch):
    monkeypatch.setattr(AllReduce, "compute", lambda self, inputs, *_: inputs[0][0])
    ours = on_cpu(checkpoint, 2)
    assert not verdict(ours, reference, truth).passed
    assert apart(ours, reference, truth) > 2
