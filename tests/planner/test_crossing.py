"""Values that cross as data: which do, what lies twice for it, and what their readers wait for."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from tiny_specs import child, spec_of

from mpk_spec.emit.program import _program_dtype
from mpk_spec.emit.source import emit
from mpk_spec.errors import SpecError
from mpk_spec.planner import plan
from mpk_spec.planner.crossing import further_back, makers, signallers
from mpk_spec.planner.plan import Plan, Span, Template, Wait
from mpk_spec.planner.verify import verify

DENSE = {"qwen3": "0.6b", "smollm2": "135m", "llama3": "1b", "qwen2_5": "0.5b", "gemma3": "270m"}


@cache
def made(name: str, size: str, **request) -> Plan:
    return plan(spec_of(name), size=size, target="h100", context=512, verified=False, **request)


def pinned(crossing: str, name: str = "qwen3", rules: dict | None = None, **request) -> Plan:
    """A tiny plan with `crossing` asked for."""
    schedule = [{"set": {"*": {"crossing": crossing}, **(rules or {})}}]
    spec = child(name, schedule=schedule, **request.pop("sections", {}))
    return plan(spec, size="tiny", target="h100", context=256, **request)


def waits(template: Template, group: str) -> set[Wait]:
    return {w for g in template.groups if g.name == group for t in g.tasks for w in t.waits}


def data_waits(found: Plan) -> list[Wait]:
    every = (t for s in found.steps.values() for t in s.templates)
    return [w for t in every for g in t.groups for task in g.tasks for w in task.waits if w.data]


@pytest.mark.parametrize("name", DENSE)
def test_dense_models_cross_as_data_and_are_proved(name):
    found = made(name, DENSE[name])
    verify(found)
    step = found.steps["decode"]
    assert found.crossing == "data" and data_waits(found)
    layers = [step.templates[s.template] for s in step.stages if s.layer is not None]
    written = {s.tensor for t in layers for g in t.groups for task in g.tasks for s in task.writes}
    written -= found.states.keys()
    written.add("next_ids.partial")
    assert {n for n, t in found.tensors.items() if t.turns == 2} == written
    once = {n for n in written if n.endswith(".first")} | {"next_ids.partial"}
    assert {n for n, t in found.tensors.items() if t.per == "step"} == once
    assert found.notes[-1] == f"{', '.join(sorted(written))}: cross between SMs as data in steps of one token"
    for template in layers[1:]:
        assert all(w.data for g in template.groups for t in g.tasks for w in t.waits)
    head = step.templates[step.stages[-1].template]
    of_data = {(g.name, w) for g in head.groups for t in g.tasks for w in t.waits if w.data}
    assert of_data == {
        ("head", Wait("down_add.done", layers[-1].events["down_add.done"], -1, data=True)),
        ("next_ids", Wait("head.done", head.events["head.done"], 0, data=True)),
    }


@pytest.mark.parametrize(("name", "size", "tp"), [("qwen3", "0.6b", 2), ("llama3", "8b", 8), ("gemma3", "270m", 4)])
def test_so_they_do_on_several_ranks(name, size, tp):
    found = made(name, size, tp=tp)
    verify(found)
    parts = {n for n, t in found.tensors.items() if t.inbox and t.turns == 2}
    assert found.crossing == "data" and len(parts) == 3 and "next_ids.partial" in parts


def test_more_kv_heads_than_a_scheduler_has_lanes():
    """A step ends after all events of its last layer, and 32 heads have one each."""
    found = made("smollm2", "1.7b")
    verify(found)
    step = found.steps["decode"]
    (end,) = step.templates[step.stages[-1].template].groups[-1].tasks
    last = step.templates[step.stages[-2].template]
    assert {w.event for w in end.waits if w.stage == -1} == last.events.keys() and len(end.waits) > 32


def test_a_reader_waits_for_the_write_before_of_all_that_it_looks_at():
    layer = made("smollm2", "135m").steps["decode"].templates[1]
    counts = layer.events
    assert waits(layer, "o_add") == {
        Wait("attend.done", counts["attend.done"], 0, data=True),
        Wait("down_add.done", counts["down_add.done"], -1, data=True),  # the residual
    }
    assert waits(layer, "gate_up") == {Wait("o_add.done", counts["o_add.done"], 0, data=True)}


def test_the_first_layer_has_a_name_of_its_own_for_what_it_alone_writes():
    """The embedding, which a step writes once: no other layer reads it, nor is there one before to wait for."""
    first, other, *_ = made("smollm2", "135m").steps["decode"].templates
    tasks = [[task for g in template.groups for task in g.tasks] for template in (first, other)]
    spans = [{s.tensor for task in of for s in (*task.reads, *task.writes)} for of in tasks]
    assert "y.first" in spans[0] and "y.first" not in spans[1]
    assert {w.event.split(".done")[0] for w in waits(first, "o_add")} == {"attend"}
    assert waits(first, "qkv") == {Wait("next_ids.done", 1, -1, data=True)}  # what the step before has sampled


@pytest.mark.parametrize(("layers", "tp"), [(3, 1), (4, 2)])
def test_what_tells_the_first_layer_that_the_step_before_is_over(layers, tp):
    """Events of the last layer; in few layers, or with several ranks, that of the end to all tasks."""
    for found, alone in (
        (plan(child("qwen3", {"num_hidden_layers": 4}), size="tiny", target="h100", context=256), True),
        (plan(child("qwen3", {"num_hidden_layers": layers}), size="tiny", target="h100", context=256, tp=tp), False),
    ):
        assert found.crossing == "data"
        first = found.steps["decode"].templates[0]
        tasks = [(g.name, t) for g in first.groups for t in g.tasks]
        told = {name for name, t in tasks if any(w.event == "next_ids.done" for w in t.waits)}
        assert told == ({"qkv"} if alone else {name for name, _ in tasks})
        assert {w.data for _, t in tasks for w in t.waits if w.event == "next_ids.done"} == {alone}


def test_events_of_parts_are_waited_for_where_none_is_of_the_whole():
    spec = child("qwen3", fusions={"attend": None})
    layer = plan(spec, size="tiny", target="h100", context=256, tp=2).steps["decode"].templates[1]
    assert "qkv.done" not in layer.events
    of_parts = {name for name in layer.events if name.startswith("qkv.done[")}
    published = {w for w in waits(layer, "gate_up") if w.event in of_parts}  # the residual, whose shares qkv stores
    assert {w.event for w in published} == of_parts and all(w.data and w.stage == 0 for w in published)


def test_a_cache_that_another_task_appends_to_is_read_by_event():
    spec = child("qwen3", fusions={"attend": None})
    layer = plan(spec, size="tiny", target="h100", context=256).steps["decode"].templates[1]
    by_event = {w.event for w in waits(layer, "attention.a") if not w.data}
    assert by_event == {"attention.cache.done"}


def test_sums_in_two_shots_are_waited_for_by_everybody_who_reads_them():
    found = pinned("data", rules={"o_add": {"all_reduce": "two_shot"}}, tp=2)
    assert found.crossing == "data" and found.tensors["attention.out"].turns == 1
    step = found.steps["decode"]
    for template, group, stage in ((1, "gate_up", 0), (1, "qkv", -1), (len(step.templates) - 1, "head", -1)):
        summed = [w for w in waits(step.templates[template], group) if w.event == "attention.o.all_reduce.done"]
        assert [(w.data, w.stage) for w in summed] == [(False, stage)], group


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_wait_for_data_after_the_layers_is_for_the_step_before(fused, tp):
    members = {} if fused else {"fusions": {"head": {"of": ["h", "logits"]}}}
    found = pinned("data", sections=members, tp=tp)
    step = found.steps["decode"]
    last = len(step.templates) - 1
    assert {further_back(step, n, stage) for n in range(last) for stage in (0, -1)} == {1}
    assert [further_back(step, last, stage) for stage in (0, -1)] == [len(step.stages), 1]
    (wait,) = (w for w in waits(step.templates[-1], "next_ids") if w.data)
    assert wait.event == ("head.done" if fused else "next_ids.partial.done") and wait.stage == 0
    packed = {(int(w["back"]), int(w["data"])) for w in packed_waits(found)}
    assert {(0, len(step.stages)), (0, 1)} <= packed and (1, len(step.stages)) not in packed
    assert ((1, 1) in packed) and {data for _, data in packed} == {0, 1, len(step.stages)}


def packed_waits(found: Plan):
    """Of all SMs' programs."""
    made = emit(found)
    sizes = made.programs.sizes
    dtype = _program_dtype(len(made.step.templates), sizes.entries, sizes.loads, sizes.waits, sizes.signals)
    return np.frombuffer(made.programs.blob, dtype)["wait"].reshape(-1)


def test_by_event_nothing_lies_twice():
    found = pinned("event")
    assert found.crossing == "event" and not data_waits(found)
    assert {t.turns for t in found.tensors.values()} == {1}
    assert not any("as data" in note for note in found.notes)
    assert plan(spec_of("qwen3"), size="tiny", target="cpu", context=256).crossing == "event"


@pytest.mark.parametrize(
    ("name", "rules", "sections", "reason"),
    [
        ("qwen3", {"gate_up": {"launch": "dynamic"}}, {}, "the tasks of 'gate_up' are claimed at run time"),
        ("qwen3_moe", {}, {}, "not every layer writes the same values on the same SMs"),
        ("qwen3", {}, {"tensors": {"attention.q": {"placement": "host"}}}, "'attention.q' is placed in host memory"),
    ],
)
def test_what_cannot_cross_as_data(name, rules, sections, reason):
    """Refused where it is asked for, by event where it is not."""
    with pytest.raises(SpecError) as refused:
        pinned("data", name, rules, sections=sections)
    said = str(refused.value)
    assert f"values cannot cross as data here: {reason}" in said and "hint: write 'auto' or 'event'" in said
    assert "crossing: data" in said.splitlines()[1]
    found = pinned("auto", name, rules, sections=sections)
    assert found.crossing == "event" and not data_waits(found)


def test_who_makes_what_is_read():
    layer = made("smollm2", "135m").steps["decode"].templates[1]
    sent = signallers(layer)
    g = [group.name for group in layer.groups].index("o_add")
    group = layer.groups[g]
    assert [task for _, task in sent["o_add.done"]] == list(group.tasks)
    width = group.tasks[0].writes[0].hi
    assert makers(sent["o_add.done"], [Span("attention.out", 0, width + 1)]) == ((g, 0), (g, 1))
    assert makers(sent["o_add.done"], [Span("y", 0, width)]) == ()


def test_a_reader_waits_for_none_but_writers_of_what_it_reads():
    """Attention apart from what it reads: its append sees keys and values, which one of qkv's two tasks makes."""
    rules = [{"set": {"qkv": {"grid": [2], "partition": "balanced"}}}]
    spec = child("qwen3", {"num_key_value_heads": 1}, fusions={"attend": None}, schedule=rules)
    apart = plan(spec, size="tiny", target="h100", context=256)
    assert apart.crossing == "data"
    of_qkv = {w for w in waits(apart.steps["decode"].templates[1], "attention.cache") if w.event.startswith("qkv")}
    assert of_qkv == {Wait("qkv.done[1:2]", 1, 0, data=True)}
