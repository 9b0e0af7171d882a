"""The proof about values that cross as data: mistakes planted in a plan that the planner made turn it red, one each.

All but the last few pass the rest of the proof, which takes every wait for one of its event.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from defects import template_of
from plans import Shape, edit_tasks, edit_template, make_plan
from tiny_specs import child, spec_of

from mpk_spec.planner import plan
from mpk_spec.planner.plan import Plan, Span, Task, Template, Wait
from mpk_spec.planner.verify import PlanError, data, verify

LAYERS = 30
STAGES = (1, LAYERS // 2, LAYERS - 1)  # of layers that follow one


@cache
def good(steps: tuple[str, ...] = ("decode",)) -> Plan:
    return plan(spec_of("smollm2"), size="135m", target="h100", context=512, steps=steps)


def refused(found: Plan) -> str:
    with pytest.raises(PlanError) as caught:
        verify(found)
    return "\n".join(caught.value.problems)


def edited(stage: int, group: str, change) -> Plan:
    return edit_template(good(), "decode", stage, lambda t: edit_tasks(t, group, change))


def without(event: str, stage: int):
    """A change of tasks that takes a wait from them."""

    def change(task: Task) -> Task:
        kept = tuple(w for w in task.waits if (w.event, w.stage) != (event, stage))
        assert len(kept) < len(task.waits)
        return replace(task, waits=kept)

    return change


@pytest.mark.parametrize("stage", STAGES)
def test_a_reader_that_does_not_know_that_a_copy_was_cleared(stage):
    """The residual of o_add: what gate_up and down_add of the layer before looked at says nothing of their writers."""
    said = refused(edited(stage, "o_add", without("down_add.done", -1)))
    assert "looks at 'y' [" in said and "and no event says that it is cleared by down_add[" in said


def test_a_head_that_does_not_know_it():
    """Its wait for the last layer is for data, so for the event of the layer before that."""
    last = max(t.index for g in template_of(good(), "decode", LAYERS).groups if g.name == "head" for t in g.tasks)
    change = without("down_add.done", -1)
    said = refused(edited(LAYERS, "head", lambda task: change(task) if task.index == last else task))
    assert f"head[{last}]" in said


@pytest.mark.parametrize("stage", STAGES)
def test_one_task_that_does_not_know_it(stage):
    layer = template_of(good(), "decode", stage)
    last = next(g for g in layer.groups if g.name == "o_add").tasks[-1].index
    drop = without("attend.done", 0)
    said = refused(edited(stage, "o_add", lambda task: drop(task) if task.index == last else task))
    assert f"o_add[{last}]" in said


@pytest.mark.parametrize("tensor", ["y", "y.first", "attention.a.splits"])
@pytest.mark.parametrize("other", ["logits", "mlp.act"])
def test_a_copy_that_shares_bytes(tensor, other):
    found = good()
    one, two = found.tensors[tensor], found.tensors[other]
    moved = replace(one, offset=two.offset + two.bytes - 256)
    arenas = {**found.arena_bytes, "cuda": max(found.arena_bytes["cuda"], moved.offset + moved.bytes)}
    said = refused(replace(found, tensors={**found.tensors, tensor: moved}, arena_bytes=arenas))
    assert f"'{tensor}' crosses as data and shares bytes with '{other}'" in said


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("group", ["qkv", "o_add", "down_add"])
def test_a_part_that_another_sm_writes_the_next_time(stage, group):
    """It would be cleared by who does not write it: tasks 0 and 1 change places in one layer."""

    def swap(template: Template) -> Template:
        g = [x.name for x in template.groups].index(group)
        places = {(g, 0): (g, 1), (g, 1): (g, 0)}

        def lists(of: tuple) -> tuple:
            return tuple(tuple(places.get(entry, entry) for entry in one) for one in of)

        return replace(template, queues=lists(template.queues), loads=lists(template.loads))

    said = refused(edit_template(good(), "decode", stage, swap))
    assert "' is written on other SMs in '" in said and "' than the time before" in said


@pytest.mark.parametrize("event", ["qkv", "o_add.done", "gate_up.done"])
def test_a_step_that_ends_before_its_last_layer(event):
    """All others' events say is that somebody looked at these tasks' values, not that they are over. Of SMs that have a
    part of the head its event says so: here few do."""
    few = child("qwen3", schedule=[{"set": {"head": {"grid": [5, 1, 1]}}}])
    found = plan(few, size="tiny", target="h100", context=256, steps=("decode",))

    def change(task: Task) -> Task:
        kept = tuple(w for w in task.waits if not (w.stage == -1 and w.event.startswith(event)))
        assert len(kept) < len(task.waits)
        return replace(task, waits=kept)

    end = len(found.steps["decode"].stages) - 1
    said = refused(edit_template(found, "decode", end, lambda t: edit_tasks(t, "next_ids", change)))
    assert f"a step of one token ends and no event says that {event.split('.')[0]}[" in said


@pytest.mark.parametrize("stage", STAGES)
def test_a_wait_for_data_of_which_a_task_reads_nothing(stage):
    """Attention of the first head waits for the query, key and value of the last."""
    layer = template_of(good(), "decode", stage)
    attend = next(g for g in layer.groups if g.name == "attend")
    (other,) = attend.tasks[-1].waits
    assert other not in attend.tasks[0].waits

    def change(task: Task) -> Task:
        return replace(task, waits=(*task.waits, other)) if task.index == 0 else task

    said = refused(edited(stage, "attend", change))
    assert f"attend[0] waits for '{other.event}' as data and reads nothing of qkv[" in said


@pytest.mark.parametrize("stage", STAGES)
def test_a_task_that_no_longer_reads_what_it_waits_for(stage):
    def change(task: Task) -> Task:
        width = task.reads[0].hi // 2
        return replace(task, reads=(Span(task.reads[0].tensor, 0, width), *task.reads[1:]))

    said = refused(edited(stage, "gate_up", change))
    assert "waits for 'o_add.done' as data and reads nothing of o_add[" in said


def test_what_is_not_data_is_read_after_its_event():
    """A sum in two shots that the next layer takes for there, since others saw values that came of it."""
    spec = child("qwen3", schedule=[{"set": {"o_add": {"all_reduce": "two_shot"}}}])
    found = plan(spec, size="tiny", target="h100", context=256, tp=2, steps=("decode",))
    drop = without("attention.o.all_reduce.done", -1)
    said = refused(edit_template(found, "decode", 2, lambda t: edit_tasks(t, "qkv", drop)))
    assert "reads 'attention.out' [0, 96), and no event says that it is written by attention.o.all_reduce[" in said


END = LAYERS  # the stage after the layers


def test_a_sampling_that_does_not_know_that_the_pairs_were_cleared():
    """In the step before: its event is what the wait for data is for. Without it nothing says that all are there."""
    said = refused(edited(END, "next_ids", without("head.done", 0)))
    assert "head[" in said and "next_ids" in said


def test_ranks_that_do_not_know_that_others_cleared_their_pairs():
    found = plan(spec_of("qwen3"), size="tiny", target="h100", context=256, tp=2, steps=("decode",))
    verify(found)
    end = len(found.steps["decode"].stages) - 1

    def change(task: Task) -> Task:
        return replace(task, waits=tuple(w for w in task.waits if w.event != "head.done"))

    said = refused(edit_template(found, "decode", end, lambda t: edit_tasks(t, "next_ids", change)))
    assert "head[" in said and "next_ids" in said


def test_pairs_that_another_sm_writes_the_next_time():
    """Copies are of steps: who writes a part clears it for the next step, so that the kinds of steps must agree."""
    both = good(("decode", "prefill"))

    def swap(template: Template) -> Template:
        g = [x.name for x in template.groups].index("head")
        places = {(g, 0): (g, 1), (g, 1): (g, 0)}

        def lists(of: tuple) -> tuple:
            return tuple(tuple(places.get(entry, entry) for entry in one) for one in of)

        return replace(template, queues=lists(template.queues), loads=lists(template.loads))

    said = refused(edit_template(both, "decode", END, swap))
    assert "the plan's steps differ in their queues, spans or waits" in said


def test_a_part_of_the_pairs_that_nobody_looks_at():
    def change(task: Task) -> Task:
        (span,) = task.reads
        return replace(task, reads=(replace(span, hi=span.hi - 2),))

    said = refused(edited(END, "next_ids", change))
    assert "nobody looks at 'next_ids.partial' from" in said


def test_steps_whose_waits_differ():
    both = good(("decode", "prefill"))

    def change(task: Task) -> Task:
        return replace(task, waits=tuple(replace(w, data=False) for w in task.waits))

    said = refused(edit_template(both, "prefill", 1, lambda t: edit_tasks(t, "gate_up", change)))
    assert said == "values cross as data and the plan's steps differ in their queues, spans or waits"


def test_waits_for_data_where_nothing_lies_twice():
    found = make_plan(Shape())

    def change(task: Task) -> Task:
        return replace(task, waits=tuple(Wait(w.event, w.count, w.stage, data=True) for w in task.waits))

    said = refused(edit_template(found, "decode", 2, lambda t: edit_tasks(t, "o", change)))
    assert said == "a wait is for data, and no tensor has a second copy"


@cache
def of_ranks(tp: int = 2) -> Plan:
    return plan(spec_of("gemma3"), size="tiny", target="h100", tp=tp, context=512, steps=("decode",))


def test_other_ranks_do_not_know_what_the_one_that_ends_a_step_knows():
    """With several ranks a step begins for all when one of them says so: layer 0 waits for the rank's own end."""

    def early(task: Task) -> Task:
        assert any(w.event == "next_ids.done" and w.stage < 0 and not w.data for w in task.waits)
        return replace(task, waits=tuple(w for w in task.waits if w.event != "next_ids.done" or w.stage >= 0))

    found = of_ranks()
    for group in [g.name for g in template_of(found, "decode", 0).groups]:
        found = edit_template(found, "decode", 0, lambda t, group=group: edit_tasks(t, group, early))
    assert "and nothing makes it wait for its writer decode, head, next_ids[0]" in refused(found)


@pytest.mark.parametrize("tp", [1, 2])
def test_what_an_sm_knows_when_the_next_step_begins(tp, monkeypatch):
    """On one GPU that begins when all of this one is done; of several ranks one says so, of its own tasks."""
    walks = []
    run = data._Walk.run
    monkeypatch.setattr(data._Walk, "run", lambda walk: (run(walk), walks.append(walk)))
    verify(of_ranks(tp))
    everything = (1 << walks[-1].end) - (1 << walks[-1].end // 2)  # of the second of two steps
    assert all(done & everything == everything for done in walks[-1].done) == (tp == 1)


def test_parts_of_other_ranks_are_looked_at_after_an_event_of_theirs():
    """What this rank has done itself tells nothing of what its peers have cleared."""
    made = plan(spec_of("qwen3"), size="0.6b", target="h100", tp=2, context=512, steps=("decode",))
    whole = made.tensors["attention.o"].extent

    def peeks(task: Task) -> Task:
        return replace(task, reads=(*task.reads, Span("attention.o", 0, whole)))

    found = edit_template(made, "decode", 3, lambda t: edit_tasks(t, "down_add", peeks))
    assert "looks at parts of 'attention.o' of other ranks and waits for no event of o_add[" in refused(found)


def test_layers_that_signal_an_event_differently():
    """The kernel waits for the signals of the layer before, and for as many as this one has."""
    found = good()
    name = "attend.done"
    template = template_of(found, "decode", 0)
    first = next(g for g in template.groups if g.name == "attend").tasks[0].index

    def twice(task: Task) -> Task:
        return replace(task, signals=(*task.signals, name)) if task.index == first else task

    def waits_for_more(task: Task) -> Task:
        return replace(task, waits=tuple(replace(w, count=w.count + (w.event == name)) for w in task.waits))

    def change(t: Template) -> Template:
        t = edit_tasks(edit_tasks(t, "attend", twice), "o_add", waits_for_more)
        return replace(t, events={**t.events, name: t.events[name] + 1})

    found = edit_template(found, "decode", 0, change)
    assert "signals of 'attend.done' as data; the time before it has" in refused(found)


def with_tensor(found: Plan, name: str, **changes) -> Plan:
    return replace(found, tensors={**found.tensors, name: replace(found.tensors[name], **changes)})


def test_layers_out_of_order():
    step = good().steps["decode"]
    stages = list(step.stages)
    stages[3], stages[4] = stages[4], stages[3]
    found = replace(good(), steps={"decode": replace(step, stages=tuple(stages))})
    assert "values cross as data, and its layers are not 0, 1, ... one after the other" in refused(found)


def test_copies_that_are_counted_otherwise_than_they_are_written():
    assert "'y' crosses as data, and is not written once in a step and nowhere else" in refused(
        with_tensor(good(), "y", per="step")
    )


def test_copies_too_small_for_two():
    size = good().tensors["y"].bytes
    assert f"two copies of 'y' take {size} bytes, it has {size // 2}" in refused(
        with_tensor(good(), "y", bytes=size // 2)
    )


def test_values_that_nobody_looks_at():
    """One feature of each writer shows that it has begun, not that it has ended."""

    def narrow(task: Task) -> Task:
        reads = tuple(replace(s, hi=s.hi - 1) if s.tensor == "mlp.act" else s for s in task.reads)
        return replace(task, reads=reads)

    assert "nobody looks at 'mlp.act' from 1535 on" in refused(edited(7, "down_add", narrow))


def test_one_layer_whose_result_only_the_head_reads():
    made = plan(child("qwen3", {"num_hidden_layers": 1}), size="tiny", target="h100", context=256)
    assert made.crossing == "data" and verify(made)
