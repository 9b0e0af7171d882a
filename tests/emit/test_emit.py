"""The generated source, and that it compiles for every architecture that plans are made for. Needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpk_spec.emit.source import emit
from mpk_spec.errors import UserError
from mpk_spec.ops.linear import K_BLOCK
from mpk_spec.planner import plan
from mpk_spec.schema import load_spec

GOLDEN = Path(__file__).parent / "golden"


def emitted(spec: str, size: str, target: str = "h100", tp: int = 1):
    return emit(plan(load_spec(spec), size=size, target=target, context=256, tp=tp))


@pytest.mark.parametrize(("name", "tp"), [("qwen3-tiny-h100.cu", 1), ("qwen3-tiny-h100-tp2.cu", 2)])
def test_the_generated_source_is_the_golden_one(name, tp):
    """UPDATE_GOLDEN=1 rewrites it. A refactor must not change it."""
    source, golden = emitted("qwen3", "tiny", tp=tp).source, GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(source)
    assert source.splitlines()[1:] == golden.read_text().splitlines()[1:]  # the first line names the plan by its hash


def test_the_source_does_not_depend_on_the_process():
    code = (
        "from mpk_spec.emit.source import emit; from mpk_spec.planner import plan;"
        "from mpk_spec.schema import load_spec; import sys;"
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


SPECS = ("qwen3", "smollm2", "llama3", "qwen2_5")


@pytest.mark.parametrize(("spec", "size"), [(name, size) for name in SPECS for size in load_spec(name).sizes])
def test_every_size_of_the_dense_specs_is_emitted(spec, size):
    made = emitted(spec, size)
    assert "runtime/kernel.cuh" in made.source
    for part in made.layout.packed.values():  # chunks of whole blocks of columns, none larger than the ring's stages
        assert part.tile_k % K_BLOCK == 0
        assert part.chunk_bytes <= made.plan.chunk_bytes


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
