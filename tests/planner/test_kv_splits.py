"""How many splits, and who adds them up: the choice, what a rule may say, the merge's tasks, their proof."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from statistics import fmean

import pytest
from plans import edit_tasks, edit_template
from tiny_specs import child, planned, spec_of

from mpk_spec.errors import SpecError
from mpk_spec.planner import plan
from mpk_spec.planner.kv_splits import (
    FUSED_SPLITS,
    MERGE_SMEM,
    Attended,
    attention_us,
    cheapest_merge,
    cheapest_splits,
)
from mpk_spec.planner.plan import Group, Plan, Span, Task
from mpk_spec.planner.report import pin
from mpk_spec.planner.simulate import simulate
from mpk_spec.planner.targets import find_target
from mpk_spec.planner.verify import PlanError, verify

H200 = find_target("h200")
QWEN3_06B, QWEN3_8B = Attended(16, 8, 128, 64, 4096, 31_460_000), Attended(32, 8, 128, 64, 4096, 385_880_000)
LLAMA_1B, SMOLLM2 = Attended(32, 8, 64, 64, 4096, 121_640_000), Attended(9, 3, 64, 64, 4096, 7_080_000)
MODELS = {"qwen3": "8b", "llama3": "1b", "smollm2": "135m", "qwen2_5": "0.5b"}


def ruled(**settings):
    return child("qwen3", schedule=[{"set": {"attend": settings}}])


def tiny(context: int = 512, **settings) -> Plan:
    return planned(ruled(**settings), target="h100", context=context)


def groups(made: Plan) -> dict[str, Group]:
    return {g.name: g for t in made.steps["decode"].templates for g in t.groups}


def chosen(shape: Attended, context: int) -> tuple[int, str]:
    shape = replace(shape, context=context)
    splits = cheapest_splits(shape, H200, None)
    return splits, cheapest_merge(shape, H200, splits)


# ---- the choice


def test_a_worker_takes_whole_blocks():
    """A pair takes 0.7 us. On the way to four blocks three workers take less than two where there are three of them.
    A fifth has nothing to do."""
    shape = replace(QWEN3_06B, context=256)
    one, two, three, four, five = (attention_us(shape, H200, n, "apart") for n in (1, 2, 3, 4, 5))
    assert one - (two - 2.0) == pytest.approx((0.7 + 1.15 + 1.4 - 0.45 - 0.7 - 0.7) / 4, abs=0.1)
    assert two - three == pytest.approx(three - four, abs=0.03) == pytest.approx(0.25 / 4, abs=0.03)
    assert five == four


def test_what_the_ring_has_before_the_queries_does_not_wait_for_memory():
    """On an H100, where a worker gets a block of 32 KB in 1.15 us, late ones are dearer than 0.7 us a pair."""
    h100 = find_target("h100")
    early, late = (
        attention_us(replace(QWEN3_8B, context=n + 128), h100, 1, "fused")
        - attention_us(replace(QWEN3_8B, context=n), h100, 1, "fused")
        for n in (128, 8192)
    )
    assert early == pytest.approx((0.45 + 0.7 + 1.15 + 1.4) / 4 - (0.45 + 0.7) / 2)
    assert late == pytest.approx(1.15, abs=0.04)


def test_a_live_split_costs_every_reader_its_bytes():
    shape = replace(QWEN3_06B, context=8192)
    fused = [attention_us(shape, H200, n, "fused") for n in (32, 33)]
    took = [fmean((0, 0.45, 0.7, 1.15, 1.4)[-(-n // splits)] for n in range(1, 129)) for splits in (32, 33)]
    live = fmean(min(33, n) - min(32, n) for n in range(1, 129)) * 16 * 130 * 4
    streams = 1 - 132 * 176 * 1024 / 31.46e6  # the part of a layer's weights that is not in the rings by then
    assert fused[1] - fused[0] == pytest.approx(live / 60e3 + live / 15e3 * streams + took[1] - took[0], abs=0.01)
    assert attention_us(shape, H200, 32, "apart") < fused[0] - 5


@pytest.mark.parametrize(
    ("shape", "few"), [(QWEN3_06B, (3, 4)), (LLAMA_1B, (1, 1)), (SMOLLM2, (4, 4)), (QWEN3_8B, (1, 1))]
)
def test_short_contexts_have_few_splits_and_the_readers_merge_them(shape, few):
    splits, merge = chosen(shape, 512)
    assert few[0] <= splits <= few[1] and merge == "fused"


@pytest.mark.parametrize("context", [4096, 32768])
@pytest.mark.parametrize("shape", [QWEN3_06B, QWEN3_8B, LLAMA_1B])
def test_long_contexts_have_as_many_as_there_are_sms(shape, context):
    assert chosen(shape, context) == (132 // 8, "apart")


@pytest.mark.parametrize("context", [1, 64, 512, 1024, 2048, 4096, 32768])
@pytest.mark.parametrize("name", MODELS)
def test_more_than_four_are_never_merged_by_readers(name, context):
    made = plan(spec_of(name), size=MODELS[name], target="h100", context=min(context, 8192), verified=False)
    found = groups(made)
    splits = found["attend"].kv_splits
    assert splits <= -(-made.context // 64) and splits * made.states["kv"].kv_heads <= 132
    assert splits <= FUSED_SPLITS or "attention.a.merge" in found
    assert ("attention.a.merge" in found) == (made.schedule["attend"].get("kv_merge") == "apart")


def test_what_does_not_fit_into_a_task_is_merged_by_readers():
    shape = replace(QWEN3_8B, context=32768)
    assert cheapest_merge(shape, H200, shape.most_apart) == "apart"
    assert cheapest_merge(shape, H200, shape.most_apart + 1) == "fused"
    assert cheapest_splits(replace(shape, kv_heads=1, head_dim=256), H200, None) <= MERGE_SMEM // (258 * 4)


def test_readers_that_must_merge_get_few():
    assert cheapest_splits(replace(QWEN3_8B, context=32768), H200, "fused") == FUSED_SPLITS


# ---- what a rule says


def test_a_rule_says_who_merges():
    fused, apart = tiny(kv_splits=3), tiny(kv_splits=3, kv_merge="apart")
    assert [n.op for n in groups(fused)["o_add"].nodes] == ["attention_merge", "linear", "add"]
    assert [n.op for n in groups(apart)["o_add"].nodes] == ["linear", "add"]
    assert [n.op for n in groups(apart)["attention.a.merge"].nodes] == ["attention_merge"]
    many = tiny(kv_splits=7, kv_merge="fused")
    assert many.schedule["attend"]["kv_merge"] == "fused" and "attention.a.merge" not in groups(many)
    alone = tiny(kv_splits=1, kv_merge="apart")
    assert "kv_merge" not in alone.schedule["attend"] and "attention.a.splits" not in alone.tensors


@pytest.mark.parametrize("settings", [{"kv_splits": 7}, {"kv_splits": 2, "kv_merge": "apart"}, {"kv_splits": 2}, {}])
def test_pinned_it_is_the_same_plan(settings):
    import yaml

    made = tiny(**settings)
    again = planned(child("qwen3", schedule=yaml.safe_load(pin(made))["schedule"]), target="h100", context=512)
    assert again.to_json() == made.to_json()


def test_what_several_read_cannot_be_merged_by_readers():
    twice = {"attention": {"b": {"add": ["a", "a"]}, "o": {"linear": "b"}}}

    def spec(**settings):
        return child("qwen3", blocks=twice, schedule=[{"set": {"attend": {"kv_splits": 3, **settings}}}])

    made = planned(spec(), target="h100", context=512)
    assert made.schedule["attend"]["kv_merge"] == "apart"
    with pytest.raises(SpecError, match="'attend' is not read by one linear alone"):
        planned(spec(kv_merge="fused"), target="h100", context=512)


def test_what_does_not_fit_is_refused():
    spec = child("qwen3", {"max_position_embeddings": 65536}, schedule=[
        {"set": {"attend": {"kv_splits": 400, "kv_merge": "apart"}}}
    ])  # fmt: skip
    with pytest.raises(SpecError, match="a task merges at most 338 splits of a head of 32, here are 400"):
        planned(spec, target="h100", context=65536)


def test_of_what_is_no_attention_it_is_refused():
    with pytest.raises(SpecError, match="'o_add' has no kv_merge: it is not an attention"):
        planned(child("qwen3", schedule=[{"set": {"o_add": {"kv_merge": "apart"}}}]), target="h100", context=512)


# ---- the plan


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("splits", [2, 7])
def test_a_task_merges_one_head_of_all_splits(splits, tp):
    made = planned(ruled(kv_splits=splits, kv_merge="apart"), target="h100", context=512, tp=tp)
    heads, layer = 8 // tp, made.steps["decode"].templates[1]
    merge = next(g for g in layer.groups if g.name == "attention.a.merge")
    assert len(merge.tasks) == heads
    for head, task in enumerate(merge.tasks):
        rows = [(split * heads + head) * 34 for split in range(splits)]
        assert task.reads == tuple(Span("attention.a.splits", at, at + 34) for at in rows)
        assert task.writes == (Span("attention.a", head * 32, head * 32 + 32),)
        first = head // 4 * splits  # tasks of its KV head
        events = {(w.event, w.count) for w in task.waits if w.event.startswith("attend")}
        assert events == {(f"attend.done[{first}:{first + splits}]" if tp == 1 else "attend.done", splits)}
    assert made.tensors["attention.a"].dtype == "bf16" and made.crossing == "data"
    assert {"attention.a", "attention.a.splits"} <= {n for n, t in made.tensors.items() if t.turns == 2}
    waits = [w for g in layer.groups if g.name in ("attention.a.merge", "o_add") for t in g.tasks for w in t.waits]
    assert {"attention.a.merge.done"} <= {w.event for w in waits} and all(w.data for w in waits)


@pytest.mark.parametrize("crossing", ["event", "data"])
@pytest.mark.parametrize("name", ["qwen3", "llama3", "qwen2_5", "gemma3", "qwen3_moe"])
def test_such_plans_are_proved(name, crossing):
    if (name, crossing) == ("qwen3_moe", "data"):
        crossing = "auto"  # experts are claimed
    rules = [{"set": {"attend": {"kv_splits": 5, "kv_merge": "apart"}, "*": {"crossing": crossing}}}]
    for tp in (1, 2):
        made = planned(child(name, schedule=rules), target="h100", context=512, tp=tp)
        assert "attention.a.merge" in groups(made)


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_a_real_size_is_proved(tp):
    verify(plan(spec_of("qwen3"), size="8b", target="h100", context=4096, tp=tp, verified=False))


def test_the_simulation_counts_live_splits():
    """With readers that merge, a live split more is bytes more for all; with a merge of its own it is not."""
    spec = replace(spec_of("qwen3"), schedule=[*spec_of("qwen3").schedule, *ruled(kv_splits=16).schedule[-1:]])
    fused = replace(spec, schedule=[*spec.schedule, *ruled(kv_merge="fused").schedule[-1:]])
    apart, fused = (plan(s, size="8b", target="h100", context=4096, verified=False) for s in (spec, fused))
    (near, far), (slow_near, slow_far) = (
        [simulate(made, context=context).us for context in (300, 1000)] for made in (apart, fused)
    )
    assert slow_far - slow_near > far - near + 36 * 2
    assert {"attention.a.merge"} <= {time.name for time in simulate(apart, context=300).groups}


# ---- planted mistakes


@cache
def good() -> Plan:
    return planned(ruled(kv_splits=7), target="h100", context=512, steps=("decode",))


def broken(group: str, change) -> str:
    with pytest.raises(PlanError) as caught:
        verify(edit_template(good(), "decode", 1, lambda t: edit_tasks(t, group, change)))
    return "\n".join(caught.value.problems)


def test_a_merge_that_leaves_a_split_out():
    """Its attention's tasks are waited for as data, and of one of them nothing is looked at (but by its neighbour)."""

    def change(task: Task) -> Task:
        *reads, last = task.reads
        return replace(
            task, reads={1: (*reads, replace(last, hi=last.hi + 34)), 2: tuple(reads)}.get(task.index, task.reads)
        )

    assert "attention.a.merge[2] waits for 'attend.done[0:7]' as data and reads nothing of attend[6]" in broken(
        "attention.a.merge", change
    )


def test_a_merge_of_another_head():
    def change(task: Task) -> Task:
        other = tuple(replace(s, lo=s.lo + 4 * 34, hi=s.hi + 4 * 34) for s in task.reads)
        return replace(task, reads=other) if task.index == 0 else task

    assert "attention.a.merge[0]" in broken("attention.a.merge", change)


def test_a_reader_of_one_head_that_waits_for_all():
    def change(task: Task) -> Task:
        reads = tuple(replace(s, hi=s.lo + 32) if s.tensor == "attention.a" else s for s in task.reads)
        return replace(task, reads=reads) if task.index == 0 else task

    assert "reads nothing of attention.a.merge[" in broken("o_add", change)
