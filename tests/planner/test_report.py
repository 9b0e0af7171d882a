from __future__ import annotations

import re
from dataclasses import replace

import pytest
import shapes

from mpk_spec.planner import plan as make_plan
from mpk_spec.planner.diff import diff
from mpk_spec.planner.plan import Node
from mpk_spec.planner.report import explain, gb, operators, pin, size, summary, table
from mpk_spec.planner.simulate import simulate
from mpk_spec.planner.verify import verify
from mpk_spec.schema import load_spec
from mpk_spec.tuner.space import with_rules


@pytest.fixture(scope="module")
def tiny():
    return shapes.make(shapes.TINY, target="cpu", context=64)


def planned(**request):
    return make_plan(load_spec("qwen3"), **{"size": "tiny", "target": "cpu", "verified": False, **request})


def test_a_table_is_aligned():
    shown = table(("name", "us"), [("qkv", 1.5), ("o_add_long", 12)], frozenset({"name"}))
    assert shown == "name         us\n---------------\nqkv         1.5\no_add_long   12"


@pytest.mark.parametrize(
    ("count", "shown"), [(12, "12 bytes"), (16384, "16 KiB"), (3 << 20, "3 MiB"), (1.5 * (1 << 30), "1.5 GiB")]
)
def test_sizes_for_people(count, shown):
    assert size(count) == shown


def test_bytes_read_are_in_powers_of_ten():
    assert [gb(n) for n in (15136194560, 1.5e6, 2500)] == ["15.136 GB", "1.500 MB", "2.500 kB"]


def test_operators_of_a_block_are_shown_together():
    group = shapes.make(shapes.TINY).steps["decode"].templates[0].groups[0]
    names = ("x", "attention.h", "attention.q", "attention.a.merge", "mlp.out")
    group = replace(group, nodes=tuple(Node(n, "linear", (), n) for n in names))
    assert operators(group) == "x attention.(h q a.merge) mlp.out"


def test_the_header_says_what_was_asked_and_what_it_costs(tiny):
    simulation = simulate(tiny)
    lines = summary(tiny, simulation).splitlines()
    assert lines[0] == "by-hand test on the CPU reference (cpu): tp 1, batch 1, context 64"
    assert lines[1] == "decode step: 4 stages, 65 tasks, 17 events on 4 SMs, ring 176 KiB in chunks of 16 KiB"
    assert lines[2] == f"reads {gb(simulation.weight_bytes)} of weights and {gb(simulation.kv_bytes)} of KV per step"
    assert lines[3].startswith(f"predicted {simulation.ms:.3f} ms per step with 64 positions in the cache, ")


def test_fusions_that_rules_leave_out_are_said():
    rules = {"o_add": {"fuse": False}, "attend": {"fuse": ["attention.cache", "attention.a"]}}
    made = make_plan(with_rules(load_spec("qwen3"), rules), size="tiny", target="h100", context=64, verified=False)
    line = summary(made, simulate(made)).splitlines()[1]
    assert line == "without fusions: attend but for attention.cache and attention.a, o_add"
    explained = explain(made).splitlines()
    assert "  fusion o_add: left out, as a rule says" in explained
    assert "  fusion attend: of it only attention.cache + attention.a, as a rule says" in explained
    assert "  o_add: {fuse: false}" in explained
    assert any(s.startswith("  attend: ") and s.endswith("fuse: [attention.cache, attention.a]}") for s in explained)
    assert "without fusions" not in summary(planned(), simulate(planned()))


def test_every_group_has_a_row_and_every_stage_a_table(tiny):
    shown = summary(tiny, simulate(tiny))
    stages = re.findall(r"^stage .*", shown, re.M)
    assert stages == ["stage first, layer 0", "stage layer, layers 1-2", "stage head"]
    rows = [line.split() for line in shown.splitlines() if line.startswith("gate_up ")]
    assert rows[0][1:9] == ["linear", "4x1x1", "384x1x1", "4", "1", "1", "1", "static"]
    assert rows[0][11] == f"{2 * 512 * 128 / 1e6:.1f}"  # MB


def test_balance_and_buffers_and_proof(tiny):
    proof = verify(tiny)
    shown = summary(tiny, simulate(tiny), proof)
    assert re.search(r"^bytes per SM: \d+\.\d+ to \d+\.\d+ MB, mean \d+\.\d+ \(the fullest has ", shown, re.M)
    assert re.search(r"^kv +3x1x64x2x2x32 +bf16 +cuda +- +49152$", shown, re.M)
    assert re.search(r"^att +256 +bf16 +cuda +\d+ +512$", shown, re.M)
    assert shown.endswith(proof.summary() + "\n")


def test_buffers_that_share_bytes_are_named(tiny):
    at = tiny.tensors["qkv"].offset
    moved = replace(tiny, tensors={**tiny.tensors, "act": replace(tiny.tensors["act"], offset=at)})
    rows = {line.split()[0]: line for line in summary(moved, simulate(moved)).splitlines() if " bf16 " in line}
    assert rows["qkv"].endswith("  act") and rows["act"].endswith("  qkv")
    assert not rows["y"].endswith("qkv")


def test_a_second_prediction_with_an_emptier_cache(tiny):
    shown = summary(tiny, simulate(tiny), None, simulate(tiny, context=10))
    assert "with 64 positions in the cache" in shown and "with 10 positions in the cache" in shown


def test_explain_gives_notes_and_schedule():
    shown = explain(planned())
    assert "  fusion qkv: applied, rmsnorm + linear + linear + linear\n" in shown
    assert re.search(r"^  qkv: \{grid: \[\d+, 1, 1\], block: \[384, 1, 1\], ", shown, re.M)
    loader = next(line for line in pin(planned()).splitlines() if '"*"' in line).strip()
    assert f"  {loader}\n" in shown and "in_flight_looking" in loader


def with_schedule(text, schedule):
    """The spec's text with its schedule replaced."""
    return re.sub(r"^schedule:.*?\n(?=\S)", schedule, text, flags=re.M | re.S)


@pytest.mark.parametrize(
    "request_",
    [{"size": "8b", "target": "h100"}, {"size": "0.6b", "target": "h200", "tp": 2, "batch": 4},
     {"size": "tiny", "target": "cpu", "context": 100}],
)  # fmt: skip
def test_a_pinned_schedule_gives_the_same_plan(request_):
    spec = load_spec("qwen3")
    plan = make_plan(spec, verified=False, **request_)
    pinned = load_spec(spec.path, text=with_schedule(spec.path.read_text(), pin(plan)))
    assert pinned.schedule != spec.schedule
    assert make_plan(pinned, verified=False, **request_).to_json() == plan.to_json()


def test_a_pin_is_for_what_was_asked(tiny):
    assert pin(tiny).splitlines()[:5] == [
        "schedule:",
        "  - when: {target: cpu, size: test, tp: 1, batch: 1}",
        "    set:",
        '      "*": {weight_chunk: 16384, order: balanced, in_flight: 49152, in_flight_looking: 49152, '
        "prefetch: 131072, crossing: event}",
        "      qkv: {grid: [4, 1, 1], block: [384, 1, 1], launch: static}",
    ]


def test_steps_that_differ_are_pinned_apart(tiny):
    template = tiny.steps["decode"].templates[1]
    other = replace(template, groups=(replace(template.groups[0], launch="dynamic"), *template.groups[1:]))
    step = replace(tiny.steps["decode"], kind="prefill", templates=(other,))
    shown = pin(replace(tiny, steps={**tiny.steps, "prefill": step}))
    assert "  - when: {target: cpu, size: test, tp: 1, batch: 1, step: decode}\n" in shown
    assert "  - when: {target: cpu, size: test, tp: 1, batch: 1, step: prefill}\n" in shown
    assert "      qkv: {grid: [4, 1, 1], block: [384, 1, 1], launch: dynamic}\n" in shown


def test_the_same_plans_do_not_differ(tiny):
    assert diff(tiny, shapes.make(shapes.TINY, target="cpu", context=64)) == "the plans are the same\n"


def test_differences_are_told_by_group_and_field(tiny):
    wider = shapes.make(replace(shapes.TINY, inter=512, kv_splits=1), target="cpu", ring=64 * 1024, context=64)
    lines = diff(tiny, wider).splitlines()
    assert lines[0] == "ring_bytes: 180224 -> 65536"
    assert "decode attend: grid 2x2x1 -> 2x1x1, kv_splits 2 -> 1, tasks 4 -> 2, waits 4 -> 2" in lines
    assert "decode gate_up: bytes 131072 -> 262144" in lines
    assert "buffer act: shape 256 -> 512, bytes 512 -> 1024" in lines
    assert any(re.fullmatch(r"decode predicted: \d\.\d{3} -> \d\.\d{3} ms \([+-]\d+\.\d%\)", line) for line in lines)
    assert any(line.startswith("decode bytes per step: ") for line in lines)


def test_groups_and_steps_that_only_one_plan_has(tiny):
    step = tiny.steps["decode"]
    renamed = replace(step.templates[2].groups[0], name="logits")
    templates = (*step.templates[:2], replace(step.templates[2], groups=(renamed, step.templates[2].groups[1])))
    other = shapes.with_step(tiny, templates=templates)
    other = replace(other, steps={**other.steps, "verify": step}, notes=("new",))
    lines = diff(tiny, other).splitlines()
    assert "decode head: gone (head)" in lines and "decode logits: new (head)" in lines
    assert "verify: only in the second" in lines and "note: + new" in lines


def test_only_the_order_differs(tiny):
    template = tiny.steps["decode"].templates[2]
    queues = (template.queues[1], template.queues[0], *template.queues[2:])
    loads = (template.loads[1], template.loads[0], *template.loads[2:])
    swapped = replace(template, queues=queues, loads=loads)
    other = shapes.with_step(tiny, templates=(*tiny.steps["decode"].templates[:2], swapped))
    assert diff(tiny, other) == "only the order of tasks or their events differ\n"
