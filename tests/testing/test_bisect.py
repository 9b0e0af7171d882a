"""Bisecting names the operator that goes wrong, and nothing where all is right."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import checkpoint_of, spec_of

from mpk_spec.errors import UserError
from mpk_spec.testing.bisect import Entry, bisect, relative_error
from mpk_spec.testing.defects import find_defect


def run(name="qwen3", stop_after="all", defect=None, tp=1):
    planted = find_defect(defect) if defect else None
    return bisect(spec_of(name), "tiny", checkpoint_of(name), stop_after, tp, 48, planted)


@pytest.mark.parametrize(("name", "tp"), [("qwen3", 1), ("qwen3", 2), ("gemma3", 1), ("qwen3_moe", 1)])
def test_a_true_model_has_no_jump(name, tp):
    found = run(name, tp=tp)
    assert found.passed, found.reason
    assert {e.layer for e in found.entries} >= {None, 0, 1, 2}
    assert all(e.error < 0.3 for e in found.entries)
    assert max(e.error for e in found.entries) > 1e-3  # roundings were compared with none


@pytest.mark.parametrize(
    ("defect", "place"),
    [
        ("swapped-heads", "attention.q@0"),
        ("late-position", "attention.qr@0"),
        ("missing-gain", "mlp.h@0"),
        ("wrong-eps", "attention.h@0"),
        ("lost-residual", "attention.out@0"),
        ("no-rope", "attention.a@0"),
        ("no-qk-norm", "attention.qr@0"),
    ],
)
def test_a_defect_is_named(defect, place):
    found = run(defect=defect, stop_after="mlp.out")
    assert not found.passed
    assert found.first.place == place
    assert found.reason.startswith(f"'{place}' (")


def test_it_stops_where_it_is_told():
    assert run(stop_after="attention.qr").entries[-1].place == "attention.qr@0"
    assert run(stop_after="mlp.gate@1").entries[-1].place == "mlp.gate@1"
    assert run(stop_after="h").entries[-1].place == "h"


@pytest.mark.parametrize(
    ("stop_after", "message"),
    [
        ("mlp.gat", "there is no operator 'mlp.gat'\n  hint: did you mean 'mlp.gate'?"),
        ("mlp.gate@7", "operator 'mlp.gate' has no layer 7"),
        ("mlp.gate@x", "'x' in 'mlp.gate@x' is no layer\n  hint: write it as in attention.qr@5"),
    ],
)
def test_an_operator_that_is_not_there(stop_after, message):
    with pytest.raises(UserError) as caught:
        run(stop_after=stop_after)
    assert str(caught.value) == message


def test_the_page_marks_the_jump():
    found = run(stop_after="attention.qr", defect="late-position")
    marked = [line for line in found.page() if line.endswith("jumps")]
    assert len(marked) == 1 and marked[0].startswith("attention.qr@0")
    assert found.data()["first"] == "attention.qr@0"


def test_what_is_no_number_jumps():
    assert relative_error(torch.ones(3), torch.tensor([1.0, math.nan, 1.0])) == math.inf
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == pytest.approx(0.1)
    assert Entry("a", 0, "linear", math.inf, 0.5).jumps
    assert not Entry("a", 0, "linear", 0.5, 0.4).jumps
