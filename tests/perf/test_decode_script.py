"""benchmarks/decode.py: what it runs, what it leaves out, what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture
def decode(load_script):
    return load_script("decode")


def result(job, ms, rivals=()):
    return {
        "model": {"spec": job.spec, "size": job.size, "weights": "random:0"}, "context": job.context, "tp": job.tp,
        "gpu": {"name": "NVIDIA H100 80GB HBM3"}, "bytes_per_token": {"total": 3.15e9},
        "ceiling": {"gbps": 3150.0}, "ours": {"kernel_ms": ms, "user_ms": ms}, "simulation": {"ms": 1.1},
        "rivals": {name: {"ms": 2 * ms} for name in rivals}, "verdict": {"passed": True},
    }  # fmt: skip


@pytest.fixture
def runs(decode, monkeypatch, tmp_path):
    """Benchmarks that write their result at once; `broken` names those that fail, `slow` those that do not end."""
    seen = SimpleNamespace(started=[], broken=set(), slow=set(), tmp=tmp_path)

    def run(command, *, timeout, **how):
        job = next(j for j in decode.JOBS if j.command(tmp_path / "h100", 64)[3:] == command[3:])
        seen.started.append(job.name)
        if job.name in seen.slow:
            raise subprocess.TimeoutExpired(command, timeout)
        if job.name in seen.broken:
            return SimpleNamespace(returncode=1, stderr="error: the GPU has 1.0 of 80.0 GiB free")
        path = job.result(tmp_path / "h100", "h100")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result(job, 1.25, job.rivals)))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(decode, "gpus_here", lambda: 2)
    fake = SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(decode, "subprocess", fake)  # for the script alone: matplotlib runs programs too
    return seen


def main(decode, monkeypatch, runs, *arguments):
    monkeypatch.setattr(sys, "argv", ["decode.py", "--target", "h100", "-o", str(runs.tmp), *arguments])
    return decode.main()


def test_all_is_measured_once(decode, monkeypatch, runs, capsys):
    runs.broken.add("qwen3:0.6b:128")
    runs.slow.add("llama3:1b:128")
    assert main(decode, monkeypatch, runs) == 1
    shown = capsys.readouterr().out
    assert len(runs.started) == len(decode.JOBS)
    assert "qwen3:0.6b:128: exit code 1: error: the GPU has 1.0 of 80.0 GiB free" in shown
    assert "llama3:1b:128: took more than 300 s and was ended" in shown
    runs.started.clear(), runs.broken.clear(), runs.slow.clear()
    assert main(decode, monkeypatch, runs) == 0  # resumes: only what is missing
    assert runs.started == ["qwen3:0.6b:128", "llama3:1b:128"]
    assert main(decode, monkeypatch, runs, "qwen3:8b", "--again") == 0
    assert runs.started[2:] == ["qwen3:8b:128"]


def test_several_gpus_where_there_are_some(decode, monkeypatch, runs, capsys):
    monkeypatch.setattr(decode, "gpus_here", lambda: 1)
    assert main(decode, monkeypatch, runs) == 0
    assert not any("tp2" in name for name in runs.started)
    assert "qwen3:32b:128:tp2: left out, it needs 2 GPUs and this machine has 1" in capsys.readouterr().out
    monkeypatch.setattr(decode, "gpus_here", lambda: 2)
    assert main(decode, monkeypatch, runs, "qwen3:8b:128:tp2") == 0
    assert runs.started[-1] == "qwen3:8b:128:tp2"
    assert (runs.tmp / "h100" / "qwen3-8b-h100-tp2-context128.json").is_file()
    assert "| qwen3 8b, 2 GPUs | 128 |" in capsys.readouterr().out


def test_a_kernel_that_is_wrong_stays_a_failure(decode, monkeypatch, runs, capsys):
    """`bench` writes its result and ends with 4; run again, there is nothing left to measure."""
    assert main(decode, monkeypatch, runs) == 0
    path = decode.JOBS[0].result(runs.tmp / "h100", "h100")
    path.write_text(json.dumps({**json.loads(path.read_text()), "verdict": {"passed": False}}))
    assert main(decode, monkeypatch, runs) == 1
    assert "smollm2:135m:128: measured before, and its numbers are wrong" in capsys.readouterr().out


def test_the_time_limit_leaves_the_rest_for_later(decode, monkeypatch, runs, capsys):
    clock = iter(range(0, 100000, 100))
    monkeypatch.setattr(decode, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert main(decode, monkeypatch, runs, "--limit", "450") == 0
    assert 0 < len(runs.started) < len(decode.JOBS)
    assert "not begun, the time is up: " in capsys.readouterr().out


def test_the_table_and_its_data(decode, monkeypatch, runs, capsys):
    assert main(decode, monkeypatch, runs) == 0
    text = (runs.tmp / "h100" / "table.md").read_text()
    assert capsys.readouterr().out.count(text) == 1
    lines = text.splitlines()
    assert len(lines) == 2 + len(decode.JOBS) + 2
    ends = "| 3.150 | 3150 | 1.250 | 80.0 % | 1.250 | 1.100 | 2.50 (2.00x) | 2.50 (2.00x) | passed |"
    assert lines[6] == "| qwen3 8b | 128 " + ends
    assert lines[7].startswith("| qwen3 8b | 4096 ") and lines[7].endswith("| 1.100 |  |  | passed |")
    data = json.loads((runs.tmp / "h100" / "table.json").read_text())
    assert data[0]["percent"] == pytest.approx(80) and data[0]["rivals_percent"]["eager"] == pytest.approx(40)


def test_the_plot(decode, tmp_path):
    pytest.importorskip("matplotlib", reason="the plot is an extra: pip install mpk-spec[plot]")
    rows = [decode.row_of(result(job, 1.25, job.rivals)) for job in decode.JOBS]
    assert decode.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_no_plot_without_matplotlib(decode, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not decode.plot([], tmp_path / "plot.png")


def test_a_name_that_is_none(decode, monkeypatch, runs):
    with pytest.raises(SystemExit, match="'qwen3' is no SPEC:SIZE"):
        main(decode, monkeypatch, runs, "qwen3")


def test_the_commands_are_ones_that_bench_takes(decode):
    """Every option exists: a misspelt one would be found on the GPU only."""
    from typer.main import get_command

    from mpk_spec.cli.main import app

    command = get_command(app).get_command(None, "bench")
    known = {option for parameter in command.params for option in parameter.opts}
    for job in decode.JOBS:
        asked = job.command(Path("out"), 64)[4:]
        assert {word for word in asked if word.startswith("-")} <= known


def test_results_are_looked_for_where_bench_writes_them(decode):
    from mpk_spec.cli.bench import name_on_gpu

    for job in decode.JOBS:
        written = {**result(job, 1.0), "target": "h200"}
        assert job.result(Path("out"), "h200") == Path("out") / f"{name_on_gpu(written)}.json"
