"""`mpk-spec profile` on a GPU: every task of the plan was timed, and its phases make sense."""

from __future__ import annotations

import json
import re

import pytest

pytestmark = pytest.mark.gpu


def test_the_profile_of_a_tiny_model(gpu, capsys, tmp_path):
    from mpk_spec.cli.main import main

    trace = tmp_path / "trace.json"
    arguments = ["profile", "qwen3", "--size", "tiny", "--weights", "random:0", "-c", "100"]
    assert main([*arguments, "--tokens", "6", "-o", str(trace), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert len(data["us_per_token"]) == 6
    assert all(5 < us < 1000 for us in data["us_per_token"])
    token = sum(data["us_per_token"]) / 6
    # more, and something began before what it is said to have waited for
    assert sum(c["us"] for c in data["critical"]) == pytest.approx(token, rel=0.1)
    assert 0.05 * token < sum(c["hop_us"] for c in data["critical"]) < 0.9 * token
    assert 0 < data["between_us"] < token
    for row in data["rows"]:
        assert min(row["mean"].values()) >= 0, row
        assert row["span_us"] < 1000
        if row["name"] in ("qkv", "attend", "o_add", "gate_up", "down_add"):
            assert 0.1 < row["most"]["wait values"] < 100, row
            assert row["mean"]["signal"] > 0.1, row
    events = json.loads(trace.read_text())["traceEvents"]
    assert {"looks for values", "compute", "epilogue"} <= {e["name"] for e in events if e.get("cat") == "phase"}
    names = {e["name"] for e in events if e.get("cat") == "task"}
    assert {"qkv[0]", "attend[0]", "o_add[0]", "gate_up[0]", "down_add[0]", "head[0]", "next_ids[0]"} <= names
    assert len({e["args"]["step"] for e in events if e.get("cat") == "task"}) == 7


def test_a_calibration_predicts_the_kernel_that_reads_no_clocks(gpu, capsys, tmp_path, monkeypatch):
    from mpk_spec.cli.main import main
    from mpk_spec.planner.cost import read_calibration

    monkeypatch.setenv("MPK_SPEC_CACHE", str(tmp_path))
    assert main(["tune", "qwen3", "--size", "tiny", "--weights", "random:0", "-c", "100", "--calibrate"]) == 0
    said = capsys.readouterr().out
    clocked, plain, _, now = (float(ms) for ms in re.findall(r"(\d+\.\d{4}) ms", said))
    assert 0.005 < plain < clocked < 1.0
    assert now == pytest.approx(plain, rel=0.02)
    known = read_calibration(gpu)
    assert known["stream_gbps"] > 1000 and 0 < known["norm_hop_us"] < 10
