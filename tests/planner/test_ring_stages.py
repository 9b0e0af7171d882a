"""`stages`: how many chunks of weights an SM's ring holds."""

from __future__ import annotations

import re

import pytest

from mpk_spec.emit.source import emit
from mpk_spec.errors import SpecError
from mpk_spec.planner import plan
from mpk_spec.schema import load_spec
from mpk_spec.tuner.space import with_rules

CHUNK = 16384


def made(rules=None):
    return plan(with_rules(load_spec("qwen3"), rules or {}), size="0.6b", target="h100")


def constant(plan, name: str) -> int:
    return int(re.search(rf"{name} = (\d+);", emit(plan).source)[1])


def test_fewer_stages_for_all_make_a_smaller_ring_in_the_kernel():
    small, usual = made({"*": {"stages": 4}}), made()
    assert small.chunk_bytes == usual.chunk_bytes == CHUNK
    assert small.ring_bytes == 4 * CHUNK < usual.ring_bytes
    assert constant(small, "ring_slots") == 4 < constant(usual, "ring_slots")
    assert small.in_flight_bytes == usual.in_flight_bytes == 4 * CHUNK


def test_copies_in_flight_fit_the_ring():
    assert made({"*": {"stages": 2}}).in_flight_bytes == 2 * CHUNK
    with pytest.raises(
        SpecError, match="'in_flight' is at least one chunk of 16384 bytes and at most the ring's 32768"
    ):
        made({"*": {"stages": 2, "in_flight": 3 * CHUNK}})


def test_the_group_that_asks_for_most_decides():
    assert made({"gate_up": {"stages": 2}}).ring_bytes == made().ring_bytes
    assert made({"*": {"stages": 2}, "gate_up": {"stages": 5}}).ring_bytes == 5 * CHUNK
