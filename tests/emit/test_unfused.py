"""Tasks of row operators on their own: they compile without a spill, and take the parts that the plan gives them."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_specs import child
from unfused import APART, WITHOUT, spec_without

from mpk_spec.emit import compiler
from mpk_spec.emit.program import ROW_TASKS, _program_dtype
from mpk_spec.emit.source import emit
from mpk_spec.errors import UserError
from mpk_spec.planner import plan
from mpk_spec.planner.targets import find_target

TASKS = {  # of each case, what it adds to the kernel; a type may serve several groups
    "embed": {"Embedded<": 1},
    "qkv": {"Embedded<": 1, "NormRows<": 1},
    "attend": {"NormedHeads<": 2, "RotatedHeads<": 2, "NoRope": 1},
    "o_add": {"Sum<": 2},  # the first layer has another residual
    "gate_up": {"NormRows<": 1, "Gated<Silu": 1},
    "down_add": {"Sum<": 1},
    "head": {"NormRows<": 1, "ArgmaxPartial<": 1},
}


def planned(case: str, target: str = "h100", tp: int = 1, verified: bool = True):
    return plan(spec_without(case), size="tiny", target=target, context=256, tp=tp, verified=verified)


def row_groups(made) -> list:
    groups = [g for t in made.steps["decode"].templates for g in t.groups]
    return [g for g in groups if g.task in ROW_TASKS and len(g.nodes) == 1]


@pytest.mark.parametrize("case", TASKS)
def test_what_stands_alone_gets_a_task_of_its_own(case):
    source = emit(planned(case)).source
    assert {name: source.count(name) for name in TASKS[case]} == TASKS[case]


@pytest.mark.parametrize("case", WITHOUT)
@pytest.mark.parametrize("target", ["h100", pytest.param("a100", marks=pytest.mark.exhaustive)])
def test_it_compiles_without_spills(case, target, tmp_path, monkeypatch):
    pytest.importorskip("cuda.core", reason="needs cuda-core and NVRTC: pip install mpk-spec[cuda]")
    monkeypatch.setenv("MPK_SPEC_CACHE", str(tmp_path))
    made = planned(case, target, verified=False)
    report = compiler.compile_kernel(made.name, emit(made).source, find_target(target).arch).report
    assert report.spill_bytes == 0
    assert report.registers <= 168


@pytest.mark.parametrize(("target", "tp"), [("a100", 1), ("h100", 2), ("b200", 1)])
def test_all_of_them_together_compile_elsewhere(target, tp, tmp_path, monkeypatch):
    pytest.importorskip("cuda.core", reason="needs cuda-core and NVRTC: pip install mpk-spec[cuda]")
    monkeypatch.setenv("MPK_SPEC_CACHE", str(tmp_path))
    made = planned("layers and head", target, tp, verified=False)
    report = compiler.compile_kernel(made.name, emit(made).source, find_target(target).arch).report
    assert report.spill_bytes == 0


@pytest.mark.parametrize("case", WITHOUT)
@pytest.mark.parametrize("tp", [1, 2])
def test_the_programs_cut_every_row_once(case, tp):
    """Of each group's entries, over all SMs: `Entry.lo` and `hi` cover the features of its result."""
    emitted = emit(planned(case, tp=tp))
    step, sizes = emitted.step, emitted.programs.sizes
    dtype = _program_dtype(len(step.templates), sizes.entries, sizes.loads, sizes.waits, sizes.signals)
    programs = np.frombuffer(emitted.programs.blob, dtype)
    seen = 0
    for t, template in enumerate(step.templates):
        found = [e for p in programs for e in p["entry"][p["queue_begin"][t] : p["queue_begin"][t + 1]]]
        for g, group in enumerate(template.groups):
            if group.task not in ROW_TASKS or len(group.nodes) > 1:
                continue
            parts = sorted((int(e["lo"]), int(e["hi"])) for e in found if e["group"] == g)
            assert [lo for lo, _ in parts] == [0, *(hi for _, hi in parts[:-1])]
            assert parts[-1][1] == group.nodes[0].width
            seen += 1
    assert seen


@pytest.mark.parametrize("case", WITHOUT)
def test_they_read_what_the_plan_says(case):
    """tasks/rows.cuh: a norm of rows looks at all of the row, everything else at the features that it makes."""
    for group in row_groups(planned(case)):
        node, widths = group.nodes[0], {}
        for task in group.tasks:
            assert [(s.tensor, s.lo, s.hi) for s in task.writes] == [(node.output, *task.out)]
            widths |= {s.tensor: (s.lo, s.hi) for s in task.reads}
            if node.op == "embedding":
                continue
            whole = node.op == "rmsnorm" and node.granule == node.width
            wanted = (0, node.width) if whole else task.out
            assert {(s.lo, s.hi) for s in task.reads} == {wanted}
            if node.granule in (32, 64, 128) and not whole:  # a warp computes a head
                assert all(edge % node.granule == 0 for edge in task.out)
        assert widths.keys() == set(node.inputs)


REFUSED = {
    "the cache": (
        {"fusions": {"attend": None}},
        "group 'attention.cache': there is no CUDA task for 'kv_append' on its own yet",
    ),
    "two of them in one": (
        {"fusions": {"attend": APART, "turn": {"of": ["attention.qn", "attention.qr"]}}},
        "group 'turn': no task does rmsnorm and rope on rows",
    ),
    "a norm that others read": (
        {"fusions": {"qkv": {"of": ["attention.h", "attention.q"], "pack": None}}},
        "group 'qkv': its norm is not written down, and 'attention.h' is read by others too",
    ),
    "a norm in float32": (
        {"fusions": {"head": {"of": ["logits", "next_ids"]}}, "tensors": {"h": {"dtype": "f32"}}},
        "group 'h': its norm makes bf16, 'h' is f32",
    ),
    "attention of float32": (
        {"fusions": {"attend": APART}, "tensors": {"attention.qr": {"dtype": "f32"}}},
        "group 'attend': attention reads bf16, 'attention.qr' is f32",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_there_is_no_task_for_is_refused(case):
    sections, message = REFUSED[case]
    with pytest.raises(UserError) as error:
        emit(plan(child("qwen3", **sections), size="tiny", target="h100", context=256))
    assert error.value.message == f"the CUDA kernel cannot run {message}"


def test_a_task_of_more_features_than_registers_hold_is_refused():
    wide = child(
        "qwen3", {"intermediate_size": 8192}, fusions={"gate_up": None}, schedule=[{"set": {"mlp.act": {"grid": [1]}}}]
    )
    with pytest.raises(UserError) as error:
        emit(plan(wide, size="tiny", target="h100", context=256))
    assert error.value.message.endswith("group 'mlp.act': a task has 8192 features, one does at most 4096")
    assert error.value.hint == "set 'mlp.act: {grid: [2]}' or more in the schedule"
