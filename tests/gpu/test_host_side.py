"""What only a GPU can show of the host's side: compare, its search for the first wrong operator, and the clocks."""

from __future__ import annotations

import pytest
import torch

from mpk_spec import errors
from mpk_spec.cli.main import main
from mpk_spec.runtime.random_model import random_checkpoint
from mpk_spec.schema import load_spec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
TINY = ["--size", "tiny", "--weights", "random:0", "--backend", "cuda"]


@pytest.mark.parametrize("name", ["qwen3", "llama3", "smollm2", "qwen2_5"])
def test_compare_passes_prompts_and_decode_steps(name, capsys):
    assert main(["compare", name, *TINY, "--positions", "1024", "-c", "512", "--decode", "64"]) == errors.EXIT_OK
    assert "the 256 token by token" in capsys.readouterr().out  # 64 of each of four sequences


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5"])
def test_no_operator_of_the_kernel_adds_an_error_of_its_own(name, capsys):
    assert main(["compare", name, *TINY, "--stop-after", "all"]) == errors.EXIT_OK
    assert "first: no operator adds an error of its own" in capsys.readouterr().out


@pytest.mark.parametrize(("defect", "place"), [("swapped-heads", "attention.q@0"), ("missing-gain", "mlp.act@0")])
def test_a_defect_in_packed_weights_is_found_and_named(defect, place, capsys):
    assert main(["compare", "qwen3", *TINY, "--positions", "1024", "--plant", defect]) == errors.EXIT_VERDICT
    assert main(["compare", "qwen3", *TINY, "--plant", defect, "--stop-after", "mlp.out@1"]) == errors.EXIT_VERDICT
    assert f"first: '{place}'" in capsys.readouterr().out


def test_a_stopped_step_leaves_the_kernel_able_to_run():
    from mpk_spec.runtime.cuda_backend import CudaBackend
    from mpk_spec.runtime.select import plan_for_gpu
    from mpk_spec.testing.bisect_gpu import STOP_AFTER, StoppedKernel

    spec, checkpoint = load_spec("qwen3"), random_checkpoint(load_spec("qwen3"), "tiny", 0)
    backend = CudaBackend(plan_for_gpu(spec, "tiny", checkpoint, 128), checkpoint, defines=(STOP_AFTER,))
    ids = list(range(40))
    before = backend.logits(ids)
    StoppedKernel(backend, ids).values(1, 2, ("attention.out",))
    assert torch.equal(backend.logits(ids), before)
    backend.close()


def test_a_filled_cache_is_read_to_its_end():
    """A step at a long context takes longer than one at a short context of the same plan."""
    from mpk_spec.perf.clock import time_decode
    from mpk_spec.runtime.cuda_backend import CudaBackend
    from mpk_spec.runtime.select import plan_for_gpu

    spec = load_spec("qwen3")
    checkpoint = random_checkpoint(spec, "0.6b", 0)
    backend = CudaBackend(plan_for_gpu(spec, "0.6b", checkpoint, 16384), checkpoint)
    short, long = (time_decode(backend, context, 16, 2) for context in (128, 16000))
    assert 0 < short.kernel_ms < long.kernel_ms
    assert long.user_ms < 1.5 * long.kernel_ms + 0.1
    backend.close()


def test_the_ceiling_is_near_the_data_sheet():
    from mpk_spec.perf.ceiling import measure_ceiling
    from mpk_spec.runtime.select import target_here

    ceiling = measure_ceiling(target_here()[0])
    assert 0.9 < ceiling.gbps / ceiling.theoretical_gbps < 1.0


def test_the_static_cache_in_cuda_graphs_gives_the_tokens_of_the_step_itself():
    from mpk_spec.perf.rivals import Compiled, Graphed
    from mpk_spec.weights import load_hf_model

    model = load_hf_model(random_checkpoint(load_spec("qwen3"), "tiny", 0), "float32", "cuda")
    with torch.no_grad():
        for kind in (Compiled, Graphed):
            rival = kind(model, 40, 8)
            made = list(rival.decode(8))
            rival.rewind()
            token, plain = torch.tensor([[17]], device="cuda"), []
            for _ in range(8):
                token = rival.forward(token)
                plain.append(int(token))
            assert made == plain
    torch.compiler.reset()
