"""The verifier against executions: what it accepts never goes wrong, what it refuses for its order does."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from defects import ORDER, Unfit
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import execute, unordered, wrong_in_order
from plans import Shape, edit_group, edit_template, make_plan

from mpk_spec.planner.plan import Plan, Template
from mpk_spec.planner.verify import PlanError, verify

TINY = (
    Shape(layers=1, sms=2, tiles=2),
    Shape(layers=2, sms=3, splits=2),
    Shape(layers=1, sms=2, tp=2, tiles=2),
    Shape(layers=2, sms=2, tp=2, pool=True, fine=False),
    Shape(layers=1, sms=3, heads=3, pool=True, kinds=("decode", "prefill")),
    Shape(layers=1, sms=1),
)


def steps_of(shape: Shape) -> tuple[str, ...]:
    return (shape.kinds[0], shape.kinds[-1], shape.kinds[0])


def accepted(plan: Plan, full: bool = False) -> bool:
    try:
        verify(plan, full)
    except PlanError:
        return False
    return True


@pytest.mark.parametrize("shape", TINY, ids=str)
def test_no_execution_of_a_valid_plan_goes_wrong(shape):
    plan = make_plan(shape)
    verify(plan)
    assert unordered(plan, steps_of(shape)) == []
    assert [execute(plan, steps_of(shape), seed) for seed in range(15)] == [None] * 15


@pytest.mark.parametrize("defect", ORDER, ids=lambda d: d.__name__)
def test_some_execution_of_a_defect_goes_wrong(defect):
    seen = 0
    for shape in TINY:
        plan = make_plan(shape)
        for stage in range(len(plan.steps["decode"].stages)):
            try:
                spoiled = defect(plan, "decode", stage)
            except Unfit:
                continue
            assert not accepted(spoiled)
            assert any(execute(spoiled, steps_of(shape), seed) for seed in range(150)), (shape, stage)
            seen += 1
    assert seen


def drop_wait(template: Template, random: Random) -> Template:
    """A random task no longer waits for one of its events."""
    waiting = [g for g in template.groups if any(t.waits for t in g.tasks)]
    if not waiting:
        return template
    group = random.choice(waiting)
    task = random.choice([t for t in group.tasks if t.waits])
    waits = list(task.waits)
    waits.remove(random.choice(waits))
    tasks = tuple(replace(t, waits=tuple(waits)) if t is task else t for t in group.tasks)
    return edit_group(template, group.name, lambda g: replace(g, tasks=tasks))


def move_task(template: Template, random: Random) -> Template:
    """A random task goes to a random place of a random queue (and of its load order)."""
    queues = [list(q) for q in template.queues]
    source = random.choice([q for q in queues if q])
    entry = random.choice([e for e in source if e[1] >= 0] or [None])
    if entry is None:
        return template
    source.remove(entry)
    target = random.choice(queues)
    target.insert(random.randint(0, len(target)), entry)
    loaded = {e for loads in template.loads for e in loads}
    loads = tuple(tuple(e for e in q if e in loaded) for q in queues)
    return replace(template, queues=tuple(map(tuple, queues)), loads=loads)


def change_one_stage(plan: Plan, random: Random) -> Plan:
    change = random.choice((drop_wait, move_task))
    stage = random.randrange(len(plan.steps["decode"].stages))
    return edit_template(plan, "decode", stage, lambda t: change(t, random))


def change_all_alike(plan: Plan, random: Random) -> Plan:
    """The same change in all layers that share a template."""
    step = plan.steps["decode"]
    number = random.randrange(len(step.templates))
    changed = random.choice((drop_wait, move_task))(step.templates[number], random)
    templates = (*step.templates[:number], changed, *step.templates[number + 1 :])
    return replace(plan, steps={**plan.steps, "decode": replace(step, templates=templates)})


def goes_wrong(plan: Plan, kinds: tuple[str, ...], tries: int) -> bool:
    """By the slow judges: an unordered pair, a wrong value in program order, or an execution that stands still."""
    if wrong_in_order(plan, kinds) or unordered(plan, kinds):
        return True
    return any(execute(plan, kinds, seed) for seed in range(tries))


def agree(seed: int, shape: Shape, changes: int) -> None:
    random = Random(seed)
    plan = make_plan(shape)
    for _ in range(changes):
        plan = change_one_stage(plan, random)
    good = accepted(plan)
    tries = 3 if good else 80  # who claims from a pool is chance
    assert good != goes_wrong(plan, ("decode",) * 3, tries)


@given(
    seed=st.integers(0, 10**9),
    changes=st.integers(1, 3),
    layers=st.integers(1, 2),
    sms=st.integers(1, 3),
    tp=st.sampled_from((1, 2)),
    fine=st.booleans(),
    pool=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_verdicts_are_those_of_the_oracle_after_random_changes(seed, changes, layers, sms, tp, fine, pool):
    agree(seed, Shape(layers=layers, sms=sms, tp=tp, fine=fine, pool=pool, tiles=2, reuse=False), changes)


@pytest.mark.exhaustive
@given(
    seed=st.integers(0, 10**9),
    changes=st.integers(1, 4),
    layers=st.integers(1, 4),
    sms=st.integers(1, 4),
    tp=st.sampled_from((1, 2, 3)),
    fine=st.booleans(),
    pool=st.booleans(),
)
@settings(max_examples=3000, deadline=None)
def test_verdicts_are_those_of_the_oracle_thousands_of_times(seed, changes, layers, sms, tp, fine, pool):
    agree(seed, Shape(layers=layers, sms=sms, tp=tp, fine=fine, pool=pool, tiles=3, reuse=False), changes)


@given(
    seed=st.integers(0, 10**9),
    changes=st.integers(1, 2),
    layers=st.integers(6, 20),
    sms=st.integers(1, 4),
    tp=st.sampled_from((1, 2)),
    pool=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_induction_gives_the_verdict_of_the_full_walk(seed, changes, layers, sms, tp, pool):
    """Also where a layer no longer waits for all of the layer before, so that work of several layers is under way."""
    random = Random(seed)
    plan = make_plan(Shape(layers=layers, sms=sms, tp=tp, pool=pool, period=random.choice((1, 2, 6)), splits=2))
    for _ in range(changes):
        plan = change_all_alike(plan, random)
    assert accepted(plan) == accepted(plan, full=True)
