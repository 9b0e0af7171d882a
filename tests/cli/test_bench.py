from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from perf.steady import Steady

from mpk_spec import errors
from mpk_spec.cli.main import main


def test_a_degree_that_nobody_would_run_on_is_refused(capsys):
    asked = ["bench", "qwen3", "--size", "tiny", "--weights", "random:0", "--backend", "torch", "--tp", "2"]
    assert main(asked) == errors.EXIT_BAD_INPUT
    assert "the backend 'torch' runs on one rank" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_said_before_anything_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("mpk_spec.cli.target.open_target", lambda *arguments, **options: pytest.fail("it ran"))
    (tmp_path / "file").touch()
    assert main(["bench", "smollm2", "--backend", "cpu", "-o", str(tmp_path / "file")]) == errors.EXIT_BAD_INPUT
    assert f"cannot write {tmp_path / 'file'}: File exists" in capsys.readouterr().err


def test_the_command_prints_a_table_and_writes_both_files(monkeypatch, tmp_path, capsys):
    target = SimpleNamespace(
        spec=None, name="smollm2", size="135m", checkpoint=SimpleNamespace(source="./made"), build=None
    )
    monkeypatch.setattr("mpk_spec.cli.target.open_target", lambda *arguments, **options: target)
    steps = {"cpu": 0.001, "torch": 0.002}
    monkeypatch.setattr(
        "mpk_spec.runtime.select.open_backend", lambda spec, size, checkpoint, name, *rest, **more: Steady(steps[name])
    )
    out = tmp_path / "results"
    assert main(["bench", "smollm2", "-n", "4", "--repeats", "1", "--prompt-tokens", "3", "-o", str(out)]) == 0
    page = capsys.readouterr().out
    assert page == (out / "smollm2-135m.md").read_text()
    assert page.startswith("# smollm2 135m\n")
    assert "cpu does " in page
    data = json.loads((out / "smollm2-135m.json").read_text())
    assert data["backends"]["cpu"]["tokens_per_s"] > data["backends"]["torch"]["tokens_per_s"]
    assert main(["bench", "smollm2", "-n", "4", "--repeats", "1", "--json", "--backend", "cpu"]) == errors.EXIT_OK
    assert list(json.loads(capsys.readouterr().out)["backends"]) == ["cpu"]
