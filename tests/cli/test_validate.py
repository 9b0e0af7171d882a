from __future__ import annotations

import json

import pytest
import yaml

from mpk_spec import errors
from mpk_spec.cli.main import main
from mpk_spec.paths import specs_dir


@pytest.fixture
def broken(tmp_path):
    """Qwen3 with a key on line 1 that does not exist."""
    path = tmp_path / "broken.yaml"
    path.write_text("blokcs: {}\n" + (specs_dir() / "qwen3.yaml").read_text())
    return path


def test_a_good_spec_is_summed_up(capsys):
    assert main(["validate", "smollm2"]) == errors.EXIT_OK
    path = specs_dir() / "smollm2.yaml"
    assert capsys.readouterr().out.startswith(f"ok: smollm2 ({path}), reads LlamaForCausalLM, sizes tiny, 135m")


def test_a_bad_spec_says_where(capsys, broken):
    assert main(["validate", str(broken)]) == errors.EXIT_BAD_INPUT
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"{broken}:1:1: ")
    assert "did you mean 'blocks'?" in shown.err


def test_every_spec_is_looked_at_even_after_a_bad_one(capsys, broken):
    assert main(["validate", str(broken), "smollm2"]) == errors.EXIT_BAD_INPUT
    assert capsys.readouterr().out.startswith("ok: smollm2")


def test_json_has_the_problems_as_data(capsys, broken):
    assert main(["validate", "smollm2", str(broken), "--json"]) == errors.EXIT_BAD_INPUT
    good, bad = json.loads(capsys.readouterr().out)
    assert (good["ok"], good["architectures"]) == (True, ["LlamaForCausalLM"])
    assert (bad["ok"], bad["problems"][0]["line"]) == (False, 1)


def test_resolved_has_no_more_extends(capsys):
    assert main(["validate", "smollm2", "--resolved"]) == errors.EXIT_OK
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert resolved["name"] == "smollm2"
    assert "extends" not in resolved
    assert "attention" in resolved["blocks"]


def test_schema_is_json(capsys):
    assert main(["schema"]) == errors.EXIT_OK
    assert "properties" in json.loads(capsys.readouterr().out)
