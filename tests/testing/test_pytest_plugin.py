"""pytest and a folder of specs: which files it takes, and what a failing check says."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mpk_spec.paths import PACKAGE, specs_dir

SPEC = f"""spec: v1
extends: {specs_dir() / "qwen3.yaml"}
name: mine
model: {{architectures: [Qwen3ForCausalLM]}}
sizes:
  small: {{hidden_size: 96, intermediate_size: 256, num_hidden_layers: 3, num_attention_heads: 8, head_dim: 32,
          num_key_value_heads: 2, vocab_size: 515, tie_word_embeddings: true, max_position_embeddings: 512}}
checks:
  parameters: {{size: small, equal: 455808}}
  wrong: {{check: parameters, size: small, equal: 17}}
"""


def pytest_in(folder, *arguments: str) -> str:
    """pytest's output, in a process whose plugin is ours alone."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "mpk_spec.testing.pytest_plugin", "-p", "no:cacheprovider"]
    found = subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    return found.stdout + found.stderr


@pytest.fixture
def project(tmp_path):
    (tmp_path / "specs").mkdir()
    (tmp_path / "specs" / "mine.yaml").write_text(SPEC)
    (tmp_path / "specs" / "other.yaml").write_text("name: no spec\n")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.yaml").write_text(SPEC)
    return tmp_path


def test_a_failing_check_names_all(project):
    said = pytest_in(project, "-q")
    assert "1 failed, 2 passed, 1 skipped" in said  # skipped: it has no goldens
    assert "specs/mine.yaml:10:3: check 'wrong' of spec 'mine' failed" in said
    assert "  expected: 17\n" in said
    assert "  got:      455808\n" in said
    assert "Traceback" not in said


def test_items_are_those_of_the_files_in_specs(project):
    listed = [line for line in pytest_in(project, "--collect-only", "-q").splitlines() if "::" in line]
    names = ["plans[small]", "golden[small]", "parameters", "wrong"]
    assert listed == [f"specs/mine.yaml::{name}" for name in names]


def test_a_wrong_spec_is_an_error_of_collection(project):
    path = project / "specs" / "mine.yaml"
    path.write_text(SPEC.replace("equal: 17", "equals: 17"))
    said = pytest_in(project, "-q")
    assert "specs/mine.yaml:10:43: unknown key 'equals'" in said
    assert "did you mean 'equal'?" in said
