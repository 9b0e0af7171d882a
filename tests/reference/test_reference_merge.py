"""Splits that a group of its own merges: the bits of those that every reader merges, and the truth."""

from __future__ import annotations

import pytest
import torch
from tiny_specs import child, exact_error, executor_of, forced, planned, tokens

TOLERANCE = 2e-4


def spec(merge: str):
    return child("qwen3", schedule=[{"set": {"attend": {"kv_splits": 7, "kv_merge": merge}}}])


@pytest.mark.parametrize("tp", [1, 2])
def test_who_merges_changes_no_bit(tp):
    """Six of seven splits see something in the end; a prompt in chunks of 16 and tokens one by one."""
    ids, found = tokens(330), []
    for merge in ("fused", "apart"):
        made = planned(spec(merge), target="h100", context=512, tp=tp)
        assert any(g.task == "attention_merge" for g in made.steps["decode"].templates[1].groups) == (merge == "apart")
        found.append(forced(executor_of(spec(merge), made), ids, 310))
    assert torch.isfinite(found[0]).all()
    assert torch.equal(*found)


def test_against_the_truth():
    made = planned(spec("apart"), target="h100", context=512)
    assert exact_error(spec("apart"), made, count=330, prompt=310) < TOLERANCE
