"""Plans that the planner makes are proved, and spoilt ones refused."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cache

import pytest
from plans import edit_tasks, edit_template

from mpk_spec.planner import plan
from mpk_spec.planner.verify import PlanError, verify
from mpk_spec.schema import load_spec

SPECS = ("qwen3", "smollm2", "llama3", "qwen2_5", "qwen3_moe", "gemma3")


@cache
def made(name: str, size: str | None, **request):
    return plan(load_spec(name), size=size, verified=False, **request)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("target", "tp", "batch"), [("cpu", 1, 1), ("cpu", 2, 3), ("rtx4090", 1, 16)])
def test_tiny_sizes(name, target, tp, batch):
    spec = load_spec(name)
    heads = spec.sizes["tiny"].config["num_attention_heads"]
    if heads % tp:
        pytest.skip(f"{heads} heads do not divide over {tp} ranks")
    first = plan(spec, size="tiny", target=target, tp=tp, batch=batch, verified=False)
    proof = verify(first)
    assert proof.transitions == (
        ("decode", "decode"),
        ("decode", "prefill"),
        ("prefill", "decode"),
        ("prefill", "prefill"),
    )
    assert verify(first, full=True).examined == proof.stages


@pytest.mark.parametrize("steps", [("decode",), ("decode", "prefill", "mixed", "verify")])
def test_all_kinds_of_steps(steps):
    proof = verify(made("qwen3", "0.6b", steps=steps))
    assert len(proof.transitions) == len(steps) ** 2


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("tp", (1, 2, 4, 7, 8))
@pytest.mark.parametrize("batch", (1, 16))
@pytest.mark.parametrize("target", ("h100", "rtx4090"))
def test_all_sizes(name, tp, batch, target):
    from mpk_spec.errors import SpecError

    spec = load_spec(name)
    for size in spec.sizes:
        try:
            first = plan(spec, size=size, target=target, tp=tp, batch=batch, verified=False)
        except SpecError as error:
            assert "do not divide" in str(error)
            continue
        verify(first)


def test_qwen3_32b_at_degree_8_in_under_three_seconds():
    start = time.process_time()
    proof = verify(plan(load_spec("qwen3"), size="32b", target="h100", tp=8, verified=False))
    assert time.process_time() - start < 3
    assert proof.induced > proof.examined


def test_induction_and_a_full_walk_agree():
    first = made("qwen3", "0.6b", tp=2)
    assert verify(first, full=True).examined == verify(first).stages


@pytest.mark.parametrize("tp", (1, 8))
def test_each_wait_of_a_layer_is_needed(tp):
    """Without the waits of any one group (all its tasks, in one layer) the plan is refused."""
    first = made("qwen3", "0.6b", tp=tp, steps=("decode",))
    step = first.steps["decode"]
    for stage in (1, len(step.stages) // 2, len(step.stages) - 1):
        for group in step.templates[step.stages[stage].template].groups:
            if not any(t.waits for t in group.tasks):
                continue
            spoiled = edit_template(
                first,
                "decode",
                stage,
                lambda t, name=group.name: edit_tasks(t, name, lambda x: replace(x, waits=())),
            )
            with pytest.raises(PlanError, match="nothing makes it wait for"):
                verify(spoiled)


@pytest.mark.parametrize("stage", (0, 14, 27))
def test_a_shifted_buffer_is_refused(stage):
    """Everything on the bytes of the residual."""
    first = made("qwen3", "0.6b", steps=("decode",))
    step = first.steps["decode"]
    template = step.templates[step.stages[stage].template]
    carried = {s.tensor for g in template.groups for t in g.tasks for s in t.writes} & first.tensors.keys()
    read = {s.tensor for g in template.groups for t in g.tasks for s in t.reads} & carried
    pairs = [(a, b) for a in sorted(read) for b in sorted(read) if a < b and _alive_together(template, a, b)]
    assert pairs
    for a, b in pairs:
        moved = replace(first.tensors[a], placement=first.tensors[b].placement, offset=first.tensors[b].offset)
        arenas = {**first.arena_bytes}
        arenas[moved.placement] = max(arenas[moved.placement], moved.offset + moved.bytes)
        with pytest.raises(PlanError):
            verify(replace(first, tensors={**first.tensors, a: moved}, arena_bytes=arenas))


def _alive_together(template, a: str, b: str) -> bool:
    """Whether `b` is written between the write and a read of `a`, or the other way round."""
    order = [
        ({s.tensor for t in g.tasks for s in t.reads}, {s.tensor for t in g.tasks for s in t.writes})
        for g in template.groups
    ]

    def inside(x, y):
        wrote = next(i for i, (_, w) in enumerate(order) if x in w)
        last = max(i for i, (r, _) in enumerate(order) if x in r)
        return any(wrote < i < last and y in w for i, (_, w) in enumerate(order))

    return inside(a, b) or inside(b, a)
