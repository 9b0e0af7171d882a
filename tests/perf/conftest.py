"""Scripts of benchmarks/ as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load_script(monkeypatch):
    """Loads a script by its name, anew for each test, with what the scripts share."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "random_kernel", raising=False)

    def load(name: str):
        found = importlib.util.spec_from_file_location(f"{name}_script", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(found)
        monkeypatch.setitem(sys.modules, f"{name}_script", module)  # dataclasses look their module up
        found.loader.exec_module(module)
        return module

    yield load
    sys.modules.pop("random_kernel", None)
