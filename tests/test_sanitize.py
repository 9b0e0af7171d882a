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
    options = SimpleNamespace(limit=1.0, spec="qwen3", target="h100", sms=4, without=[])
    checked = sanitize.Checked("memcheck", ["sh", "-c", script], options)
    assert checked.verdict("1 2 3").says == says
    assert checked.seconds < 10


RACES = """
========= Error: Race reported between Write access at mpk::ptx::copy_to_shared(void *)+0x25 in ptx.cuh:69
=========     and Read access at mpk::ptx::load_matrices(unsigned int)+0xa3 in ptx.cuh:193 [4 hazards]
=========
========= Error: Race reported between Write access at mpk::Scheduler::next_step()+0x30 in scheduler.cuh:85
=========     and Read access at mpk::Worker::Worker(const mpk::Progress &)+0x42 in worker.cuh:91 [8 hazards]
=========     and Read access at mpk::EmbeddingRow<(int)96>::load(const Worker &)+0x8c in embedding.cuh:13 [2 hazards]
=========
========= Error: Race reported between Write access at megakernel+0x3610 in scheduler.cuh:105
=========     and Read access at mpk::TokenLoop::prepare(const mpk::Worker &)+0x18bf0 in argmax.cuh:165 [8 hazards]
=========
========= Error: Race reported between Write access at mpk::ptx::copy_to_shared(void *)+0x2b in ptx.cuh:69
=========     and Read access at megakernel+0x9c50 [34560 hazards]
=========
========= Error: Race reported between Read access at mpk::ptx::load_shared_flag(const int *)+0x39 in ptx.cuh:147
=========     and Write access at mpk::ptx::store_shared_flag(int *)+0x30 in ptx.cuh:151 [6 hazards]
=========
"""
ANOTHER = """
========= Error: Race reported between Write access at mpk::ptx::copy_to_shared(void *)+0x25 in ptx.cuh:69
=========     and Read access at mpk::Panel::at(const mpk::Worker &, int)+0xa3 in linear.cuh:60 [4 hazards]
========= RACECHECK SUMMARY: 4 hazards displayed (4 errors, 0 warnings)
"""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (RACES + "========= RACECHECK SUMMARY: 5 hazards displayed", "clean but for 5 that it cannot judge"),
        (RACES + ANOTHER, "4 hazards"),
        (RACES + ANOTHER.replace("mpk::Panel::at(const mpk::Worker &, int)", "megakernel"), "4 hazards"),
    ],
)
def test_hazards_between_other_places_than_the_known_ones_are_findings(sanitize, tmp_path, text, says):
    page = tmp_path / "page"
    page.write_text("tokens: 1 2 3\n" + text)
    options = SimpleNamespace(limit=5.0, spec="qwen3", target="h100", sms=4, without=[])
    verdict = sanitize.Checked("racecheck", ["sh", "-c", f"cat {page}; exit 9"], options).verdict("1 2 3")
    assert verdict.says == says
    assert verdict.clean == says.startswith("clean")
