"""Several ranks' records by one clock, and what their sums cost, from synthetic records: no GPU."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import pytest
from profiler.synthetic import times_of
from tiny_specs import child, spec_of

from mpk_spec.errors import UserError
from mpk_spec.planner import plan
from mpk_spec.planner.cost import cost_model, look_us
from mpk_spec.planner.simulate import simulate
from mpk_spec.profiler.chrome import AFTER_US, BEFORE_US, SIGNALS, WORK, chrome_trace, cut, process, write_trace
from mpk_spec.profiler.clock import common_clock
from mpk_spec.profiler.ranks import READING_US, align, exchanges
from mpk_spec.profiler.report import report
from mpk_spec.profiler.sums import predicted_sums, sums_of
from mpk_spec.schema import load_spec

COST = replace(cost_model("h100"), chance_us=0.0, spread=0.0, data_hop_us=0.68, norm_hop_us=1.05)


@pytest.fixture(scope="module", params=["data", "event"])
def crossing(request):
    return request.param


@pytest.fixture(scope="module")
def made(crossing):
    spec = child("qwen3", spec_of("qwen3").sizes["0.6b"].config, schedule=[{"set": {"*": {"crossing": crossing}}}])
    return plan(spec, size="tiny", target="h100", tp=2, context=256, verified=False)


@pytest.fixture(scope="module")
def simulation(made):
    return simulate(made, context=128, cost=COST)


def times(simulation):
    return common_clock(times_of(simulation, tick_ns=1))


@pytest.fixture(scope="module")
def alike(simulation):
    """Two ranks that do the same at the same time, the clock of rank 1 shows 250 us more."""
    one = times(simulation)
    return [one, one.shifted(-250.0)]


def test_what_the_ranks_exchange(simulation, crossing):
    step = simulation.step
    names = [step.templates[step.stages[e.stage].template].groups[e.group].name for e in exchanges(step)]
    layers = len(step.stages) - 1
    assert names.count("gate_up") == layers and names.count("qkv") == layers - 1
    assert names[-2:] == ["head", "next_ids"]
    assert {e.data for e in exchanges(step) if e.stage < layers} == {crossing == "data"}
    assert [e.data for e in exchanges(step) if e.stage == layers] == [False, crossing == "data"]  # head, next_ids
    across = next(e for e in exchanges(step) if e.stage == 1)
    assert across.sent == 0 and len(across.senders) == len(step.templates[0].groups[-1].tasks)


def test_clocks_are_set_side_by_side(simulation, alike):
    moved, clocks = align(alike, simulation.step)
    assert clocks.ahead == pytest.approx((0.0, 250.0), abs=0.02)
    assert clocks.within[1] == pytest.approx(COST.peer_hop_us, abs=0.05)
    assert moved[1].signalled[1, 0, 0, 0] == pytest.approx(moved[0].signalled[1, 0, 0, 0], abs=0.02)
    assert f"right within {clocks.within[1]:.2f} us" in clocks.says()


def test_clocks_are_never_surer_than_they_are_read(simulation, alike):
    """Values seen before they are marked as stored, as where ranks share a GPU."""
    soon = [
        replace(one, seen=one.seen - COST.peer_hop_us - 0.2, ready=one.ready - COST.peer_hop_us - 0.2) for one in alike
    ]
    _, clocks = align(soon, simulation.step)
    assert clocks.ahead[1] == pytest.approx(250.0, abs=0.02)
    assert clocks.within[1] == READING_US


def test_one_badly_read_clock_says_nothing(simulation, alike):
    for field in ("ready", "asked"):
        bad = getattr(alike[1], field).copy()
        bad[:, 3] -= 40.0
        alike = [alike[0], replace(alike[1], **{field: bad})]
    _, clocks = align(alike, simulation.step)
    assert clocks.ahead[1] == pytest.approx(250.0, abs=0.02)


def test_ranks_that_exchange_nothing_have_no_common_clock():
    alone = simulate(plan(load_spec("qwen3"), size="tiny", target="h100", context=128, verified=False))
    with pytest.raises(UserError, match="exchange nothing"):
        align([times(alone)] * 2, alone.step)


def look_of(simulation, name):
    group = next(g for t in simulation.step.templates[1:] for g in t.groups if g.name == name)
    return look_us(simulation.plan, group, group.tasks[0], COST, 128)


def test_a_sum_waits_for_the_way_between_the_ranks(simulation, alike, crossing):
    moved, _ = align(alike, simulation.step)
    sums = sums_of(moved, simulation, 0.0)
    assert [row.name for row in sums.rows] == ["gate_up", "qkv", "head", "next_ids"]
    assert [row.in_layers for row in sums.rows] == [True, True, True, False]
    assert [row.data for row in sums.rows] == [crossing == "data", crossing == "data", False, crossing == "data"]
    for row in sums.rows:
        assert row.later == pytest.approx(0.0, abs=0.02) and row.signal == pytest.approx(0.0, abs=0.02)
        look = look_of(simulation, row.name)
        assert row.way == pytest.approx(COST.peer_us + look if row.data else COST.peer_hop_us, abs=0.05)
        assert 0 <= row.beyond <= row.waited <= COST.peer_hop_us - COST.hop_us + 0.05
    assert sums.of_a_layer("waited") > COST.peer_hop_us - COST.hop_us  # two a layer
    assert sums.of_a_layer("beyond") == pytest.approx(
        sum(r.times * r.beyond for r in sums.rows[:3]) / (len(simulation.step.stages) - 1)
    )


def test_what_is_waited_for_weights_all_the_same_is_hidden(simulation, alike):
    moved = align(alike, simulation.step)[0]
    sums = sums_of(moved, simulation, 0.0)
    starved = [replace(t, waited=t.waited + 50.0) for t in moved]
    fed = [replace(t, waited=t.waited * 0.0) for t in moved]
    assert all(row.beyond == 0.0 for row in sums_of(starved, simulation, 0.0).rows)
    assert all(row.beyond == row.waited for row in sums_of(fed, simulation, 0.0).rows)
    assert [r.waited for r in sums_of(fed, simulation, 0.0).rows] == [r.waited for r in sums.rows]


def test_a_slow_peer_shows_as_later(made, simulation):
    """Rank 1's sums come 3 us later than rank 0's, though its clock is right."""
    fast = times(simulation)
    late = {name: getattr(fast, name).copy() for name in ("stored", "signalled")}
    senders = {(e.sent, at) for e in exchanges(simulation.step) for at in e.senders}
    for stage, (sm, place) in senders:
        for field in late.values():
            field[:, sm, stage, place] += 3.0
    waits = {e.stage: e for e in exchanges(simulation.step) if e.sent == e.stage}
    arrived = {name: getattr(fast, name).copy() for name in ("ready", "seen")}
    for e in waits.values():
        for sm, place in e.seen:
            arrived["seen" if e.data else "ready"][:, sm, e.stage, place] += 3.0
    sums = sums_of([replace(fast, **arrived), replace(fast, **arrived, **late)], simulation, 0.0)
    row = next(r for r in sums.rows if r.name == "gate_up")
    assert row.later == pytest.approx(1.5, abs=0.02)  # of the two ranks, one waits 3 us for the other
    assert row.waited > 1.0


def test_the_simulation_says_what_the_sums_of_a_layer_cost(made, simulation):
    far = simulate(made, context=128, cost=replace(COST, peer_hop_us=20.0))
    assert 0 < predicted_sums(simulation) < 2 * (COST.peer_hop_us - COST.hop_us) + 0.5
    assert predicted_sums(far) > 20


def test_the_report_and_the_trace_have_every_rank(simulation, alike, crossing):
    ranks, clocks, data, shown = report(alike, simulation)
    assert "the sums of a layer together, 2.0 waits: " in shown and "added up by" in shown
    assert ("as data" in shown.split("added up by")[1]) == (crossing == "data")
    assert clocks in shown
    _, phases, _, own, *_ = shown.split("\nranks: ")[1].splitlines()
    assert "wait values" in phases and "signal" not in phases  # which goes on beside the others: they add up to a token
    _, token, *parts = map(float, own.split())
    assert sum(parts[:-2]) == pytest.approx(token, abs=0.5)
    data = json.loads(json.dumps(data))
    assert len(data["ranks"]) == 2 and data["clocks"]["ahead"][1] == pytest.approx(250.0, abs=0.02)
    assert data["sums"]["layer_beyond_us"] <= data["sums"]["layer_waited_us"]
    trace = json.loads(chrome_trace(simulation.plan, simulation.step, ranks, clocks))
    events = trace["traceEvents"]
    assert trace["otherData"]["clocks"] == clocks
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    work = [process(rank, WORK) for rank in (0, 1)]
    assert [names[pid][:18] for pid in work] == ["rank 0, child-tiny", "rank 1, child-tiny"]
    assert [names[process(rank, SIGNALS)] for rank in (0, 1)] == ["rank 0, signals", "rank 1, signals"]
    of = {what: {e["pid"] for e in events if e.get("cat") == what} for what in ("task", "phase", "signal")}
    assert of == {"task": set(work), "phase": set(work), "signal": {process(rank, SIGNALS) for rank in (0, 1)}}
    starts = [min(e["ts"] for e in events if e.get("cat") == "task" and e["pid"] == pid) for pid in work]
    assert starts[0] == pytest.approx(starts[1], abs=0.02)


def test_one_layer_of_one_step_of_all_ranks(simulation, alike):
    one = [alike[0], alike[0].shifted(-0.5)]
    whole = json.loads(chrome_trace(simulation.plan, simulation.step, one, "clocks"))
    part = json.loads(chrome_trace(simulation.plan, simulation.step, one, "clocks", layer=1))
    assert part["otherData"]["clocks"] == "clocks"
    assert part["otherData"]["cut"].startswith("layer 1 of step 1 of child-tiny at tp 2, from 3 us before")
    whole, part = whole["traceEvents"], part["traceEvents"]
    assert [e for e in part if e["ph"] == "M"] == [e for e in whole if e["ph"] == "M"]

    def layer(events):
        found = [e for e in events if e.get("cat") == "task" and (e["args"]["step"], e["args"].get("layer")) == (1, 1)]
        return sorted(found, key=lambda e: (e["ts"], e["pid"], e["tid"]))

    before, after = layer(whole), layer(part)
    assert {e["pid"] for e in after} == {process(rank, WORK) for rank in (0, 1)}
    shift = before[0]["ts"] - BEFORE_US
    end = max(e["ts"] + e["dur"] for e in before) + AFTER_US
    assert [e["ts"] for e in after] == pytest.approx([e["ts"] - shift for e in before], abs=2e-3)
    assert [(e["name"], e["dur"], e["args"]) for e in after] == [(e["name"], e["dur"], e["args"]) for e in before]
    slices = [(e["ts"], e["ts"] + e["dur"]) for e in whole if e["ph"] == "X"]
    across = sum(a < edge < b for a, b in slices for edge in (shift, end))
    inside = sum(shift <= a and b <= end for a, b in slices)
    assert across > 0 and inside == sum(e["ph"] == "X" for e in part)
    assert cut(part, 1, 1) == part


def test_a_layer_that_the_model_lacks_is_not_cut_out(simulation, alike):
    with pytest.raises(UserError, match="child-tiny has no layer 28") as error:
        chrome_trace(simulation.plan, simulation.step, alike, layer=28)
    assert error.value.hint == f"its layers are 0 to {len(simulation.step.stages) - 2}"


def test_a_trace_is_compressed_if_its_name_says_so(tmp_path):
    for name, read in (("a.json.gz", gzip.decompress), ("a.json", bytes)):
        write_trace(tmp_path / name, '{"traceEvents": []}')
        assert read((tmp_path / name).read_bytes()) == b'{"traceEvents": []}'
