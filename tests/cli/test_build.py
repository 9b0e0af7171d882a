from __future__ import annotations

import json

import pytest

from mpk_spec import errors
from mpk_spec.cli.main import main


@pytest.fixture(autouse=True)
def compiler(tmp_path, monkeypatch):
    pytest.importorskip("cuda.core", reason="needs cuda-core and NVRTC: pip install mpk-spec[cuda]")
    monkeypatch.setenv("MPK_SPEC_CACHE", str(tmp_path / "cache"))


def test_a_build_reports_and_leaves_cubin_source_and_plan(tmp_path, capsys):
    folder = tmp_path / "out"
    ask = ["build", "qwen3", "--size", "tiny", "-c", "256", "-o", str(folder), "--json"]
    assert main(ask) == errors.EXIT_OK
    report = json.loads(capsys.readouterr().out)
    assert (report["arch"], report["spill_bytes"], report["cached"]) == ("sm_90a", 0, False)
    assert sorted(p.name for p in folder.iterdir()) == [
        "manifest.json",
        "megakernel.cu",
        "megakernel.cubin",
        "plan.json",
    ]
    assert (folder / "megakernel.cubin").stat().st_size == report["cubin_bytes"]
    assert main(ask) == errors.EXIT_OK  # an earlier build is replaced, and comes from the cache
    assert json.loads(capsys.readouterr().out)["cached"] is True


def test_without_a_size_the_first_real_one(capsys):
    """As `plan` does, and said before the plan fails here: gemma3 has operators without a CUDA task."""
    assert main(["build", "gemma3"]) == errors.EXIT_BAD_INPUT
    first, second = capsys.readouterr().err.splitlines()[:2]
    assert first.startswith("planning size 270m of ") and first.endswith(" (--size chooses another)")
    assert second.startswith("error: the CUDA kernel cannot run")


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["build", "qwen3", "--size", "tiny", "-o", str(tmp_path)]) == errors.EXIT_BAD_INPUT
    assert "is no build: it holds" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_operators_without_a_cuda_task_are_refused(capsys):
    assert main(["build", "gemma3", "--size", "tiny"]) == errors.EXIT_BAD_INPUT
    assert capsys.readouterr().err.startswith("error: the CUDA kernel cannot run")
