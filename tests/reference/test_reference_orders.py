"""Any order of tasks that waits and queues allow gives the same bits; what nobody wrote is NaN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_specs import WIDE, child, executor_of, forced, planned, spec_of, step_input, tokens

from mpk_spec.planner.targets import TARGETS
from mpk_spec.reference.evaluate import UndeclaredAccess


@pytest.fixture(autouse=True)
def a_small_gpu(monkeypatch):
    """Fewer tasks than an H100 would get, and several of each group on one SM."""
    monkeypatch.setitem(TARGETS, "h100", replace(TARGETS["h100"], num_sms=11))


def everything(rule: dict) -> list:
    return [{"set": {"*": rule}}]


CASES = {
    "qwen3": (spec_of("qwen3"), {}),
    "qwen3-tp4": (spec_of("qwen3"), {"tp": 4}),
    "gemma3-tp2": (spec_of("gemma3"), {"tp": 2}),
    "moe": (spec_of("qwen3_moe"), {}),
    "moe-tp2": (spec_of("qwen3_moe"), {"tp": 2}),
    "biases": (spec_of("qwen2_5"), {"tp": 2}),
    "kv-splits": (child("qwen3", schedule=[{"set": {"attend": {"kv_splits": 3}}}]), {"tp": 2}),
    "kv-merge": (child("qwen3", schedule=[{"set": {"attend": {"kv_splits": 3, "kv_merge": "apart"}}}]), {"tp": 2}),
    "split-k": (
        child("qwen3", WIDE, schedule=[{"set": {"o_add": {"split_k": 2}, "down_add": {"split_k": 3}}}]),
        {"tp": 1},
    ),
    "dynamic": (child("llama3", schedule=everything({"launch": "dynamic"})), {"tp": 2}),
    "static-experts": (child("qwen3_moe", schedule=everything({"launch": "static"})), {}),
    "dynamic-experts": (child("qwen3_moe", schedule=everything({"launch": "dynamic"})), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_any_legal_order(case):
    """Prefill in two chunks, one of them short, then a decode step; positions in three blocks of the KV cache."""
    spec, request = CASES[case]
    made = planned(spec, target="h100", chunk=80, context=200, **request)
    ids = tokens(131)
    straight, shuffled = executor_of(spec, made), executor_of(spec, made)
    want = forced(straight, ids, 130)
    assert torch.isfinite(want).all()
    assert torch.equal(forced(shuffled, ids, 130, shuffle=7), want)
    for one, other in zip(straight.ranks, shuffled.ranks, strict=True):
        for state in made.states:
            for part in ("keys", "values"):
                a, b = (getattr(r.caches[state], part) for r in (one, other))
                assert torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))
        assert torch.equal(one.buffers["next_ids"], other.buffers["next_ids"])
        assert torch.equal(one.buffers["next_ids"], straight.ranks[0].buffers["next_ids"])


def test_orders_differ():
    """A shuffle that ran tasks in program order would prove nothing."""
    spec = spec_of("llama3")
    executor = executor_of(spec, target="h100", context=64)
    seen: list[list] = [[], []]
    rank = executor.ranks[0]
    write = rank.write
    for seed, order in enumerate(seen):
        rank.write = lambda span, value, order=order: (order.append((span.tensor, span.lo)), write(span, value))
        executor.run("decode", step_input([5], 0, True), shuffle=seed)
    assert seen[0] != seen[1] and sorted(seen[0]) == sorted(seen[1])


def damaged(made, group: str, change):
    """The plan with all tasks of a group changed."""
    step = made.steps["decode"]
    templates = tuple(
        replace(
            t,
            groups=tuple(replace(g, tasks=tuple(map(change, g.tasks))) if g.name == group else g for g in t.groups),
        )
        for t in step.templates
    )
    return replace(made, steps={**made.steps, "decode": replace(step, templates=templates)})


def test_a_read_that_is_not_declared():
    spec = spec_of("qwen3")
    made = planned(spec, target="h100", context=64)
    bad = damaged(made, "gate_up", lambda t: replace(t, reads=tuple(s for s in t.reads if s.tensor != "attention.out")))
    executor = executor_of(spec, bad)
    with pytest.raises(UndeclaredAccess, match=r"gate_up\[\d+\] reads .*attention.out"):
        executor.run("decode", step_input([5], 0, True), shuffle=1)


def test_a_write_that_is_not_declared():
    spec = spec_of("qwen3")
    made = planned(spec, target="h100", context=64)
    narrow = damaged(made, "down_add", lambda t: replace(t, writes=tuple(replace(s, hi=s.hi - 1) for s in t.writes)))
    with pytest.raises(UndeclaredAccess, match=r"down_add\[\d+\] writes "):
        executor_of(spec, narrow).run("decode", step_input([5], 0, True), shuffle=1)


def test_a_missing_wait_is_seen():
    """Without its waits a task reads what is not there yet: NaN in the logits, or it deadlocks."""
    spec = spec_of("qwen3")
    made = damaged(planned(spec, target="h100", context=64), "gate_up", lambda t: replace(t, waits=()))
    executor = executor_of(spec, made)
    wrong = 0
    for seed in range(4):
        executor.run("decode", step_input([5], 0, True), shuffle=seed)
        wrong += bool(executor.value("logits").isnan().any())
    assert wrong
