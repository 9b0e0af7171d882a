"""What a recorded trace is turned into, from synthetic records: no GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from profiler.synthetic import times_of

from mpk_spec.errors import UserError
from mpk_spec.planner import plan
from mpk_spec.planner.cost import cost_model, look_us
from mpk_spec.planner.simulate import simulate
from mpk_spec.profiler.chrome import chrome_trace
from mpk_spec.profiler.clock import PHASES, common_clock
from mpk_spec.profiler.measured import measured_steps
from mpk_spec.profiler.report import page, profile_of
from mpk_spec.runtime.cuda_probe import TIMES
from mpk_spec.schema import load_spec


@pytest.fixture(scope="module")
def simulation():
    return simulate(plan(load_spec("qwen3"), size="tiny", target="h100", context=128, verified=False))


@pytest.fixture(scope="module")
def times(simulation):
    return common_clock(times_of(simulation))


@pytest.mark.parametrize(("tick", "within"), [(1, 0.01), (32, 0.05), (1024, 1.2)])
def test_all_clocks_become_one(simulation, tick, within):
    found = common_clock(times_of(simulation, tick_ns=tick))
    first = simulation.records[simulation.first :]
    zero = min(r.free for r in first)
    for ran in first[:: max(1, len(first) // 40)]:
        stage = ran.stage - simulation.warm
        template = simulation.step.templates[simulation.step.stages[stage].template]
        at = (1, ran.sm, stage, list(template.queues[ran.sm]).index((ran.group, ran.task)))
        assert found.signalled[at] == pytest.approx(ran.done - zero + simulation.us, abs=within)


def test_a_coarse_timer_is_averaged_over_neighbours():
    """2000 tasks of 1 us each on one SM, and a timer of 1024 ns: the ramp comes out straight."""
    raw = np.zeros((1, 1, 2000, 1), TIMES)
    at = np.arange(2000.0)
    raw["global_ns"][0, 0, :, 0] = (at * 1e3).astype(np.uint64) // 1024 * 1024
    for name in ("asked", "ready", "opened", "computed", "stored", "signalled"):
        raw[name][0, 0, :, 0] = 5000 + at * 1755
    steps = np.diff(common_clock(raw).asked[0, 0, :, 0])
    assert np.abs(steps - 1).max() < 0.15


def test_phases_add_up(times):
    phases = times.phases()
    whole = times.signalled - times.asked
    there = np.isfinite(whole)
    assert len(phases) == len(PHASES)
    assert np.allclose(phases.sum(0)[there], whole[there])
    assert (phases[:, there] >= -1e-3).all()


def test_a_measured_step_is_what_was_simulated(simulation, times):
    steps = measured_steps(times, simulation)
    assert len(steps) == 2
    for step in steps:
        assert step.us == pytest.approx(simulation.us, abs=0.1)
        assert len(step.records) == len(simulation.records) - simulation.first
        assert sum(step.critical.values()) == pytest.approx(step.us, abs=0.1)
        templates = simulation.step.templates
        # the first wait of the one reaches into the step before, where the other's signal ends
        apart = {templates[0].groups[0].name, templates[-1].groups[-1].name}
        for (name, what), us in simulation.critical.items():
            if name not in apart:
                assert step.critical.get((name, what), 0.0) == pytest.approx(us, abs=0.5), (name, what)


def test_the_path_follows_the_last_signal(simulation):
    """One task of a middle stage takes 50 us longer in the second step, more than is left of it: it ends with it."""
    raw = times_of(simulation, steps=2)
    late = 50_000 * 1755 // 1000
    step = simulation.step
    sm, group = next((sm, q[0][0]) for sm, q in enumerate(step.templates[1].queues) if q)
    for name in ("stored", "signalled"):
        raw[name][1:, sm, 1, 0] += late
    name = step.templates[1].groups[group].name
    before = measured_steps(common_clock(times_of(simulation, steps=2)), simulation)[0].critical[name, "work"]
    after = measured_steps(common_clock(raw), simulation)[0]
    assert after.critical[name, "work"] > before + 40


@pytest.mark.parametrize(("name", "later_us", "sooner_us"), [("stored", 0.5, 0.5), ("signalled", 50.0, 0.0)])
def test_values_count_when_they_are_stored_not_when_that_is_signalled(simulation, name, later_us, sooner_us):
    raw = times_of(simulation, steps=2)
    late, sm, place = _place(simulation, "attend", 1)
    raw[name][:, sm, 1, place] += int(later_us * 1755)
    step = measured_steps(common_clock(raw), simulation)[0]
    looked = {step.group_of(r).name for r in step.records if r.stage == 1 and r.by == "data"}
    assert looked >= {"attend", "o_add", "gate_up", "down_add"}
    ran = next(r for r in step.records if (r.stage, step.group_of(r).name, r.task) == (1, "o_add", 0))
    group = step.group_of(ran)
    look = look_us(step.plan, group, group.tasks[0], step.cost, step.context)
    assert ran.by == "data" and ran.start - step.before(ran) == pytest.approx(look - sooner_us, abs=0.1)
    cause = step.records[ran.after]
    assert cause.group == late
    if name == "stored":
        assert cause.task == 1  # of those that ended at once


def _place(simulation, name, task):
    """The group's number in stage 1, and the task's SM and place there."""
    template = simulation.step.templates[simulation.step.stages[1].template]
    g = next(n for n, group in enumerate(template.groups) if group.name == name)
    return next((g, sm, queue.index((g, task))) for sm, queue in enumerate(template.queues) if (g, task) in queue)


def test_a_task_did_not_wait_for_what_was_stored_after_it_had_seen_all(simulation):
    """As an attention's part that has no positions, which is not read."""
    raw = times_of(simulation, steps=2)
    g, sm, place = _place(simulation, "o_add", 0)

    def found():
        step = measured_steps(common_clock(raw), simulation)[0]
        return next(r for r in step.records if (r.stage, r.group, r.task) == (1, g, 0))

    assert found().by == "data"
    raw["seen"][:, sm, 1, place] = raw["ready"][:, sm, 1, place] + 10
    assert found().by == "queue" and found().start == pytest.approx(found().free, abs=0.01)


def test_looking_for_values_is_a_phase_of_its_own(simulation, times):
    looks, signal = (times.phases()[PHASES.index(name), 1] for name in ("wait values", "signal"))
    for sm, queue in enumerate(simulation.step.templates[1].queues):
        for place in range(len(queue)):
            at = sm, 1, place
            assert looks[at] == pytest.approx(times.seen[(1, *at)] - times.ready[(1, *at)])
            assert looks[at] > 0.5 and signal[at] == pytest.approx(simulation.cost.signal_us, abs=0.01)
    profile = profile_of(times, simulation)
    row = next(r for r in profile.rows if (r.stage, r.name) == (simulation.step.templates[1].name, "qkv"))
    on_path = sum(us for phase, us in row.mean.items() if phase != "signal")
    assert row.share_us == pytest.approx(on_path * row.tasks * row.stages / simulation.plan.num_sms)


def test_the_report_names_every_operator_and_marks_what_differs(simulation, times):
    profile = profile_of(times, simulation)
    text = page(profile)
    for template in simulation.step.templates:
        for group in template.groups:
            assert f" {group.name} " in text
    assert "differs" not in text.split("\n\n")[0]
    assert sum(c.us for c in profile.critical) == pytest.approx(profile.us, rel=0.01)
    assert sum(r.share_us for r in profile.rows) + profile.between_us == pytest.approx(profile.us)
    slower = simulate(simulation.plan, cost=replace(cost_model("h100"), signal_us=3.0))
    other = profile_of(times, slower)
    assert "differs by more than 5 %" in page(other)
    assert any(c.differs for c in other.critical)


def test_the_data_is_json(simulation, times):
    data = json.loads(json.dumps(profile_of(times, simulation).data()))
    assert len(data["us_per_token"]) == 2
    assert {row["name"] for row in data["rows"]} == {g.name for t in simulation.step.templates for g in t.groups}


def test_the_trace_has_every_task_of_every_step(simulation, times):
    events = json.loads(chrome_trace(simulation.plan, simulation.step, [times]))["traceEvents"]
    tasks = [e for e in events if e.get("cat") == "task"]
    step = simulation.step
    count = sum(len(g.tasks) for s in step.stages for g in step.templates[s.template].groups)
    assert len(tasks) == 3 * count
    assert {"step", "stage", "waits", "looks_for", "data_wait_us"} <= tasks[0]["args"].keys()
    assert {e["name"] for e in events if e.get("cat") == "phase"} >= {"looks for values", "compute", "epilogue"}
    signals = [e for e in events if e.get("cat") == "signal"]
    assert len(signals) == len(tasks)
    for sm in {e["tid"] for e in signals}:
        own = [e for e in signals if e["tid"] == sm]
        assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-3 for a, b in pairwise(own))
    assert {e["tid"] for e in tasks} <= set(range(132))


def test_what_cannot_be_a_profile(simulation):
    with pytest.raises(UserError, match="the profile is empty"):
        common_clock(np.zeros((2, 1, 1, 1), TIMES))
    with pytest.raises(UserError, match="1 steps were recorded, at least 2 are needed"):
        measured_steps(common_clock(times_of(simulation, steps=1)), simulation)
