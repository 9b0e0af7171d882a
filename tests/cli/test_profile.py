from __future__ import annotations

import gzip
import json
from types import SimpleNamespace

import pytest
from profiler.synthetic import times_of

from mpk_spec import errors
from mpk_spec.cli import profile
from mpk_spec.cli.main import main
from mpk_spec.planner import plan
from mpk_spec.planner.simulate import simulate
from mpk_spec.profiler.clock import common_clock
from mpk_spec.schema import load_spec

TINY = ["profile", "qwen3", "--size", "tiny", "--weights", "random:0", "-c", "100"]


def test_several_ranks_are_asked_for(monkeypatch):
    asked = []

    def stop(model, size, weights, context, tokens, tp, layer):
        asked.append(tp)
        raise errors.UserError("enough")

    monkeypatch.setattr(profile, "recorded", stop)
    assert main([*TINY, "--tp", "2"]) == main(TINY) == errors.EXIT_BAD_INPUT
    assert asked == [2, 1]


def test_more_ranks_than_gpus_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert main([*TINY, "--tp", "2"]) == errors.EXIT_BAD_INPUT
    assert "2 ranks need 2 GPUs, this machine has 1" in capsys.readouterr().err


def test_a_build_records_no_times(tmp_path, capsys):
    pytest.importorskip("cuda.core", reason="needs cuda-core and NVRTC: pip install mpk-spec[cuda]")
    folder = tmp_path / "tiny"
    assert main(["build", "qwen3", "--size", "tiny", "-c", "256", "-o", str(folder)]) == errors.EXIT_OK
    assert main(["profile", str(folder), "--weights", "random:0"]) == errors.EXIT_BAD_INPUT
    assert "a build records no times" in capsys.readouterr().err


def test_one_layer_is_written(monkeypatch, tmp_path, capsys):
    simulation = simulate(plan(load_spec("qwen3"), size="tiny", target="h100", context=128, verified=False))
    backend = SimpleNamespace(plan=simulation.plan, emitted=SimpleNamespace(step=simulation.step))
    ran = backend, [common_clock(times_of(simulation))], simulation
    monkeypatch.setattr(profile, "recorded", lambda *asked: ran)
    trace = tmp_path / "layer.json.gz"
    assert main([*TINY, "-o", str(trace), "--layer", "1"]) == errors.EXIT_OK
    assert f"trace: {trace}, for ui.perfetto.dev" in capsys.readouterr().err
    written = json.loads(gzip.decompress(trace.read_bytes()))
    assert written["otherData"]["cut"].startswith("layer 1 of step 1 of qwen3-tiny at tp 1, ")
    layers = [e["args"].get("layer") for e in written["traceEvents"] if e.get("cat") == "task"]
    tasks = sum(len(g.tasks) for g in simulation.step.templates[simulation.step.stages[1].template].groups)
    assert layers.count(1) == tasks and len(layers) < 2 * tasks


def test_a_trace_that_cannot_be_written_is_said_before_anything_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(profile, "recorded", lambda *asked: pytest.fail("it ran"))
    assert main([*TINY, "-o", str(tmp_path)]) == errors.EXIT_BAD_INPUT
    assert f"cannot write {tmp_path}: Is a directory" in capsys.readouterr().err


def test_a_layer_without_a_file_is_refused(capsys):
    assert main([*TINY, "--layer", "1"]) == errors.EXIT_USAGE
    assert "Invalid value for --layer: says what -o FILE is to hold, and there is no -o" in capsys.readouterr().err


def test_a_layer_that_the_model_lacks_is_refused_before_anything_runs(monkeypatch, tmp_path, capsys):
    made = plan(load_spec("qwen3"), size="tiny", target="h100", context=128, verified=False)
    monkeypatch.setattr("mpk_spec.runtime.select.plan_for_gpu", lambda *asked: made)
    trace = tmp_path / "layer.json"
    assert main([*TINY, "-o", str(trace), "--layer", "36"]) == errors.EXIT_BAD_INPUT
    assert "qwen3-tiny has no layer 36" in capsys.readouterr().err and not trace.exists()
