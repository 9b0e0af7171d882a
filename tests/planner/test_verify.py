"""The verifier: no valid plan refused, every planted defect caught at every place, with names a person can use."""

from __future__ import annotations

from dataclasses import replace

import pytest
from defects import DEFECTS, Unfit, late_append, template_of
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import Shape, edit_tasks, edit_template, make_plan

from mpk_spec.planner.plan import Plan
from mpk_spec.planner.verify import PlanError, verify

KINDS = st.sampled_from((("decode",), ("decode", "prefill")))
PLACES = ("embed", "first", "second", "middle", "tail", "last", "head")


@st.composite
def shapes(draw, layers, sms) -> Shape:
    return Shape(
        layers=draw(layers),
        period=draw(st.sampled_from((1, 2, 6))),
        sms=draw(sms),
        tp=draw(st.sampled_from((1, 2, 4))),
        heads=draw(st.integers(1, 3)),
        splits=draw(st.integers(1, 3)),
        tiles=draw(st.integers(2, 4)),
        pool=draw(st.booleans()),
        fine=draw(st.booleans()),
        reuse=draw(st.booleans()),
        kinds=draw(KINDS),
    )


def stage_at(shape: Shape, place: str) -> int:
    """The stage of a place; of the tail the first layer after the last whole period."""
    tail = shape.layers - (shape.layers - 1) % shape.period if shape.period > 1 else shape.layers
    layers = {"first": 1, "second": 2, "middle": (shape.layers + 1) // 2, "tail": tail, "last": shape.layers}
    return {"embed": 0, "head": shape.layers + 1, **layers}[place]


def refused(plan: Plan, full: bool = False) -> tuple[str, ...]:
    with pytest.raises(PlanError) as caught:
        verify(plan, full)
    return caught.value.problems


@given(shapes(st.integers(1, 14), st.integers(1, 8)))
@settings(max_examples=150, deadline=None)
def test_valid_plans_pass_with_and_without_induction(shape):
    plan = make_plan(shape)
    short, whole = verify(plan), verify(plan, full=True)
    assert whole.induced == 0
    assert short.examined + short.induced == whole.examined == short.stages
    assert short.transitions == whole.transitions


@given(shapes(st.just(80), st.integers(1, 8)))
@settings(max_examples=60, deadline=None)
def test_eighty_layers_pass(shape):
    proof = verify(make_plan(shape))
    assert proof.stages == 82 * len(shape.kinds) * (1 + len(shape.kinds))


def plant(shape: Shape, plan: Plan, defect, place: str, kind: str) -> Plan:
    """The plan with the defect at that place, or at the next place where it exists, or with the next defect."""
    start, first = PLACES.index(place), DEFECTS.index(defect)
    for which in (*DEFECTS[first:], *DEFECTS[:first]):
        for where in (*PLACES[start:], *PLACES[:start]):
            try:
                return which(plan, kind, min(stage_at(shape, where), shape.layers + 1))
            except Unfit:
                continue
    raise AssertionError("no defect fits")


planted = st.lists(
    st.tuples(st.sampled_from(DEFECTS), st.sampled_from(PLACES), st.integers(0, 1), st.booleans()),
    min_size=8,
    max_size=8,
)


def expect_refusals(shape: Shape, plants) -> None:
    plan = make_plan(shape)
    for defect, place, kind, full in plants:
        spoiled = plant(shape, plan, defect, place, shape.kinds[kind % len(shape.kinds)])
        assert refused(spoiled, full and shape.layers < 80)


@given(shapes(st.integers(1, 4), st.integers(2, 6)), planted)
@settings(max_examples=130, deadline=None)
def test_over_a_thousand_defects_in_small_plans(shape, plants):
    expect_refusals(shape, plants)


@given(shapes(st.sampled_from((1, 80)), st.integers(2, 6)), planted)
@settings(max_examples=130, deadline=None)
def test_over_a_thousand_defects_in_one_and_eighty_layers(shape, plants):
    expect_refusals(shape, plants)


@pytest.mark.exhaustive
@given(shapes(st.integers(1, 80), st.integers(2, 8)), planted)
@settings(max_examples=2500, deadline=None)
def test_twenty_thousand_defects(shape, plants):
    expect_refusals(shape, plants)


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.__name__)
@pytest.mark.parametrize("layers", (1, 80))
def test_each_defect_at_each_place(defect, layers):
    """Nothing is left to chance: every defect, wherever it exists."""
    found = 0
    for shape in (Shape(layers=layers, period=6), Shape(layers=layers, period=6, tp=2, pool=True)):
        plan = make_plan(shape)
        for place in PLACES:
            try:
                spoiled = defect(plan, "decode", min(stage_at(shape, place), layers + 1))
            except Unfit:
                continue
            assert refused(spoiled)
            found += 1
    assert found


def test_appends_come_before_the_end_of_their_step():
    """What earlier steps appended may be loaded ahead of a task's events, once the SM knows that they are over."""
    spoiled = late_append(make_plan(Shape(layers=4)), "decode", 5)
    (said,) = refused(spoiled)
    assert said.startswith("decode, head, sample[0] ends the step and nothing makes it wait for decode, head, late[0]")


def test_induction_leaves_out_equal_layers():
    proof = verify(make_plan(Shape(layers=80)))
    assert (proof.stages, proof.examined, proof.induced) == (164, 12, 152)
    assert proof.summary() == (
        "proved: acyclic, no queue or ring deadlock, thresholds, limits, 190 reads after their writes, "
        "142 writes after earlier uses, next step included (decode to decode); "
        "126 tasks, 17 events; 12 stages examined, 152 by induction"
    )


def test_a_period_of_six_with_a_tail():
    """Every sixth layer is ordered in another way: the period is found, and the tail of 2 layers walked."""
    plan = make_plan(Shape(layers=63, period=6))
    extra = {}
    for stage in range(7, 64, 6):
        step = plan.steps["decode"]
        number = extra.setdefault(step.stages[stage].template, len(step.templates))
        if number == len(step.templates):
            coarse = make_plan(Shape(layers=63, period=6, fine=False)).steps["decode"].templates
            template = next(t for t in coarse if t.name == "local")
            step = replace(step, templates=(*step.templates, template))
        stages = list(step.stages)
        stages[stage] = replace(stages[stage], template=number)
        plan = replace(plan, steps={"decode": replace(step, stages=tuple(stages))})
    proof = verify(plan)
    assert proof.induced > 0
    assert verify(plan, full=True).examined == proof.stages


def test_a_defect_in_the_tail_is_seen_behind_the_induction():
    shape = Shape(layers=80, period=6)
    plan = make_plan(shape)
    spoiled = edit_template(plan, "decode", 80, lambda t: edit_tasks(t, "down", lambda task: replace(task, waits=())))
    assert refused(spoiled)[0].startswith("decode, layer 79, down[0] reads 'act' [0, 18) and nothing makes it wait")


def message(defect_name: str, place: str, **shape) -> str:
    made = Shape(**{"layers": 3, **shape})
    defect = next(d for d in DEFECTS if d.__name__ == defect_name)
    return refused(defect(make_plan(made), "decode", stage_at(made, place)))[0]


@pytest.mark.parametrize(
    ("defect", "place", "shape", "expected"),
    [
        (
            "dropped_event",
            "middle",
            {},
            "decode, layer 1, down[0] reads 'act' [0, 18) and nothing makes it wait for its writer "
            "decode, layer 1, gate_up[1] (and 5 more like it)",
        ),
        (
            "threshold_too_high",
            "head",
            {},
            "decode, head: sample[0] waits for 5 signals of 'head.done', which gets 4: never reached",
        ),
        (
            "threshold_too_low",
            "head",
            {},
            "decode, head: sample[0] waits for 3 of the 4 signals of 'head.done': "
            "no particular task is known to be done",
        ),
        (
            "stale_in_next_step",
            "head",
            {},
            "next decode, embed, embed[0] writes 'r0' [0, 6) and nothing makes it wait for decode, head, export[0], "
            "which reads the value before (and 1 more like it)",
        ),
        (
            "overlapping_inboxes",
            "first",
            {"tp": 2},
            "decode, layer 0, down[0] writes 'd_in' [0, 4) and nothing makes it wait for decode, layer 0, gate_up[0] "
            "of the other ranks, which uses the same bytes (and 5 more like it)",
        ),
        (
            "read_before_append",
            "last",
            {},
            "decode, layer 2, attend[0] reads 'kv' [0, 1) before this step's append to [0, 1) (and 3 more like it)",
        ),
        (
            "residual_on_every_rank",
            "last",
            {"tp": 2},
            "decode, template 'global', group 'o': add 'out' adds to 'o' on every rank "
            "before it is summed over the ranks",
        ),
        (
            "too_much_shared_memory",
            "head",
            {},
            "decode, template 'head', group 'sample': shared memory: 228353 bytes of its own and a ring of 4096 "
            "exceed the 232448 of the CPU reference",
        ),
        ("queued_twice", "embed", {}, "decode, template 'embed': embed[0] is queued 2 times"),
        ("not_queued", "embed", {}, "decode, template 'embed': embed[0] is in no queue"),
        ("not_loaded", "first", {}, "decode, template 'first': qkv[0]: SM 0 runs it and never loads it"),
        ("span_gap", "embed", {}, "decode, template 'embed', group 'embed': no task writes 'r0' [6, 7)"),
        (
            "ring_deadlock",
            "first",
            {"sms": 8},
            "decode, template 'first': ring deadlock on SM 0: qkv[0] needs room in the 4 stages that gate_up[0], "
            "loaded before it and run after it, holds",
        ),
    ],
)
def test_messages_name_step_layer_group_task_and_tensor(defect, place, shape, expected):
    assert message(defect, place, **shape) == expected


def test_a_cycle_is_told_as_a_chain():
    told = message("wait_cycle", "first", sms=8)
    assert told == (
        "decode, template 'first': wait cycle: qkv[0] waits for 'down.done' of down[0], "
        "which comes after attend[0], which waits for 'qkv.0' of qkv[0]"
    )


def test_all_problems_are_told_at_once():
    plan = make_plan(Shape())
    by_name = {d.__name__: d for d in DEFECTS}
    for name, stage in (("too_much_shared_memory", 4), ("threshold_too_low", 2), ("span_gap", 0)):
        plan = by_name[name](plan, "decode", stage)
    told = "\n".join(refused(plan))
    assert "shared memory" in told and "no particular task" in told and "no task writes 'r0'" in told


def test_limits_of_the_whole_plan():
    plan = make_plan(Shape())
    r0 = plan.tensors["r0"]
    tensors = {**plan.tensors, "r0": replace(r0, offset=r0.offset + 4, bytes=1 << 20)}
    problems = refused(replace(plan, tensors=tensors, chunk_bytes=1000, ring_bytes=4000))
    assert problems[:3] == (
        f"tensor 'r0' lies at byte {r0.offset + 4}, not a multiple of 16",
        f"tensor 'r0' ends at byte {r0.offset + 4 + (1 << 20)} of the cuda arena, which has {plan.arena_bytes['cuda']}",
        "chunks of 1000 bytes are not a multiple of 16",
    )
    huge = replace(plan, arena_bytes={"cuda": 1 << 40})
    assert refused(huge) == (f"the arenas take {1 << 40} bytes, the CPU reference has {64 << 30}",)


def test_a_pool_is_on_every_queue():
    plan = make_plan(Shape(pool=True))

    def change(template):
        return replace(template, queues=(tuple(e for e in template.queues[0] if e[1] >= 0), *template.queues[1:]))

    problems = refused(edit_template(plan, "decode", 1, change))
    assert problems[0] == "decode, template 'first': the pool of 'attend' is not in the queues of SMs 0"


def test_one_sm_needs_no_events():
    """On one SM the queue orders everything: a plan without waits is right, and wrong as soon as the queue is."""
    plan = make_plan(Shape(sms=1))
    for stage in range(len(plan.steps["decode"].stages)):
        for group in template_of(plan, "decode", stage).groups:
            plan = edit_template(
                plan, "decode", stage, lambda t, g=group: edit_tasks(t, g.name, lambda x: replace(x, waits=()))
            )
    verify(plan)

    def swap(template):
        queue = template.queues[0]
        return replace(template, queues=((queue[-1], *queue[1:-1], queue[0]),))

    assert "nothing makes it wait for" in "\n".join(refused(edit_template(plan, "decode", 4, swap)))
