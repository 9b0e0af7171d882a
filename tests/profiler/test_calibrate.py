"""Constants come back out of times that were made with them. No GPU."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from profiler.synthetic import times_of
from tiny_specs import child, spec_of

from mpk_spec.cli.calibrate import page
from mpk_spec.errors import UserError
from mpk_spec.planner import plan
from mpk_spec.planner.cost import calibration_file, cost_model, read_calibration
from mpk_spec.planner.simulate import simulate
from mpk_spec.profiler.calibrate import fit, save, without_clocks
from mpk_spec.profiler.clock import common_clock
from mpk_spec.profiler.report import profile_of
from mpk_spec.profiler.work import Sample, fitted
from mpk_spec.schema import load_spec
from mpk_spec.tuner.space import with_rules

# a GPU with slow hops and slow arithmetic
TRUE = {
    "hop_us": 0.9, "data_hop_us": 2.6, "norm_hop_us": 3.1, "merge_hop_us": 3.4, "attend_hop_us": 2.2, "reduce_us": 0.3,
    "signal_us": 0.5, "activation_us": 1.7, "pair_us": 0.6, "kept_us": 0.5, "turn_us": 0.9, "block_us": 1.2,
    "attend_us": 0.8, "row_op_us": 0.7,
}  # fmt: skip
OF_EVENTS = ("hop_us", "activation_us")
CONTEXT = 500  # two blocks of positions for each of four workers


@pytest.fixture(scope="module")
def made():
    spec = with_rules(load_spec("qwen3"), {"attend": {"kv_splits": 4, "kv_merge": "fused"}})
    return plan(spec, size="0.6b", target="h100", context=1024, verified=False)


@pytest.fixture(scope="module")
def measured(made):
    return recorded(made)


def test_constants_are_found(measured):
    found = {one.name: one for one in fit(measured)}
    # rows but one are in prologues, blocks but one in the head; where K is more than a chunk, sums stay in registers
    for name in TRUE.keys() - {"row_op_us", "block_us", "turn_us", *OF_EVENTS}:
        assert found[name].value == pytest.approx(TRUE[name], rel=0.15), name
        assert found[name].samples >= 8


def test_so_are_those_of_events():
    """No task of the other plan waits for one."""
    spec = with_rules(load_spec("qwen3"), {"*": {"crossing": "event"}})
    found = {
        one.name: one for one in fit(recorded(plan(spec, size="0.6b", target="h100", context=1024, verified=False)))
    }
    for name in OF_EVENTS:
        assert found[name].value == pytest.approx(TRUE[name], rel=0.15), name
        assert found[name].samples >= 8


def recorded(made, context=CONTEXT, tokens=1, **constants):
    """Steps of a GPU with TRUE, or other `constants`."""
    true = simulate(made, context=context, cost=replace(cost_model("h100"), **(TRUE | constants), chance_us=0.0))
    return profile_of(common_clock(times_of(true, steps=tokens + 1)), simulate(made, context=context)).steps


def test_so_are_those_of_rows_on_their_own():
    """Gemma has norms behind its products."""
    made = plan(load_spec("gemma3"), size="270m", target="h100", context=512, verified=False)
    found = {one.name: one for one in fit(recorded(made))}
    assert found["row_op_us"].value == pytest.approx(TRUE["row_op_us"], rel=0.15)


def test_so_is_that_of_a_steps_end():
    """One task a token."""
    made = plan(load_spec("qwen3"), size="tiny", target="h100", context=256, verified=False)
    found = {one.name: one for one in fit(recorded(made, 128, tokens=8, sample_us=4.2))}
    assert found["sample_us"].value == pytest.approx(4.2, rel=0.15) and found["sample_us"].samples == 8
    assert "sample_us" not in {one.name for one in fit(recorded(made, 128, tokens=2))}


def tasks_of(context, /, settings, **constants):
    """The fit of a model with few layers whose operators have other settings."""
    spec = child("qwen3", spec_of("qwen3").sizes["0.6b"].config, schedule=[{"set": settings}])
    made = plan(spec, size="tiny", target="h100", context=1024, verified=False)
    return {one.name: one.value for one in fit(recorded(made, context, **constants))}


def test_so_are_those_of_many_blocks():
    """Of positions in one worker, and of tiles in one task."""
    few = {"attend": {"kv_splits": 1}, "gate_up": {"grid": [24, 1, 1], "partition": "even"}}
    found = tasks_of(1000, few, kv_pair_us=0.9)
    assert found["kv_pair_us"] == pytest.approx(0.9, rel=0.15)
    assert found["block_us"] == pytest.approx(TRUE["block_us"], rel=0.15)


def test_so_is_that_of_turns_with_sums_set_aside():
    tiles_of_three_chunks = {"down_add": {"grid": [32, 1, 1], "partition": "even"}}
    assert tasks_of(CONTEXT, tiles_of_three_chunks, turn_us=3.0)["turn_us"] == pytest.approx(3.0, rel=0.15)


def test_few_blocks_of_positions_leave_what_one_takes(measured):
    assert "kv_pair_us" not in {one.name for one in fit(measured)}


def test_of_times_that_clocks_made_longer_a_part_is_left(made):
    """A kernel whose constants are those of TRUE, less a quarter: the recording has a quarter too much."""
    found = fit(recorded(made))
    less = {name: us * 0.75 for name, us in TRUE.items()}
    us = simulate(made, context=CONTEXT, cost=cost_model("h100", less)).us

    def predicted(constants: dict[str, float]) -> float:
        return simulate(made, context=CONTEXT, cost=cost_model("h100", constants)).us

    part = without_clocks(found, predicted, us)
    assert part == pytest.approx(0.75, abs=0.03)
    assert predicted({one.name: one.value * part for one in found}) == pytest.approx(us, rel=0.002)
    assert without_clocks(found, predicted, 2 * predicted({one.name: one.value for one in found})) == 1.0
    with pytest.raises(UserError, match=r"a token takes 100 us; with next to nothing but memory \d+ are predicted"):
        without_clocks(found, predicted, 100.0)


def test_the_planner_reads_what_was_saved(measured, made, tmp_path, monkeypatch):
    monkeypatch.setenv("MPK_SPEC_CACHE", str(tmp_path))
    calibration_file("h100").parent.mkdir(parents=True)
    calibration_file("h100").write_text(json.dumps({"refill_us": 0.6}))
    path = save("h100", fit(measured), stream_gbps=3120.0)
    known = read_calibration("h100")
    assert path == calibration_file("h100")
    assert known["refill_us"] == 0.6 and known["stream_gbps"] == 3120.0
    before, after = (simulate(made, context=CONTEXT, cost=cost_model("h100", own)) for own in ({}, known))
    assert abs(after.us - measured[0].us) < 0.02 * measured[0].us < abs(before.us - measured[0].us)


def test_the_prediction_is_right_for_every_operator(measured, made):
    """What was fitted explains each of them, not only their sum."""
    found = cost_model("h100", {one.name: one.value for one in fit(measured)})
    says = simulate(made, context=CONTEXT, cost=found).critical
    for name in ("qkv", "attend", "o_add", "gate_up", "down_add"):
        own, other = (sum(us for (of, _), us in c.items() if of == name) for c in (says, measured[0].critical))
        assert own == pytest.approx(other, rel=0.05), name


def test_too_few_tasks_tell_nothing(measured):
    few = [replace(measured[0], records=measured[0].records[:4], last=3)]
    assert not {"hop_us", "data_hop_us", "pair_us"} & {one.name for one in fit(few)}


def test_several_models_count_in_parts_of_their_tokens(measured):
    """A model a hundred times as slow has a hundredth of the say."""
    slow = [
        replace(one, us=100 * one.us, records=[replace(r, ready=r.ready + 1.0) for r in one.records])
        for one in measured
    ]
    alone, both = ({one.name: one.value for one in fit(steps)} for steps in (measured, [*measured, *slow]))
    assert both["norm_hop_us"] == pytest.approx(alone["norm_hop_us"] + 1.0 / 101, abs=0.005)


def test_the_table(measured):
    found = fit(measured)
    text = page(found, 0.5, cost_model("h100"))
    (norm,) = (one for one in found if one.name == "norm_hop_us")
    was = cost_model("h100").norm_hop_us
    assert re.search(rf"^norm_hop_us +{was:.3f} +{norm.value / 2:.3f} +{norm.value:.3f} ", text, re.MULTILINE)


def test_what_samples_do_not_tell_apart_stays_near_what_is_known():
    groups = [[Sample((2, 2, 0), 4.0)] * 9, [Sample((4, 4, 0), 8.0)] * 3]
    first, second, third = fitted(groups, [1.5, 0.5, 7.0])
    assert first + second == pytest.approx(2.0, abs=0.01)
    assert first == pytest.approx(1.5, abs=0.05) and third == pytest.approx(7.0)


def test_no_piece_takes_less_than_nothing():
    found = fitted([[Sample((1, 0), 3.0)], [Sample((1, 1), 2.0)]], [1.0, 1.0])
    assert found[1] == 0.0 and 2.0 < found[0] < 3.0
