"""The verdicts of benchmarks/sanitize.py, from what tools print. No GPU, no compute-sanitizer."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

FILE = Path(__file__).parent.parent / "benchmarks" / "sanitize.py"


@pytest.fixture(scope="module")
def sanitize():
    spec = importlib.util.spec_from_file_location("sanitize", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["sanitize"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["sanitize"]


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo tokens: 1 2 3; echo ========= ERROR SUMMARY: 0 errors", "clean"),
        ("echo tokens: 1 2 3; echo ========= ERROR SUMMARY: 2 errors; exit 9", "2 errors"),
        ("echo tokens: 1 2 3; echo '========= RACECHECK SUMMARY: 4 hazards displayed'; exit 9", "4 hazards"),
        ("echo tokens: 1 2 4; echo ========= ERROR SUMMARY: 0 errors", "other tokens: 1 2 4, not 1 2 3"),
        ("echo tokens: 1 2 3", "no summary, exit code 0"),
        ("echo ========= ERROR SUMMARY: 0 errors; exit 1", "exit code 1"),
        ("sleep 60", "not done in 1 s"),
    ],
)
def test_verdicts(sanitize, script, says):
    options = SimpleNamespace(limit=1.0, spec="qwen3", target="h100", sms=4)
    checked = sanitize.Checked("memcheck", ["sh", "-c", script], options)
    assert checked.verdict("1 2 3").says == says
    assert checked.seconds < 10
