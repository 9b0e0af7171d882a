"""What `auto` chooses on the GPUs of the table, for models of published size."""

from __future__ import annotations

import pytest
from tiny_specs import child, planned, spec_of

from mpk_spec.planner import plan
from mpk_spec.planner.plan import Group


def groups(spec, size: str, kind: str = "decode", **request) -> dict[str, Group]:
    made = plan(spec, size=size, verified=False, **request)
    return {g.name: g for t in made.steps[kind].templates for g in t.groups}


def test_products_use_every_sm():
    found = groups(spec_of("qwen3"), "8b")
    for name in ("qkv", "gate_up", "down_add", "head"):
        tasks = len(found[name].tasks) * 1.0
        assert 0.95 <= tasks / 132 <= 1 or found[name].grid[0] == 132 or found[name].split_k > 1
    assert sum(t.load_bytes for t in found["gate_up"].tasks) == 2 * 12288 * 4096 * 2
    busiest = max(t.load_bytes for t in found["gate_up"].tasks)
    assert busiest * 132 <= 1.1 * sum(t.load_bytes for t in found["gate_up"].tasks)


def test_more_context_more_splits():
    splits = [groups(spec_of("qwen3"), "8b", context=c)["attend"].kv_splits for c in (64, 4096, 32768)]
    assert splits[0] == 1 and splits == sorted(splits) and splits[-1] > splits[0]


def test_the_cpu_is_not_split():
    found = groups(spec_of("qwen3"), "8b", target="cpu")
    assert {g.split_k for g in found.values()} == {1} and found["attend"].kv_splits == 1
    assert max(len(g.tasks) for name, g in found.items() if name != "attend") <= 4


def test_experts_are_claimed_by_choice():
    """As many slots as tokens can choose, at most all experts; one task does all where they are combined."""
    spec = spec_of("qwen3_moe")
    slots = {b: groups(spec, "30b-a3b", batch=b)["gate_up"].grid[1] for b in (1, 2, 16)}
    assert slots == {1: 8, 2: 16, 16: 128}
    assert groups(spec, "30b-a3b", kind="prefill")["gate_up"].grid[1] == 128
    assert groups(spec, "30b-a3b")["down_add"].grid[1] == 1


def test_ring_and_activations_fill_shared_memory():
    for target, smem in (("h100", 227 * 1024), ("a100", 163 * 1024), ("rtx4090", 99 * 1024)):
        made = plan(spec_of("qwen3"), size="8b", target=target, verified=False)
        widest = max(g.smem_bytes for s in made.steps.values() for t in s.templates for g in t.groups)
        assert widest + made.ring_bytes <= smem < widest + made.ring_bytes + made.chunk_bytes


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_a_rule_for_one_step(kind):
    rules = [{"when": {"step": kind}, "set": {"qkv": {"grid": [6, 1, 1]}}}]
    made = planned(child("qwen3", schedule=rules), target="h100")
    other = "prefill" if kind == "decode" else "decode"
    found = {k: {g.name: g for t in s.templates for g in t.groups}["qkv"].grid[0] for k, s in made.steps.items()}
    assert found == {kind: 6, other: 48}
