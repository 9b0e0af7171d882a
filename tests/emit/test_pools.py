"""Claim pools: what the kernel is told of them, what it refuses, and that loaders share them out."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
from host_build import ON_HOST, built
from tiny_specs import child

from mpk_spec.emit import compiler
from mpk_spec.emit.layout import rows_of
from mpk_spec.emit.pools import FROM_POOL, check_order
from mpk_spec.emit.program import ENTRY, _program_dtype
from mpk_spec.emit.source import EVENT_STRIDE, Emitted, emit
from mpk_spec.errors import UserError
from mpk_spec.planner import plan
from mpk_spec.planner.targets import find_target
from mpk_spec.runtime.cuda_probe import CONFORM, DEFECTS, DELAYS, PROFILE
from mpk_spec.schema import load_spec

LAYER = ("qkv", "o_add", "gate_up", "down_add")
CASES = {"gate_up": ("gate_up",), "layer": LAYER, "all": (*LAYER, "head")}


def made(case: str, target: str = "h100", tp: int = 1, tasks: int | None = None, size: str = "tiny") -> Emitted:
    """tasks: how many each claimed group has; None: as planned."""

    def settings() -> dict:
        return {"launch": "dynamic"} | ({"grid": [tasks, 1, 1], "partition": "balanced"} if tasks else {})

    rules = [{"set": {name: settings() for name in CASES[case]}}]
    config = None if size == "tiny" else load_spec("qwen3").sizes[size].config
    return emit(plan(child("qwen3", config, schedule=rules), size="tiny", target=target, context=256, tp=tp))


def programs(one: Emitted) -> tuple[np.ndarray, np.ndarray]:
    """The SMs' programs, and the entries of all pools."""
    sizes, templates = one.programs.sizes, len(one.step.templates)
    dtype = _program_dtype(templates, sizes.entries, sizes.loads, sizes.waits, sizes.signals)
    assert dtype.itemsize == sizes.bytes
    end = one.plan.num_sms * sizes.bytes
    return np.frombuffer(one.programs.blob[:end], dtype), np.frombuffer(one.programs.blob[end:], ENTRY)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_every_sm_has_the_pools_and_all_have_their_tasks_in_common(case, tp):
    one = made(case, tp=tp)
    each, entries = programs(one)
    pools, templates = one.programs.pools, one.step.templates
    assert [p.name for p in pools] == [g.name for t in templates for g in t.groups if g.name in CASES[case]]
    assert len(entries) == sum(p.tasks for p in pools)
    number = {name: n for n, name in enumerate(one.programs.events)}
    packed = list(one.layout.packed)
    for n, pool in enumerate(pools):
        group = templates[pool.template].groups[pool.group]
        bounds = one.programs.pool_rows[pool.row :]
        assert packed[pool.weight] == group.name
        for task, entry in zip(group.tasks, entries[pool.first : pool.first + pool.tasks], strict=True):
            assert (entry["group"], entry["task"]) == (pool.group, task.index)
            assert (entry["lo"], entry["hi"]) == rows_of(task, one.layout.packed[group.name])
            assert (entry["lo"], entry["hi"]) == (bounds[task.index], bounds[task.index + 1])
            for program in each:
                waits = program["wait"][entry["first_wait"] :][: entry["num_waits"]]
                assert waits.tolist() == [(number[w.event], -w.stage, 0, w.count) for w in task.waits]
                signals = program["signal"][entry["first_signal"] :][: entry["num_signals"]]
                assert signals.tolist() == [number[s] for s in task.signals]
        for program in each:
            t = pool.template
            entry = program["entry"][program["queue_begin"][t] : program["queue_begin"][t + 1]]
            load = program["load"][program["load_begin"][t] : program["load_begin"][t + 1]].tolist()
            assert [(e["group"], e["lo"]) for e in entry if e["run"] == FROM_POOL].count((pool.group, n)) == 1
            assert load.count((pool.weight, -1, n)) == 1
    assert f"#define MPK_POOLS {len(pools)}\n" in one.source


def test_a_pool_adds_a_counter_behind_those_of_events():
    from mpk_spec.runtime.cuda_launch import symmetric_sizes

    one = made("layer")
    assert one.num_counters == one.num_events + len(one.programs.pools) == one.num_events + 2 * len(LAYER)
    assert symmetric_sizes(one)["events"] == one.num_counters * EVENT_STRIDE * 4


def test_a_plan_without_pools_is_emitted_as_if_there_were_none():
    one = emit(plan(child("qwen3"), size="tiny", target="h100", context=256))
    _, entries = programs(one)
    assert len(entries) == 0 and one.num_counters == one.num_events
    assert "pool" not in one.source.lower()


@pytest.mark.parametrize(
    ("spec", "rules", "message"),
    [
        ("qwen3", {"attend": {"launch": "dynamic"}}, "'attend': it claims tasks that stream no weights at run time"),
        (
            "qwen3",
            {"next_ids": {"launch": "dynamic"}},
            "'next_ids': it claims tasks that stream no weights at run time",
        ),
    ],
)
def test_other_pools_are_refused(spec, rules, message):
    with pytest.raises(UserError) as error:
        emit(plan(child(spec, schedule=[{"set": rules}]), size="tiny", target="h100", context=256))
    assert error.value.message == f"the CUDA kernel cannot run group {message}"


def test_what_comes_before_a_pool_must_not_wait_for_it():
    """Such a plan may be in order where SMs claim only when they get there; loaders claim ahead."""
    from dataclasses import replace

    template = made("gate_up").step.templates[1]
    check_order(template)
    queues = list(template.queues)
    queues[3] = queues[3][::-1]
    with pytest.raises(UserError, match="SM 3 does not run its groups in their order"):
        check_order(replace(template, queues=tuple(queues)))
    groups = list(template.groups)
    first = groups[0].tasks[0]
    groups[0] = replace(
        groups[0], tasks=(replace(first, waits=groups[4].tasks[0].waits), *groups[0].tasks[1:])
    )  # fmt: skip
    with pytest.raises(UserError, match=r"'qkv' waits for 'gate_up\.done' of a later group"):
        check_order(replace(template, groups=tuple(groups)))


@pytest.mark.parametrize("define", [PROFILE, CONFORM])
def test_what_records_by_queue_is_refused(define):
    from mpk_spec.runtime.cuda_rank import compile_for

    with pytest.raises(UserError) as error:
        compile_for("peer", made("gate_up"), (DELAYS, define))
    assert error.value.message == (
        f"a kernel whose tasks are claimed at run time ('gate_up') cannot be built with {define}"
    )


@pytest.mark.parametrize(
    ("case", "target", "tp", "defines", "size"),
    [
        ("gate_up", "h100", 1, (), "tiny"),
        ("gate_up", "h200", 1, (), "8b"),
        ("all", "h100", 1, (), "8b"),
        ("all", "h100", 1, (DELAYS, DEFECTS), "tiny"),
        ("all", "h100", 2, (), "8b"),
        ("all", "a100", 1, (), "tiny"),
        ("all", "b200", 1, (), "tiny"),
    ],
)
def test_pools_compile_without_spills(case, target, tp, defines, size, tmp_path, monkeypatch):
    pytest.importorskip("cuda.core", reason="needs cuda-core and NVRTC: pip install mpk-spec[cuda]")
    monkeypatch.setenv("MPK_SPEC_CACHE", str(tmp_path))
    one = made(case, target, tp, size=size)
    report = compiler.compile_kernel(one.plan.name, one.source, find_target(target).arch, defines).report
    assert report.spill_bytes == 0


def tables(one: Emitted) -> str:
    """What the roles on the host are told beside the generated source."""
    templates, packed = one.step.templates, list(one.layout.packed)
    most = max(len(t.groups) for t in templates)
    weights = [
        [packed.index(g.name) if g.name in packed else -2 if g.task == "attention" else -1 for g in t.groups]
        for t in templates
    ]
    tasks = [[len(g.tasks) for g in t.groups] for t in templates]

    def table(rows: list[list[int]]) -> str:
        return ", ".join("{" + ", ".join(map(str, row)) + "}" for row in rows)

    state = next(iter(one.plan.states.values()))
    return f"""
namespace plan {{
constexpr mpk::u32 num_sms = {one.plan.num_sms}, groups = {most}, last_groups = {len(templates[-1].groups)};
constexpr mpk::u32 weight_bytes = {one.layout.weight_bytes}, cache_bytes = {one.layout.cache_bytes};
constexpr mpk::u32 pages = {-(-state.context // state.page)};
constexpr int weight_of[][groups] = {{{table(weights)}}};
constexpr mpk::u32 num_tasks[][groups] = {{{table(tasks)}}};
}}  // namespace plan
"""


@pytest.mark.parametrize(("tasks", "every"), [(None, 1), (2, 3)], ids=["as planned", "few tasks"])
@pytest.mark.parametrize("case", CASES)
def test_all_roles_of_some_sms_run_all_tasks_once(case, tasks, every, tmp_path):
    """The kernel's loader, scheduler, signaller and worker loop on the host: two launches of the packed programs.

    every: of the chunks to come, which ones go to L2 ahead."""
    one = made(case, "h100:3", tasks=tasks)
    source = one.source.partition('#include "tasks/')[0]
    assert source.count("prefetch_every = 1;") == 1
    source = source.replace("prefetch_every = 1;", f"prefetch_every = {every};")
    (tmp_path / "plan.h").write_text(source + tables(one))
    (tmp_path / "programs").write_bytes(one.programs.blob)
    roles = built("roles.cc", tmp_path, tmp_path, ON_HOST / "threads", options=("-pthread",))
    count = 8 * sum(len(g.tasks) for s in one.step.stages for g in one.step.templates[s.template].groups)
    for seed in ("0", "1"):
        ran = subprocess.run([roles, tmp_path / "programs", seed], capture_output=True, text=True)
        assert (ran.returncode, ran.stdout) == (0, f"{count} tasks ran\n"), ran.stdout[-2000:]


def test_loaders_share_pools_out_and_stream_what_workers_take(tmp_path):
    """The kernel's own code on the host: 1 to 30 SMs in random orders, tickets past 2^32, more SMs than tasks."""
    ran = subprocess.run([built("pools.cc", tmp_path)], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "188160 tasks claimed\n"), ran.stdout[-2000:]
