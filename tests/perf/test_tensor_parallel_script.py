"""benchmarks/tensor_parallel.py: what it writes of a trace; what it runs needs GPUs."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from profiler.synthetic import times_of

from mpk_spec.planner import plan
from mpk_spec.planner.simulate import simulate
from mpk_spec.schema import load_spec

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "tensor_parallel.py"


@pytest.fixture
def script():
    found = importlib.util.spec_from_file_location("tensor_parallel_script", SCRIPT)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("arguments", [["trace", "--layer", "1"], ["time", "--layer", "1", "--output", "t.json"]])
def test_a_layer_without_a_trace_is_refused(script, monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["tensor_parallel.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert "--layer says what the --output of a trace is to hold" in capsys.readouterr().err


def test_one_layer_of_all_ranks_is_written(script, monkeypatch, tmp_path, capsys):
    simulation = simulate(plan(load_spec("qwen3"), size="tiny", target="h100", tp=2, context=128, verified=False))
    emitted = SimpleNamespace(step=simulation.step)
    backend = SimpleNamespace(plan=simulation.plan, emitted=emitted, close=lambda: None)
    monkeypatch.setattr(script, "open_random", lambda *asked: backend)
    raw = [times_of(simulation, tick_ns=1, seed=rank) for rank in (0, 1)]
    monkeypatch.setattr("mpk_spec.profiler.run.record", lambda *asked: raw)
    trace = tmp_path / "layer.json.gz"
    script.trace("qwen3:tiny", 2, SimpleNamespace(position=128, layer=1, output=str(trace)))
    assert "the sums of a layer together" in capsys.readouterr().out
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    tasks = [e for e in events if e.get("cat") == "task"]
    assert {(e["pid"], e["args"]["layer"]) for e in tasks} >= {(0, 1), (2, 1)}
    assert {e["args"]["step"] for e in tasks} == {1}
