"""The wheel is whole: it works where the source tree is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder that holds the built wheel and nothing else of ours."""
    wheels, folder = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("installed")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(ROOT))
    (wheel,) = wheels.glob("mpk_spec-*.whl")
    pip("install", "--no-deps", "--no-index", "--target", str(folder), str(wheel))
    return folder


def program(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mpk_spec", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(installed)},
        timeout=120,
    )


@pytest.mark.slow
def test_specs_and_templates_travel_in_the_wheel(installed):
    data = installed / "mpk_spec" / "_data"
    for name in ("specs", "cuda_templates"):
        there = {path.relative_to(ROOT / name) for path in (ROOT / name).rglob("*") if path.is_file()}
        assert {path.relative_to(data / name) for path in (data / name).rglob("*") if path.is_file()} >= there
        assert there


@pytest.mark.slow
def test_nothing_else_is_in_the_wheel(installed):
    assert sorted(path.name for path in installed.iterdir() if path.suffix != ".dist-info") == ["bin", "mpk_spec"]
    assert not list(installed.rglob("test_*.py"))


@pytest.mark.slow
def test_it_runs_elsewhere_with_its_own_specs(installed, tmp_path):
    done = program(installed, tmp_path, "validate", "smollm2")
    own = installed / "mpk_spec" / "_data" / "specs" / "smollm2.yaml"
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"ok: smollm2 ({own})")


@pytest.mark.slow
def test_it_plans_elsewhere(installed, tmp_path):
    done = program(installed, tmp_path, "plan", "smollm2", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{")
