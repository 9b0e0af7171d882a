"""The benchmark of the kernel with a kernel that only claims to run: what is measured, in which order, what is said."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from mpk_spec import errors
from mpk_spec.cli.main import main
from mpk_spec.perf import bench, clock, page
from mpk_spec.perf.ceiling import Ceiling, Reading
from mpk_spec.perf.rivals import RivalTimes
from mpk_spec.planner import plan
from mpk_spec.planner.targets import find_target
from mpk_spec.runtime.random_model import random_checkpoint
from mpk_spec.schema import load_spec
from mpk_spec.weights import load_hf_model


class FakeKernel:
    """Takes 0.3 ms for a launch and 0.5 ms for a step, by its own clock."""

    description = "cuda, a fake"

    def __init__(self, made, logits=None):
        self.plan, self.context = made, made.context
        self.vocab_size = 515
        self.launches, self.closed = [], False
        self.launcher = SimpleNamespace(elapsed_ms=lambda: 0.3 + 0.5 * self.launches[-1][1])
        self.logits = logits

    def fill_cache(self, count):
        return list(range(count))

    def stream(self, ids, *, max_new_tokens):
        self.launches.append((len(ids), max_new_tokens))
        assert len(ids) + max_new_tokens - 1 <= self.context
        yield from range(max_new_tokens)

    def reset(self):
        pass

    def close(self):
        self.closed = True


@pytest.fixture
def made():
    return plan(load_spec("qwen3"), size="tiny", target="h100", context=512)


def test_a_token_is_what_a_long_launch_takes_more_than_a_short_one(made):
    backend = FakeKernel(made)
    times = clock.time_decode(backend, context=128, tokens=64, repeats=3)
    assert times.kernel_ms == times.kernel_ms_min == pytest.approx(0.5)
    assert times.launch_ms == pytest.approx(0.3)
    assert backend.launches == [(96, 1), (96, 65)] * 4  # 96 to 160 positions: 128 on average


def test_a_kernel_that_stops_early_is_no_measurement(made):
    backend = FakeKernel(made)
    backend.stream = lambda ids, max_new_tokens: iter([1])
    with pytest.raises(RuntimeError, match="made 1 of 9 tokens"):
        clock.run(backend, [1, 2], 9)


def test_bytes_are_all_weights_once_and_the_cache():
    made = plan(load_spec("qwen3"), size="8b", target="h100", context=4096, verified=False)
    found = bench.bytes_per_token(made, 4096)
    assert found["weights"] == 15136811008
    assert found["kv"] == 36 * 8 * 128 * 2 * 2 * 4096
    assert found["total"] == found["weights"] + found["kv"]


@pytest.fixture
def machine(made, monkeypatch):
    """An H100 on which everything can be measured but nothing runs."""
    order = []
    backend = FakeKernel(made)

    def opened(spec, size, checkpoint, name, context, progress, build, tp):
        order.append(f"ours, cache {context}")
        return SimpleNamespace(backend=backend)

    def rival(name, model, context, tokens, repeats):
        assert backend.closed
        order.append(f"{name} at {context}")
        return RivalTimes(2.0, 1.9, 2.1, 3.0, tokens)

    def ceiling(target):
        order.append("ceiling")
        gbps = 3120.0 if len(order) == 1 else 3150.0
        return Ceiling((Reading(16, 64, True, gbps),), target.theoretical_gbps)

    gpu = SimpleNamespace(name="NVIDIA H100 80GB HBM3", multi_processor_count=132)
    monkeypatch.setattr("mpk_spec.runtime.select.target_here", lambda: (find_target("h100"), gpu))
    monkeypatch.setattr("mpk_spec.perf.ceiling.measure_ceiling", ceiling)
    monkeypatch.setattr("mpk_spec.runtime.select.open_backend", opened)
    monkeypatch.setattr("mpk_spec.perf.rivals.time_rival", rival)
    monkeypatch.setattr("mpk_spec.weights.load_hf_model", lambda *asked, **how: order.append("load") or object())
    monkeypatch.setattr(bench, "_gpu", lambda found: {"name": found.name, "sms": 132, "driver_cuda": "13.0"})
    return SimpleNamespace(order=order, backend=backend, monkeypatch=monkeypatch)


ASK = ["bench", "qwen3", "--size", "tiny", "--weights", "random:0", "--backend", "cuda", "--repeats", "1"]


def test_several_gpus_are_said_and_have_a_file_of_their_own(machine, monkeypatch, tmp_path, capsys):
    made = plan(load_spec("qwen3"), size="tiny", target="h100", context=512, tp=2)
    monkeypatch.setattr(machine.backend, "plan", made)
    assert main([*ASK, "--no-verdict", "--tp", "2", "-o", str(tmp_path)]) == errors.EXIT_OK
    shown = (tmp_path / "qwen3-tiny-h100-tp2-context128.md").read_text()
    assert shown.startswith("# qwen3 tiny on 2 x NVIDIA H100 80GB HBM3, batch 1, context 128\n")
    assert "A token reads on each GPU 0.001 GB" in shown


def test_the_command_measures_all_in_one_run(machine, tmp_path, capsys):
    ask = [*ASK, "--no-verdict", "--rival", "eager", "--rival", "compile", "-o", str(tmp_path)]
    assert main(ask) == errors.EXIT_OK
    assert machine.order == ["ceiling", "ours, cache 512", "ceiling", "load", "eager at 128", "compile at 128"]
    shown = capsys.readouterr().out
    assert shown == (tmp_path / "qwen3-tiny-h100-context128.md").read_text()
    assert shown.startswith("# qwen3 tiny on NVIDIA H100 80GB HBM3, batch 1, context 128\n")
    assert "| the kernel, by the GPU's clock | 0.500 (0.500 to 0.500) |" in shown
    assert "3150 GB/s, the best of two sweeps" in shown and "94.0 % of the data sheet's 3352 GB/s" in shown
    assert "not judged in this run" in shown
    data = json.loads((tmp_path / "qwen3-tiny-h100-context128.json").read_text())
    floor = data["bytes_per_token"]["total"] / 3150e6
    assert page.floor_ms(data) == pytest.approx(floor)
    assert page.percent(data, 0.5) == pytest.approx(100 * floor / 0.5)
    assert data["rivals"]["compile"]["ms"] == 2.0 and data["simulation"]["ms"] > 0


def test_a_rival_that_breaks_is_said_and_ours_stays(machine, capsys):
    def broken(name, *asked):
        if name == "compile":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to")
        return RivalTimes(2.0, 1.9, 2.1, 3.0, 16)

    machine.monkeypatch.setattr("mpk_spec.perf.rivals.time_rival", broken)
    assert main([*ASK, "--no-verdict", "--rival", "compile", "--rival", "eager"]) == errors.EXIT_OK
    shown = capsys.readouterr().out
    assert "torch.compile with its CUDA graphs did not run: OutOfMemoryError: CUDA out of memory." in shown
    assert "| Hugging Face, eager | 2.000 |" in shown and "| the kernel, by the GPU's clock | 0.500" in shown


def test_numbers_that_are_wrong_are_said_and_end_with_their_code(machine, capsys):
    """A backend whose logits are the truth passes; zeros do not."""
    machine.monkeypatch.setattr("mpk_spec.weights.load_hf_model", load_hf_model)
    model = load_hf_model(random_checkpoint(load_spec("qwen3"), "tiny", 0))

    def truth(ids, **how):
        with torch.inference_mode():
            return model(input_ids=torch.tensor([ids])).logits[0].float()

    machine.backend.logits = truth
    assert main(ASK) == errors.EXIT_OK
    assert "Correctness: passed. Over 256 positions, in sequences of 128, the mean" in capsys.readouterr().out
    machine.backend.logits = lambda ids, **how: torch.zeros(len(ids), 515)
    assert main(ASK) == errors.EXIT_VERDICT
    shown = capsys.readouterr()
    assert "Correctness: FAILED" in shown.out and "its speed says nothing" in shown.err


def test_a_truth_that_has_no_room_is_said_before_anything_is_measured(machine, capsys):
    machine.monkeypatch.setattr("mpk_spec.testing.yardstick.free_memory", lambda: 10**6)
    assert main(ASK) == errors.EXIT_BAD_INPUT
    shown = capsys.readouterr().err
    assert "the truth, Hugging Face in float32, needs" in shown and "hint: --no-verdict measures without it" in shown
    assert machine.order == []
    assert main([*ASK, "--no-verdict"]) == errors.EXIT_OK


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--backend", "cuda", "--backend", "torch"], "'cuda' is measured alone, beside its rivals"),
        (["--backend", "cpu", "--rival", "eager"], "rivals are run beside the backend 'cuda'"),
        (["--backend", "cuda", "--rival", "compiled"], "there is no rival 'compiled'\n  hint: did you mean 'compile'?"),
    ],
)
def test_what_cannot_be_compared_is_refused(asked, message, capsys):
    assert main(["bench", "qwen3", "--size", "tiny", "--weights", "random:0", *asked]) == errors.EXIT_BAD_INPUT
    assert message in capsys.readouterr().err
