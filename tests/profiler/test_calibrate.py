"""Constants come back out of times that were made with them. No GPU."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from profiler.synthetic import times_of

from mpk_spec.cli.tune import page
from mpk_spec.planner import plan
from mpk_spec.planner.cost import calibration_file, cost_model, read_calibration
from mpk_spec.planner.simulate import simulate
from mpk_spec.profiler.calibrate import fit, save
from mpk_spec.profiler.clock import common_clock
from mpk_spec.profiler.report import profile_of
from mpk_spec.schema import load_spec

# a GPU with slow events and fast arithmetic; consumption is the bottleneck, so that it shows
TRUE = {
    "hop_us": 0.9, "data_hop_us": 2.6, "reduce_us": 0.3, "signal_us": 0.5, "activation_us": 1.7, "consume_gbps": 15.0,
    "kv_block_us": 0.8, "row_op_us": 0.7,
}  # fmt: skip


@pytest.fixture(scope="module")
def made():
    return plan(load_spec("qwen3"), size="0.6b", target="h100", context=1024, verified=False)


@pytest.fixture(scope="module")
def measured(made):
    true = simulate(made, cost=replace(cost_model("h100"), **TRUE, chance=0.0))
    times = common_clock(times_of(true, steps=2))
    return times, profile_of(times, simulate(made)).steps


def test_constants_are_found(measured):
    found = {one.name: one for one in fit(*measured)}
    for name in TRUE.keys() - {"row_op_us"}:  # all its rows but one are in prologues and epilogues
        assert found[name].value == pytest.approx(TRUE[name], rel=0.15), name
        assert found[name].samples >= 8


def test_so_are_those_of_rows_on_their_own():
    """Gemma has norms behind its products."""
    made = plan(load_spec("gemma3"), size="270m", target="h100", context=512, verified=False)
    true = simulate(made, cost=replace(cost_model("h100"), **TRUE, chance=0.0))
    times = common_clock(times_of(true, steps=2))
    found = {one.name: one for one in fit(times, profile_of(times, simulate(made)).steps)}
    assert found["row_op_us"].value == pytest.approx(TRUE["row_op_us"], rel=0.15)


def test_the_planner_reads_what_was_saved(measured, made, tmp_path, monkeypatch):
    monkeypatch.setenv("MPK_SPEC_CACHE", str(tmp_path))
    calibration_file("h100").parent.mkdir(parents=True)
    calibration_file("h100").write_text(json.dumps({"refill_us": 0.6}))
    times, steps = measured
    path = save("h100", fit(times, steps), stream_gbps=3120.0)
    known = read_calibration("h100")
    assert path == calibration_file("h100")
    assert known["refill_us"] == 0.6 and known["stream_gbps"] == 3120.0
    before, after = simulate(made), simulate(made, cost=cost_model("h100", known))
    assert abs(after.us - steps[0].us) < 0.05 * steps[0].us < abs(before.us - steps[0].us)


def test_too_few_tasks_tell_nothing(measured):
    times, steps = measured
    few = [replace(steps[0], records=steps[0].records[:4])]
    assert "hop_us" not in {one.name for one in fit(times, few)}


def test_the_table(measured):
    text = page(fit(*measured), cost_model("h100"))
    assert "hop_us" in text and "0.660" in text
