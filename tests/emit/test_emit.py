"""The generated source, and that it compiles for every architecture that plans are made for. Needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpk_spec.emit.source import emit
from mpk_spec.errors import UserError
from mpk_spec.planner import plan
from mpk_spec.planner.targets import find_target
from mpk_spec.schema import load_spec

GOLDEN = Path(__file__).parent / "golden" / "qwen3-tiny-h100.cu"


def emitted(spec: str, size: str, target: str = "h100"):
    return emit(plan(load_spec(spec), size=size, target=target, context=256))


def test_the_generated_source_is_the_golden_one():
    """UPDATE_GOLDEN=1 rewrites it. A refactor must not change it."""
    source = emitted("qwen3", "tiny").source
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(source)
    assert source.splitlines()[1:] == GOLDEN.read_text().splitlines()[1:]  # the first line names the plan by its hash


def test_the_source_does_not_depend_on_the_process():
    code = (
        "import sys; from mpk_spec.emit.source import emit; from mpk_spec.planner import plan;"
        "from mpk_spec.schema import load_spec;"
        "sys.stdout.write(emit(plan(load_spec('qwen3'), size='tiny', context=256)).source)"
    )
    sources = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert sources[0] == sources[1] == emitted("qwen3", "tiny").source


@pytest.mark.parametrize(
    ("spec", "size"),
    [("qwen3", "0.6b"), ("qwen3", "8b"), ("qwen3", "32b"), ("smollm2", "135m"), ("smollm2", "1.7b"), ("llama3", "1b"),
     ("llama3", "3b"), ("qwen2_5", "7b")],
)  # fmt: skip
def test_sizes_that_the_kernel_runs(spec, size):
    assert "runtime/kernel.cuh" in emitted(spec, size).source


@pytest.mark.parametrize(
    ("spec", "size", "message"),
    [
        (
            "qwen3_moe",
            "tiny",
            "the CUDA kernel runs every step with the queues of 'decode'; 'prefill' is planned otherwise",
        ),
        ("gemma3", "tiny", "the CUDA kernel cannot run group 'attend': it has a window or a softcap"),
    ],
)
def test_what_the_kernel_cannot_run_is_refused(spec, size, message):
    with pytest.raises(UserError) as error:
        emitted(spec, size)
    assert error.value.message == message


def test_an_architecture_with_too_few_registers_is_refused(tmp_path, monkeypatch):
    """Without setmaxnreg (sm_80) every warp has 168 registers at most, and the tasks spill."""
    pytest.importorskip("cuda.core", reason="needs cuda-core and NVRTC: pip install mpk-spec[cuda]")
    from mpk_spec.emit.compiler import compile_kernel

    monkeypatch.setenv("MPK_SPEC_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="the kernel for sm_80 needs more registers than there are"):
        compile_kernel("tiny", emitted("qwen3", "tiny", "a100").source, "sm_80")


@pytest.mark.parametrize("target", ["h100", "b200"])
def test_every_task_compiles_without_spills(target, tmp_path, monkeypatch):
    pytest.importorskip("cuda.core", reason="needs cuda-core and NVRTC: pip install mpk-spec[cuda]")
    from mpk_spec.emit.compiler import compile_kernel

    monkeypatch.setenv("MPK_SPEC_CACHE", str(tmp_path))
    made = emitted("qwen3", "tiny", target)
    arch = find_target(target).arch
    first = compile_kernel(made.plan.name, made.source, arch)
    assert first.report.spill_bytes == 0
    assert first.report.registers <= 168
    again = compile_kernel(made.plan.name, made.source, arch)
    assert (first.cached, again.cached) == (False, True)
    assert again.cubin == first.cubin
