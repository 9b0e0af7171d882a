"""What the loaders asked memory for: copies by the clock of the tasks, rates, and whose they are."""

from __future__ import annotations

import json

import numpy as np
import pytest
from synthetic import CYCLES_PER_US, times_of

from mpk_spec.planner import plan
from mpk_spec.planner.simulate import simulate
from mpk_spec.profiler.chrome import chrome_trace
from mpk_spec.profiler.clock import common_clock
from mpk_spec.profiler.report import page, profile_of
from mpk_spec.profiler.stream import rate_of, rates
from mpk_spec.runtime.cuda_probe import COPIES
from mpk_spec.schema import load_spec

CHUNK = 4096


@pytest.fixture(scope="module")
def simulation():
    return simulate(plan(load_spec("qwen3"), size="tiny", target="h100", context=256), context=128)


def copies_every(raw: np.ndarray, us: float, until: float = np.inf) -> np.ndarray:
    """`COPIES`, in no order: SMs ask for a chunk every `us` from their first task to their last, or to `until`."""
    made = np.zeros((raw.shape[1], 4096), COPIES)
    for sm in range(raw.shape[1]):
        there = raw["signalled"][:, sm] != 0
        begin, end = int(raw["asked"][:, sm][there].min()), int(raw["signalled"][:, sm][there].max())
        count = int(min((end - begin) / CYCLES_PER_US, until) / us)
        clocks = begin + (np.arange(count) * us * CYCLES_PER_US).astype(np.int64)
        places = np.random.default_rng(sm).permutation(4096)[:count]
        made["clock"][sm, places], made["bytes"][sm, places] = clocks & 0xFFFFFFFF, CHUNK
    return made


def test_copies_are_set_between_the_tasks_of_their_sm(simulation):
    raw = times_of(simulation, tick_ns=1)
    later = 2**32 - raw["asked"][0, 3, 0, 0] % 2**32 - 1000  # the lower half of that clock wraps at once
    for name in ("asked", "ready", "seen", "opened", "computed", "stored", "signalled"):
        raw[name][:, 3][raw[name][:, 3] != 0] += later
    times = common_clock(raw, copies_every(raw, 0.5))
    assert times.copies.at.min() == pytest.approx(np.nanmin(times.asked), abs=0.01)
    assert np.nanmax(times.signalled) - 1.01 < times.copies.at.max() <= np.nanmax(times.signalled)
    first = float(np.nanmin(times.asked, (0, 2, 3)).max()) + 0.5  # all SMs have begun, and none has ended
    last = float(np.nanmax(times.signalled, (0, 2, 3)).min()) - 2.0
    assert last - first > 20
    inside = rate_of(times, first, last)
    whole = raw.shape[1] * CHUNK / 0.5 / 1e3
    assert inside == pytest.approx(np.full(len(inside), whole), rel=0.02)
    assert rate_of(times.shifted(5.0), first - 5, first - 3) == pytest.approx(
        rate_of(times, first, first + 2), rel=0.02
    )


@pytest.mark.parametrize("part", [1.0, 0.25])
def test_what_memory_could_have_brought_besides(simulation, part):
    raw = times_of(simulation, steps=12)
    whole = raw.shape[1] * CHUNK / 0.5 / 1e3
    found = rates(common_clock(raw, copies_every(raw, 0.5 / part)), simulation.step, whole)
    assert {r.name for r in found} <= {g.name for t in simulation.step.templates for g in t.groups}
    assert sum(r.us for r in found) == pytest.approx(simulation.us, abs=1.0)
    most = sum(r.floor_us for r in found) / sum(r.us for r in found)
    assert most == pytest.approx(part, rel=0.1)
    assert sum(r.spare_us for r in found) / sum(r.us for r in found) == pytest.approx(1 - part, abs=0.1)


def test_an_operator_without_copies_leaves_all_to_spare(simulation):
    raw = times_of(simulation, steps=2)
    times = common_clock(raw, copies_every(raw, 0.5, until=1.0))  # all of them in the step before the first that counts
    found = rates(times, simulation.step, 4000.0)
    assert all(r.floor_us == 0 and r.spare_us == pytest.approx(r.us) for r in found)


def test_the_page_and_the_trace_show_it(simulation):
    raw = times_of(simulation)
    times = common_clock(raw, copies_every(raw, 0.5))
    profile = profile_of(times, simulation)
    shown = page(profile)
    assert "memory, of 3150 GB/s" in shown and shown.rstrip().splitlines()[-1].startswith("token")
    assert {r["name"] for r in profile.data()["memory"]} == {r.name for r in profile.rates}
    events = json.loads(chrome_trace(simulation.plan, simulation.step, [times]))["traceEvents"]
    counters = [e for e in events if e["ph"] == "C"]
    assert len(counters) > 2 * simulation.us and all(e["args"]["GB/s"] >= 0 for e in counters)
    part = json.loads(chrome_trace(simulation.plan, simulation.step, [times], layer=1))["traceEvents"]
    assert 0 < sum(e["ph"] == "C" for e in part) < len(counters)


def test_without_copies_nothing_is_said(simulation):
    profile = profile_of(common_clock(times_of(simulation)), simulation)
    assert profile.rates == [] and profile.data()["memory"] == []
    assert "GB/s, while" not in page(profile)


def test_no_copies_at_all(simulation):
    raw = times_of(simulation)
    times = common_clock(raw, np.zeros((raw.shape[1], 8), COPIES))
    assert len(times.copies.at) == 0 and rates(times, simulation.step, 4000.0) == []
