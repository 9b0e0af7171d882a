"""Programs of tests/emit/on_host: device code that runs on the host."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from mpk_spec.paths import templates_dir

ON_HOST = Path(__file__).parent / "on_host"


def built(source: str, folder: Path, *more: Path, options: tuple[str, ...] = ()) -> Path:
    """The program of a source of `ON_HOST`, made in `folder`. more: folders whose headers go before all others."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler: g++")
    program = folder / Path(source).stem
    folders = [f"-I{f}" for f in (*more, ON_HOST, templates_dir())]
    command = [compiler, "-O1", "-std=c++20", "-w", *options, *folders, ON_HOST / source, "-o", program]
    subprocess.run(command, check=True)
    return program
