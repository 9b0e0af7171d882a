from __future__ import annotations

import time
from dataclasses import replace
from functools import cache

import pytest
import shapes
from hypothesis import given, settings
from hypothesis import strategies as st

from mpk_spec.errors import UserError
from mpk_spec.planner import plan as make_plan
from mpk_spec.planner.cost import cost_model, look_us
from mpk_spec.planner.plan import Wait
from mpk_spec.planner.simulate import simulate
from mpk_spec.schema import load_spec

KIB = 1024


def predicted(plan, context=128, **constants):
    return simulate(plan, context=context, cost=replace(cost_model(plan.target), **constants))


@cache
def small(ring=176 * KIB, layers=4):
    return shapes.make(replace(shapes.LLAMA_1B, layers=layers, vocab=4096), ring=ring)


# A hand-written kernel of these shapes was measured (H100, context 128, no tensor cores, naive attention that took a
# block 5 us; workers signalled themselves); with its constants the simulation must find its times.
MEASURED_8B = {
    "signaller": False, "consume_gbps": 36.0, "pair_us": 0.0, "kept_us": 0.0, "turn_us": 0.0, "block_us": 0.0,
    "reduce_us": 0.4, "attend_us": 0.0, "kv_block_us": 5.2, "kv_pair_us": 10.4,
}  # fmt: skip
NO_ATTENTION = {
    **MEASURED_8B,
    "kv_block_us": 0.0,
    "kv_pair_us": 0.0,
    "attend_us": -3.06,
}  # as long as its other costs and one hop


@pytest.mark.parametrize(
    ("shape", "ring", "constants", "measured"),
    [
        ("QWEN3_8B", 172, MEASURED_8B, 5.30),
        ("QWEN3_8B", 98, MEASURED_8B, 5.51),
        ("QWEN3_8B", 172, NO_ATTENTION, 5.00),
        ("QWEN3_8B", 172, {**NO_ATTENTION, "hop_us": -1e3}, 4.87),  # no event waits
        ("LLAMA_1B", 172, {**MEASURED_8B, "consume_gbps": 27.0}, 1.10),
        ("LLAMA_1B", 172, {**NO_ATTENTION, "consume_gbps": 27.0}, 1.00),
        ("LLAMA_1B", 172, {**NO_ATTENTION, "consume_gbps": 27.0, "hop_us": -1e3}, 0.93),
    ],
)
def test_finds_what_was_measured(shape, ring, constants, measured):
    plan = shapes.make(getattr(shapes, shape), ring=ring * KIB)
    assert predicted(plan, **constants).ms == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize(("shape", "low", "high"), [("QWEN3_8B", 4.95, 5.3), ("LLAMA_1B", 0.83, 1.0),
                                                    ("QWEN3_06B", 0.6, 0.9)])  # fmt: skip
def test_models_of_all_sizes(shape, low, high):
    found = predicted(shapes.make(getattr(shapes, shape)))
    assert low < found.ms < high
    assert found.percent == pytest.approx(100 * found.floor_ms / found.ms) and found.percent < 100


def test_reads_every_weight_once():
    s = shapes.QWEN3_8B
    per_layer = s.hidden * (s.heads + 2 * s.kv_heads) * s.head_dim + s.hidden * s.heads * s.head_dim
    per_layer += 3 * s.hidden * s.inter
    found = predicted(shapes.make())
    assert found.weight_bytes == 2 * (s.layers * per_layer + s.vocab * s.hidden)
    assert found.kv_bytes == 2 * 2 * 128 * s.layers * s.kv_heads * s.head_dim
    assert found.floor_ms == pytest.approx((found.weight_bytes + found.kv_bytes) / 3150e6)


def test_same_plan_same_prediction():
    assert simulate(small()).records == simulate(small()).records


def test_a_long_model_takes_seconds_at_most():
    plan = shapes.make(replace(shapes.QWEN3_8B, layers=80))
    started = time.process_time()
    found = simulate(plan)
    assert len(found.records) > 45_000
    assert time.process_time() - started < 3  # 0.5 s on a free core


def test_the_critical_path_is_the_whole_step():
    found = predicted(shapes.make())
    assert sum(found.critical.values()) == pytest.approx(found.us)
    assert {name for name, _ in found.critical} >= {"qkv", "o_add", "gate_up", "down", "head", "sample"}
    assert found.critical["gate_up", "data"] > found.critical["gate_up", "hop"] > 0


def test_tasks_of_an_sm_follow_one_another():
    found = simulate(small())
    last = {}
    for ran in found.records:
        assert ran.free <= ran.start <= ran.ready <= ran.consumed <= ran.stored <= ran.done
        assert ran.free == pytest.approx(last.get(ran.sm, ran.free))
        assert ran.stalled >= -1e-9
        last[ran.sm] = ran.stored


def test_nobody_starts_before_the_signals_it_waits_for():
    found = simulate(small())
    done = {}
    for ran in found.records:
        done.setdefault((ran.stage, found.group_of(ran).name), []).append(ran.done)
    hop = found.cost.hop_us
    before = {"attend": "qkv", "o_add": "attend", "gate_up": "o_add", "down": "gate_up", "sample": "head"}
    for ran in found.records:
        name = found.group_of(ran).name
        if name in before:
            assert ran.start >= max(done[ran.stage, before[name]]) + hop - 1e-9


@cache
def crossing():
    """A plan whose layers' values cross as data."""
    return make_plan(load_spec("smollm2"), size="135m", target="h100", context=256, verified=False)


def test_whoever_looks_at_values_has_them_a_hop_after_they_are_stored():
    found = predicted(crossing())
    stored = {(r.stage, found.group_of(r).name, r.task): r.stored for r in found.records}
    before = {"attend": "qkv", "o_add": "attend", "gate_up": "o_add", "down_add": "gate_up"}
    kinds = {"attend": "attend", "o_add": "merge", "gate_up": "norm", "down_add": "plain"}
    looked = 0
    for ran in found.records:
        name, task = found.group_of(ran).name, found.group_of(ran).tasks[ran.task]
        if name not in before:
            continue
        template = found.step.templates[found.stages[ran.stage].template]
        maker = next(g for g in template.groups if g.name == before[name])
        last = max(stored[ran.stage, maker.name, t.index] for t in maker.tasks if read_by(task, t))
        look = look_us(found.plan, found.group_of(ran), found.group_of(ran).tasks[ran.task], found.cost, 128)
        assert look >= found.cost.hop_of(kinds[name]) and ran.ready >= max(last, ran.free) + look - 1e-9
        if ran.by == "data":
            looked += 1
            assert ran.start == ran.ready and found.before(ran) >= last
    assert looked > 1000


def read_by(task, maker):
    spans = ((w, r) for w in maker.writes for r in task.reads if w.tensor == r.tensor)
    return any(w.lo < r.hi and r.lo < w.hi for w, r in spans)


def test_a_signal_that_nobody_waits_for_is_not_on_the_path():
    slow = {"signal_us": 3.0, "hop_us": 2.66}
    data, events = (predicted(p, **slow).us - predicted(p).us for p in (crossing(), by_events(crossing())))
    assert events > 30 * 5 * 3.9  # 150 hops
    assert data == 0


# of SmolLM2: down is the only plain one, once a layer; qkv and gate_up normalise; later the head does, and what samples
@pytest.mark.parametrize(
    ("hop", "in_layers"), [("data_hop_us", 1), ("norm_hop_us", 2), ("merge_hop_us", 1), ("attend_hop_us", 1)]
)
def test_slow_values_make_slow_steps(hop, in_layers):
    more = predicted(crossing(), **{hop: 3.5}).us - predicted(crossing(), **{hop: 2.5}).us
    assert more == pytest.approx(30 * in_layers + (hop in ("data_hop_us", "norm_hop_us")), abs=0.5)
    events = by_events(crossing())
    assert predicted(events, **{hop: 9.0}).us == predicted(events).us


def test_a_wide_row_takes_longer_to_look_at():
    assert predicted(crossing(), look_gbps=4.0).us > predicted(crossing()).us + 30 * 2


def test_steps_of_several_tokens_wait_for_events():
    step = crossing().steps["decode"]
    several = replace(crossing(), steps={"decode": replace(step, tokens=2)})
    assert not any(ran.by == "data" for ran in predicted(several).records)
    assert predicted(several, data_hop_us=9.0).us == predicted(several).us


def by_events(plan):
    """The plan with waits for data made waits for their events."""
    step = plan.steps["decode"]

    def marked(template):
        groups = [
            replace(g, tasks=tuple(replace(t, waits=tuple(replace(w, data=False) for w in t.waits)) for t in g.tasks))
            for g in template.groups
        ]
        return replace(template, groups=tuple(groups))

    return replace(plan, steps={"decode": replace(step, templates=tuple(map(marked, step.templates)))})


def test_the_loader_never_runs_further_ahead_than_the_ring():
    """Bytes consumed by the end of a task cannot have arrived faster than the ring and the stream allow."""
    plan = small(ring=64 * KIB)
    found = simulate(plan)
    cost = found.cost
    begun = {}
    for ran in found.records:
        size = found.group_of(ran).tasks[ran.task].load_bytes
        if size > plan.ring_bytes:
            even = size / (cost.sm_gbps * 1e3 * cost.catch_up * (1 + cost.spread))
            late = 1 - cost.chance_us / even**0.5
            assert ran.consumed - ran.ready >= (size - plan.ring_bytes) / size * even * late
        begun[ran.sm] = ran.ready


def test_groups_and_utilisation():
    found = predicted(shapes.make())
    layer = {g.name: g for g in found.groups if g.stage == "layer"}
    assert list(layer) == ["qkv", "attend", "o_add", "gate_up", "down"]
    assert {g.stages for g in layer.values()} == {35}
    assert layer["gate_up"].span_us > layer["down"].span_us > layer["attend"].span_us
    assert layer["gate_up"].stream_bytes == 2 * 24576 * 4096
    assert all(0.2 < u < 1 for u in found.utilisation) and len(found.utilisation) == 132


@pytest.mark.parametrize(
    "constants",
    [{"hop_us": 2.0}, {"signal_us": 3.0}, {"activation_us": 3.0}, {"consume_gbps": 20.0}, {"spread": 0.1},
     {"attend_us": 3.0}, {"start_us": 2.0}, {"reduce_us": 2.0}, {"pair_us": 2.0}, {"turn_us": 4.0}, {"block_us": 30.0},
     {"stream_gbps": 2000.0}, {"chance_us": 1.5}, {"kv_block_us": 3.0}, {"sample_us": 30.0}],
)  # fmt: skip
def test_every_constant_acts(constants):
    plan = shapes.make()
    assert predicted(plan, **constants).us > predicted(plan).us + 1


@pytest.mark.parametrize("constants", [{"kept_us": 1.0}, {"busy_look_bytes": 24e3}])
def test_so_do_those_of_small_tasks_and_of_values_that_cross_as_data(constants):
    """o_add and down_add have a tile or two a task, and a layer does not fit the ring."""
    plan = make_plan(load_spec("qwen3"), size="0.6b", target="h100", context=512, verified=False)
    assert predicted(plan, **constants).us > predicted(plan).us + 1


def test_so_does_that_of_rows_on_their_own():
    """Gemma has norms behind its products."""
    made = make_plan(load_spec("gemma3"), size="270m", target="h100", context=512, verified=False)
    assert predicted(made, row_op_us=30.0).us > predicted(made).us + 1


@settings(max_examples=15, deadline=None)
@given(small_ring=st.integers(2, 20), more=st.integers(1, 20))
def test_a_larger_ring_is_never_slower(small_ring, more):
    less, plenty = small(small_ring * 16 * KIB), small((small_ring + more) * 16 * KIB)
    assert predicted(plenty).us <= predicted(less).us * 1.002


@settings(max_examples=15, deadline=None)
@given(hop=st.floats(0, 5), more=st.floats(0.5, 5))
def test_slower_hops_make_slower_steps(hop, more):
    # at least ten hops lie between the events of two stages, none of them can hide all of it
    assert predicted(small(), hop_us=hop + more).us > predicted(small(), hop_us=hop).us


@settings(max_examples=10, deadline=None)
@given(layers=st.integers(1, 10), more=st.integers(1, 5))
def test_more_bytes_take_longer(layers, more):
    less, plenty = predicted(small(layers=layers)), predicted(small(layers=layers + more))
    assert plenty.bytes > less.bytes and plenty.us > less.us


def test_a_longer_context_takes_longer():
    plan = shapes.make(context=32768)
    times = [simulate(plan, context=c).us for c in (128, 4096, 32768)]
    assert times == sorted(times) and times[2] > times[0] + 36 * 30  # 42.6 us a layer were it all that streamed


def test_the_warm_up_does_not_matter(monkeypatch):
    found = predicted(shapes.make())
    monkeypatch.setattr("mpk_spec.planner.simulate.WARM_UP_STAGES", 100)
    assert predicted(shapes.make()).us == pytest.approx(found.us, rel=0.005)


def as_pool(plan, name):
    """The plan with one group claimed at run time by all SMs."""
    step = plan.steps["decode"]
    templates = []
    for t in step.templates:
        g = next((n for n, group in enumerate(t.groups) if group.name == name), None)
        if g is not None:
            entry = (g, -1)
            queues = [[*(e for e in q if e[0] < g), entry, *(e for e in q if e[0] > g)] for q in t.queues]
            loads = [tuple(e for e in q if e[0] != g) for q in t.loads]
            groups = [replace(x, launch="dynamic") if n == g else x for n, x in enumerate(t.groups)]
            t = replace(t, groups=tuple(groups), queues=tuple(map(tuple, queues)), loads=tuple(loads))
        templates.append(t)
    return shapes.with_step(plan, templates=tuple(templates))


def test_a_pool_gives_its_tasks_to_whoever_is_free():
    static, pool = predicted(small()), predicted(as_pool(small(), "gate_up"))
    claimed = [r for r in pool.records if pool.group_of(r).name == "gate_up"]
    wanted = [r for r in static.records if static.group_of(r).name == "gate_up"]
    assert sorted((r.stage, r.task) for r in claimed) == sorted((r.stage, r.task) for r in wanted)
    assert pool.weight_bytes == static.weight_bytes
    assert pool.us > static.us  # nobody can stream what nobody has claimed


def test_waiting_for_fewer_signals_is_waiting_less():
    plan = small()
    step = plan.steps["decode"]

    def hasty(template):
        groups = [
            replace(g, tasks=tuple(replace(t, waits=(Wait("gate_up.done", 1),)) for t in g.tasks))
            if g.name == "down" else g for g in template.groups
        ]  # fmt: skip
        return replace(template, groups=tuple(groups))

    early = shapes.with_step(plan, templates=tuple(map(hasty, step.templates)))
    waits = [next(g.event_us for g in predicted(p).groups if g.name == "down") for p in (early, plan)]
    assert waits[0] < waits[1] / 2


def test_signals_of_peers_take_longer():
    plan = small()
    step = plan.steps["decode"]

    def crossing(template):
        groups = [
            replace(g, tasks=tuple(replace(t, waits=tuple(replace(w, count=2 * w.count) if w.event == "attend.done"
                                                          else w for w in t.waits)) for t in g.tasks))
            for g in template.groups
        ]  # fmt: skip
        events = {e: n * (2 if e == "attend.done" else 1) for e, n in template.events.items()}
        return replace(template, groups=tuple(groups), events=events)

    peers = replace(shapes.with_step(plan, templates=tuple(map(crossing, step.templates))), tp=2)
    extra = predicted(peers, peer_hop_us=20.0).us - predicted(plan).us
    assert extra == pytest.approx(4 * (20 - 0.66), rel=0.25)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": "prefil"}, "this plan has no step 'prefil'\n  hint: known steps: decode"),
        ({"context": 513}, "a context of 513 positions\n  hint: this plan's cache holds 1 to 512"),
        ({"context": 0}, "a context of 0 positions\n  hint: this plan's cache holds 1 to 512"),
    ],
)
def test_requests_that_cannot_be_met(arguments, message):
    with pytest.raises(UserError) as error:
        simulate(small(), **arguments)
    assert str(error.value) == message


def test_queues_that_never_end_are_refused():
    plan = small()
    template = plan.steps["decode"].templates[0]
    stuck = replace(template, queues=(template.queues[0][::-1], *template.queues[1:]),
                    loads=(template.loads[0][::-1], *template.loads[1:]))  # fmt: skip
    with pytest.raises(UserError) as error:
        simulate(shapes.with_step(plan, templates=(stuck, *plan.steps["decode"].templates[1:])))
    assert str(error.value).startswith("stage 'first': SM 0 waits for ever before 'down' task ")


def test_a_loader_in_another_order_is_refused():
    plan = small()
    template = plan.steps["decode"].templates[0]
    wrong = replace(template, loads=(template.loads[0][::-1], *template.loads[1:]))
    with pytest.raises(UserError, match="stage 'first': SM 0 streams its tasks in another order than it runs them"):
        simulate(shapes.with_step(plan, templates=(wrong, *plan.steps["decode"].templates[1:])))
