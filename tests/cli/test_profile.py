from __future__ import annotations

import pytest

from mpk_spec import errors
from mpk_spec.cli import profile
from mpk_spec.cli.main import main

TINY = ["profile", "qwen3", "--size", "tiny", "--weights", "random:0", "-c", "100"]


def test_several_ranks_are_asked_for(monkeypatch):
    asked = []

    def stop(model, size, weights, context, tokens, tp):
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
