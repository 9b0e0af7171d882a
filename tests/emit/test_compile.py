"""Every task compiles for every architecture that plans are made for, without a spill. Needs NVRTC, but no GPU.

A compilation takes 5 to 15 seconds. The everyday run has the tiny model for every architecture, two numbers of ranks
and one real size for Hopper; the other real sizes and the builds for profiling and testing are `exhaustive`:
`pytest -m exhaustive tests/emit`.
"""

from __future__ import annotations

import pytest
from tiny_specs import child

from mpk_spec.emit import compiler
from mpk_spec.emit.source import emit
from mpk_spec.errors import UserError
from mpk_spec.planner import plan
from mpk_spec.planner.kv_splits import Attended
from mpk_spec.planner.targets import find_target
from mpk_spec.runtime.cuda_probe import CONFORM, DEFECTS, DELAYS, PROFILE
from mpk_spec.schema import load_spec
from mpk_spec.tuner.space import with_rules

pytest.importorskip("cuda.core", reason="needs cuda-core and NVRTC: pip install mpk-spec[cuda]")

ARCHITECTURES = {"a100": "sm_80", "h100": "sm_90a", "b200": "sm_100a"}
MOST_REGISTERS = 168  # of a thread, for 384 of them on one SM
# head_dim 128, 64; 1 to 7 query heads to a KV head; head norms, biases, long and short rows
REAL = [("qwen3", "8b"), ("smollm2", "135m"), ("qwen2_5", "7b")]
PROBES = [(PROFILE,), (CONFORM, DELAYS, DEFECTS)]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MPK_SPEC_CACHE", str(tmp_path))


def compiled(
    spec: str, size: str, target: str, defines: tuple[str, ...] = (), tp: int = 1, context: int = 256
) -> compiler.Compiled:
    made = plan(load_spec(spec), size=size, target=target, context=context, tp=tp, verified=False)
    return compiler.compile_kernel(made.name, emit(made).source, find_target(target).arch, defines)


def check(report: compiler.Report, target: str) -> None:
    assert report.arch == ARCHITECTURES[target]
    assert report.spill_bytes == 0
    assert report.registers <= MOST_REGISTERS


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_the_tiny_model_compiles_without_spills(target):
    first = compiled("qwen3", "tiny", target)
    check(first.report, target)
    again = compiled("qwen3", "tiny", target)
    assert (first.cached, again.cached) == (False, True)
    assert again.cubin == first.cubin


@pytest.mark.parametrize("tp", [2, 8])
def test_the_tiny_model_of_several_ranks_compiles_without_spills(tp):
    check(compiled("qwen3", "tiny", "h100", tp=tp).report, "h100")


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_sums_in_two_shots_compile_without_spills(target):
    spec = child("qwen3", schedule=[{"set": {"*": {"all_reduce": "two_shot"}}}])
    made = emit(plan(spec, size="tiny", target=target, context=256, tp=4, verified=False))
    assert sum("SharedSum<" in task.source for task in made.tasks) == 3  # layer 0 adds another residual
    check(compiler.compile_kernel(made.plan.name, made.source, find_target(target).arch).report, target)


def merged(head_dim: int, splits: int, target: str) -> compiler.Report:
    """Of the tiny model with more splits than readers merge."""
    wide = {"head_dim": head_dim, "max_position_embeddings": 8192}
    spec = child("qwen3", wide, schedule=[{"set": {"attend": {"kv_splits": splits, "kv_merge": "apart"}}}])
    made = emit(plan(spec, size="tiny", target=target, context=8192, verified=False))
    assert sum("MergeHeads<" in task.source for task in made.tasks) == 1
    return compiler.compile_kernel(made.plan.name, made.source, find_target(target).arch).report


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_a_merge_of_its_own_compiles_without_spills(target):
    """60 splits of 64 features: a thread of it holds eight pairs at once."""
    check(merged(64, 60, target), target)


def test_as_many_splits_as_a_plan_merges_apart_fit_the_scratch():
    check(merged(128, Attended(8, 1, 128, 64, 131072, layer_bytes=1).most_apart, "h100"), "h100")


def test_a_model_without_a_cache_compiles():
    gone = dict.fromkeys
    projections = ("attn_norm", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "o_proj")
    spec = child(
        "qwen3", blocks={"attention": None}, layers={"y": {"repeat": "x", "over": "layers", "blocks": ["mlp"]}},
        fusions={**gone(["qkv", "attend", "o_add"]), "embed": {"of": ["x"], "into": "gate_up"}},
        weights={"layer": gone(projections)}, state=gone(["kv"]), tensors=gone(["attention.o"]),
        dims=gone(["heads", "kv_heads", "head_dim"]), values=gone(["scale", "rope"]),
        shard={"tp": gone(["heads", "kv_heads"])},
    )  # fmt: skip
    made = emit(plan(spec, size="tiny", target="h100", context=256))
    assert made.layout.caches == {}
    check(compiler.compile_kernel(made.plan.name, made.source, find_target("h100").arch).report, "h100")


@pytest.mark.slow
@pytest.mark.parametrize("context", [256, 4096])  # readers merge attention's splits, or tasks of their own
def test_a_real_size_compiles_without_spills(context):
    check(compiled(*REAL[0], "h100", context=context).report, "h100")


@pytest.mark.slow
@pytest.mark.parametrize("splits", [2, 4])
def test_readers_that_merge_wide_rows_compile_without_spills(splits):
    """o_add's first weights are in registers while it merges 4096 features of each split."""
    spec = with_rules(load_spec("qwen3"), {"attend": {"kv_splits": splits, "kv_merge": "fused"}})
    made = emit(plan(spec, size="8b", target="h100", context=512, verified=False))
    assert any("AttentionMerge<" in task.source for task in made.tasks)
    check(compiler.compile_kernel(made.plan.name, made.source, find_target("h100").arch).report, "h100")


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", ARCHITECTURES)
@pytest.mark.parametrize(("spec", "size"), REAL)
def test_real_sizes_compile_without_spills(spec, size, target):
    check(compiled(spec, size, target).report, target)


@pytest.mark.exhaustive
@pytest.mark.parametrize("defines", PROBES, ids="+".join)
@pytest.mark.parametrize(("spec", "size"), [("qwen3", "tiny"), ("qwen3", "8b")])
def test_builds_for_profiling_and_testing_compile_without_spills(spec, size, defines):
    check(compiled(spec, size, "h100", defines).report, "h100")


def test_registers_are_reported_whatever_was_compiled_before(tmp_path, monkeypatch):
    """NVRTC's own cache, which it has where there is a driver, would give a cubin without a log the second time."""
    source = 'extern "C" __global__ void doubled(float* at) { at[threadIdx.x] *= 2.f; }'
    reports = []
    for empty in ("first", "second"):
        monkeypatch.setenv("MPK_SPEC_CACHE", str(tmp_path / empty))
        reports.append(compiler.compile_kernel("doubled", source, "sm_90a").report)
    assert reports[0].registers == reports[1].registers > 0


def test_nvrtc_keeps_nothing_on_disk(monkeypatch):
    import cuda.core

    seen = []

    class Recorded(cuda.core.ProgramOptions):
        def __post_init__(self):
            seen.append(self.no_cache)
            super().__post_init__()

    monkeypatch.setattr(cuda.core, "ProgramOptions", Recorded)
    compiler.compile_kernel("empty", 'extern "C" __global__ void empty() {}', "sm_90a")
    assert seen == [True]


def test_builds_have_cubins_of_their_own():
    keys = {compiler._key("source", "sm_90a", defines) for defines in [(), *PROBES, (CONFORM,), (DELAYS,), (DEFECTS,)]}
    assert len(keys) == 6


def test_a_kernel_that_needs_more_registers_is_refused():
    values = range(96)
    source = (
        'extern "C" __global__ void __launch_bounds__(1024, 2) hungry(volatile float* at) {'
        + "".join(f"float v{n} = at[{n}];" for n in values)
        + "".join(f"at[{n}] = v{n} * v{95 - n};" for n in values)
        + "}"
    )
    with pytest.raises(UserError) as error:
        compiler.compile_kernel("hungry", source, "sm_80")
    assert error.value.message.startswith("hungry: the kernel for sm_80 needs more registers than there are: ")
    assert error.value.hint == "smaller tiles need fewer registers"
