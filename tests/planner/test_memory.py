"""Buffers share bytes where their lives allow it, and only there."""

from __future__ import annotations

from itertools import combinations

import pytest
from tiny_specs import child, planned, spec_of

from mpk_spec.planner import plan
from mpk_spec.planner.plan import Plan, Tensor


def overlap(a: Tensor, b: Tensor) -> bool:
    apart = a.offset + a.bytes <= b.offset or b.offset + b.bytes <= a.offset
    return a.placement == b.placement and not apart


def sharing(made: Plan) -> list[tuple[str, str]]:
    return [(a.name, b.name) for a, b in combinations(made.tensors.values(), 2) if overlap(a, b)]


def test_buffers_are_reused():
    made = plan(spec_of("qwen3"), size="8b", target="cpu", verified=False)
    assert sharing(made)
    assert made.arena_bytes["cuda"] < sum(t.bytes for t in made.tensors.values())


def test_what_crosses_as_data_lies_twice_and_alone():
    """Whoever writes one copy clears the other, while the first is being read."""
    crossing, by_event = (
        plan(spec_of("qwen3"), size="8b", target=t, chunk=16, verified=False) for t in ("h100", "cpu")
    )
    twice = {name for name, t in crossing.tensors.items() if t.turns == 2}
    assert {"y", "attention.q", "mlp.act"} <= twice and not twice & {"logits", "next_ids"}
    assert not [pair for pair in sharing(crossing) if twice & set(pair)]
    for name in twice & by_event.tensors.keys() - {"next_ids.partial"}:  # as many pairs as the head has tasks
        assert crossing.tensors[name].bytes == 2 * by_event.tensors[name].bytes
    assert {t.turns for t in by_event.tensors.values()} == {1}


@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "gemma3"])
def test_what_outlives_a_stage_is_alone(name, tp):
    """The residual, the logits, the sampled token, and inboxes that peers write into."""
    made = planned(spec_of(name), tp=tp, target="h100")
    kept = {"y", "logits", "next_ids"} | {n for n, t in made.tensors.items() if t.inbox}
    assert not [pair for pair in sharing(made) if kept & set(pair)]
    assert len(kept) == (3 if tp == 1 else 6)


def test_sizes():
    """Of the widest step; an inbox has a slot for each rank, and what crosses as data lies twice."""
    made = planned(spec_of("qwen3"), tp=2, target="h100", batch=3, chunk=16)
    assert made.tensors["y"].bytes == 2 * 16 * 96 * 4
    assert made.tensors["attention.q"].bytes == 2 * 16 * 128 * 2
    assert made.tensors["attention.o"].bytes == 2 * 2 * 16 * 96 * 4
    assert made.tensors["logits"].bytes == 16 * 258 * 4
    for tensor in made.tensors.values():
        assert tensor.offset % 256 == 0 and tensor.offset + tensor.bytes <= made.arena_bytes[tensor.placement]


def test_arenas_by_placement():
    made = planned(child("qwen3", tensors={"attention.q": {"placement": "host"}}), tp=2, target="h100")
    assert set(made.arena_bytes) == {"cuda", "nvshmem", "host"}
    assert made.arena_bytes["host"] == made.tensors["attention.q"].bytes
