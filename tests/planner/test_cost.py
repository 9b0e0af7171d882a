from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
import shapes

from mpk_spec.errors import UserError
from mpk_spec.planner import plan as plan_of
from mpk_spec.planner.cost import CostModel, calibration_file, cost_model, kv_of, read_calibration, task_cost
from mpk_spec.planner.plan import Node, Weight
from mpk_spec.planner.targets import TARGETS
from mpk_spec.planner.task_shape import Loop, looks_of, loop_of
from mpk_spec.schema import load_spec
from mpk_spec.tuner.space import with_rules


def group(plan, name):
    return next(g for t in plan.steps["decode"].templates for g in t.groups if g.name == name)


def cost_of(plan, name, index=0, context=512, **constants):
    found, cost = group(plan, name), replace(cost_model(plan.target), **constants)
    return task_cost(plan, plan.steps["decode"], found, found.tasks[index], cost, context)


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_has_constants(target):
    model = cost_model(target)
    assert (model.stream_gbps, model.num_sms) == (TARGETS[target].stream_gbps, TARGETS[target].num_sms)
    assert all(v >= 0 for f in fields(model) if isinstance(v := getattr(model, f.name), float))


def test_every_constant_is_documented():
    from pathlib import Path

    source = Path(cost_model.__code__.co_filename).read_text()
    body = source[source.index("class CostModel") : source.index("def sm_gbps")]
    undocumented = {"target", "num_sms"}
    for field in fields(CostModel):
        after = body[body.index(f"    {field.name}: ") :].split("\n")[1]
        assert after.strip().startswith('"""') or field.name in undocumented, field.name


@pytest.mark.parametrize(
    ("target", "kib", "share"), [("h200", 32, 0.839), ("h200", 48, 0.974), ("h100", 48, 0.995), ("h100", 32, 0.96)]
)
def test_bytes_in_flight_reach_a_share_of_the_rate(target, kib, share):
    """Of what 64 KiB reach. 3807, 4420 and 4537 GB/s were measured on an H200."""
    cost = cost_model(target)
    assert cost.stream_share(kib * 1024) / cost.stream_share(65536) == pytest.approx(share, abs=0.006)
    assert 0.985 < cost.stream_share(65536) < 1


@pytest.mark.parametrize(("target", "chunk", "kib"), [("h200", 16, 80), ("h100", 16, 64), ("h200", 64, 128)])
def test_bytes_in_flight_are_what_comes_in_a_time_in_whole_chunks(target, chunk, kib):
    cost = cost_model(target)
    assert cost.in_flight(chunk * 1024) == kib * 1024
    least = cost.in_flight_us * cost.sm_gbps * 1e3
    assert least <= cost.in_flight(chunk * 1024) < least + chunk * 1024


def test_overrides_replace_constants():
    assert cost_model("h100", {"hop_us": 5.0}).hop_us == 5.0


def test_an_unknown_constant_is_refused():
    with pytest.raises(UserError) as error:
        cost_model("h100", {"hop": 1.0})
    assert str(error.value) == "unknown constant 'hop' in the calibration of h100\n  hint: did you mean 'hop_us'?"


def test_calibration_comes_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MPK_SPEC_CACHE", str(tmp_path))
    assert read_calibration("h100") is None
    calibration_file("h100").parent.mkdir()
    calibration_file("h100").write_text(json.dumps({"hop_us": 0.7}))
    assert read_calibration("h100") == {"hop_us": 0.7}


@pytest.mark.parametrize("text", ["{", "[1]", '{"hop_us": "fast"}'])
def test_a_broken_calibration_is_refused(tmp_path, monkeypatch, text):
    monkeypatch.setenv("MPK_SPEC_CACHE", str(tmp_path))
    calibration_file("h100").parent.mkdir()
    calibration_file("h100").write_text(text)
    with pytest.raises(UserError, match="delete it or measure again"):
        read_calibration("h100")


def test_kv_blocks_go_to_their_split():
    plan = shapes.make(context=512)  # 8 blocks of 64 positions over 4 splits
    tasks = group(plan, "attend").tasks
    step = plan.steps["decode"]
    assert [kv_of(plan, step, t, None, 512)[0] for t in tasks[:4]] == [2, 2, 2, 2]
    assert [kv_of(plan, step, t, None, 130)[0] for t in tasks[:4]] == [1, 1, 1, 0]  # 3 blocks
    assert [kv_of(plan, step, t, 64, 512)[0] for t in tasks[:4]] == [1, 0, 0, 0]  # a window of one block
    assert kv_of(plan, step, tasks[0], None, 512)[1] == 2 * 64 * 128 * 2 * 2  # keys and values, bf16


def test_a_window_is_read_from_the_operator():
    plan = shapes.make(context=512)
    attend = group(plan, "attend")
    windowed = replace(attend, nodes=(replace(attend.nodes[0], values={"window": 64}),))
    found = [task_cost(plan, plan.steps["decode"], g, attend.tasks[0], cost_model("h100"), 512)
             for g in (attend, windowed)]  # fmt: skip
    assert found[0].kv_bytes == 2 * found[1].kv_bytes > 0


def test_every_sequence_of_a_batch_has_its_own_cache():
    plan = replace(shapes.make(context=512), batch=4)
    task = group(plan, "attend").tasks[0]
    assert kv_of(plan, plan.steps["decode"], task, None, 512)[0] == 8


def test_a_linear_streams_its_weights():
    plan = shapes.make()
    found = cost_of(plan, "gate_up")
    assert found.weight_bytes == group(plan, "gate_up").tasks[0].load_bytes
    assert found.kv_bytes == 0


def test_attention_takes_its_blocks_in_pairs():
    plan = shapes.make(context=512)
    cost = cost_model("h100")
    two, three = cost_of(plan, "attend", context=500), cost_of(plan, "attend", context=510, kv_pair_us=3.0)
    assert two.compute_us == pytest.approx(cost.attend_us + cost.kv_pair_us) and two.weight_bytes == 0
    assert three.compute_us == pytest.approx(cost.attend_us + 3.0)
    assert two.streamed == two.kv_bytes > 0
    idle = cost_of(plan, "attend", index=3, context=100)  # two blocks, four workers
    assert idle.compute_us == 0


def test_the_block_of_the_new_position_counts_before_anything_is_cached_of_it():
    plan = shapes.make(context=512)
    step, tasks = plan.steps["decode"], group(plan, "attend").tasks
    found = [kv_of(plan, step, t, None, 128) for t in tasks[:4]]
    assert [blocks for blocks, _ in found] == [1, 1, 1, 0]
    assert [size for _, size in found] == [64 * 128 * 2 * 2] * 2 + [0, 0]


@pytest.mark.parametrize(
    ("name", "loop"),
    [
        ("qkv", Loop(12, 3, 0, 0)),  # 5 or 6 tiles of 4 chunks of K: three pairs of each
        ("gate_up", Loop(48, 9, 2, 0)),  # 24 tiles, three blocks
        ("down", Loop(24, 11, 0, 0)),  # 4 tiles of 12 chunks
        ("attend", Loop(0, 0, 0, 0)),
    ],
)
def test_turns_through_the_inner_loop(name, loop):
    made = plan_of(load_spec("qwen3"), size="8b", target="h100", context=512, verified=False)
    found = next(g for t in made.steps["decode"].templates for g in t.groups if g.name.removesuffix("_add") == name)
    assert loop_of(made, found, max(found.tasks, key=lambda t: t.load_chunks)) == loop


def test_an_odd_tile_is_a_pair_of_its_own():
    made = plan_of(load_spec("qwen3"), size="0.6b", target="h100", context=512, verified=False)
    found = next(g for g in made.steps["decode"].templates[0].groups if g.name == "qkv")
    assert {t.load_chunks: loop_of(made, found, t) for t in found.tasks} == {4: Loop(2, 0, 0, 0)}  # 31 and 32 rows
    fewer = plan_of(
        with_rules(load_spec("qwen3"), {"qkv": {"grid": [171, 1, 1], "partition": "balanced"}}),
        size="0.6b",
        target="h100",
        context=512,
        verified=False,
    )
    found = next(g for g in fewer.steps["decode"].templates[0].groups if g.name == "qkv")
    assert {t.load_chunks: loop_of(fewer, found, t) for t in found.tasks} == {3: Loop(2, 0, 0, 0)}


def test_sums_of_one_or_two_tiles_stay_in_registers():
    made = plan_of(load_spec("qwen3"), size="0.6b", target="h100", context=512, verified=False)
    found = next(g for g in made.steps["decode"].templates[1].groups if g.name == "down_add")
    assert {loop_of(made, found, t) for t in found.tasks} == {Loop(0, 0, 0, 3)}  # 3072 columns are 3 chunks


def test_what_is_made_of_values_that_are_looked_at():
    made = plan_of(load_spec("qwen3"), size="8b", target="h100", context=512, verified=False)
    found = {g.name: looks_of(g) for t in made.steps["decode"].templates for g in t.groups}
    assert found["qkv"] == found["gate_up"] == "norm" and found["attend"] == "attend"
    assert found["o_add"] == found["down_add"] == found["next_ids"] == "plain"
    split = plan_of(load_spec("smollm2"), size="135m", target="h100", context=512, verified=False)
    assert {looks_of(g) for g in split.steps["decode"].templates[1].groups if g.name == "o_add"} == {"merge"}


def test_a_wide_input_takes_longer():
    plan = shapes.make()
    more = replace(plan, steps={"decode": replace(plan.steps["decode"], tokens=16)})
    assert cost_of(more, "down").compute_us > cost_of(plan, "down").compute_us + 5  # 393 KB of activations


def routed(plan, tokens, slots):
    """The plan with `down` over 128 experts, 8 per token, in `slots` slots."""
    step = plan.steps["decode"]
    template = step.templates[1]
    route = replace(template.groups[0], name="route", nodes=(Node("route", "top_k", (), "route", {}, {"k": 8}),))
    down = group(plan, "down")
    tasks = tuple(replace(t, k=(t.index % slots, t.index % slots + 1) if slots > 1 else None) for t in down.tasks)
    node = Node("down", "linear", ("act", "route"), "x", {"weight": "experts"})
    down = replace(down, nodes=(node,), grid=(1, slots, 1), tasks=tasks, launch="dynamic")
    step = replace(step, tokens=tokens, templates=(replace(template, groups=(route, down)),))
    weight = Weight("experts", "e.{e}", (128, 4, 4), (128, 4, 4), stack="e")
    return replace(plan, weights={"experts": weight}, steps={"decode": step}), step, down


def share(tokens, slots, index):
    plan, step, down = routed(shapes.make(), tokens, slots)
    found = task_cost(plan, step, down, down.tasks[index], cost_model("h100"), 512)
    return found.weight_bytes / down.tasks[index].load_bytes


def test_one_token_uses_every_slot_of_its_experts():
    assert [share(1, 8, n) for n in range(8)] == pytest.approx([1] * 8)


def test_tokens_that_choose_the_same_experts_leave_slots_empty():
    distinct = 128 * (1 - (1 - 8 / 128) ** 4)  # 29.1 of 32
    assert share(4, 32, 0) == 1
    assert share(4, 32, 29) == pytest.approx(distinct - 29)
    assert share(4, 32, 31) == 0


def test_a_task_without_slots_reads_all_chosen_experts():
    distinct = 128 * (1 - (1 - 8 / 128) ** 4)
    assert share(4, 1, 0) == pytest.approx(distinct / 32)
