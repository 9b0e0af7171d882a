from __future__ import annotations

import json

import pytest

from mpk_spec import errors
from mpk_spec.cli.main import main


@pytest.fixture
def stored(own_cache):
    for name in ("one-000000000000", "two-111111111111"):
        folder = own_cache / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"x" * 1_500_000)
        (folder / "mpk_spec.json").write_text(json.dumps({"source": f"pypi:{name[:3]}==1"}))
    return own_cache


def test_list_names_what_is_stored(capsys, stored):
    assert main(["cache", "list"]) == errors.EXIT_OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "      1.5 MB  checkpoint  one-000000000000  (from pypi:one==1)"
    assert lines[2] == f"      3.0 MB  in 2 entries of {stored}"


def test_list_as_json(capsys, stored):
    assert main(["cache", "list", "--json"]) == errors.EXIT_OK
    entries = json.loads(capsys.readouterr().out)
    assert [entry["source"] for entry in entries] == ["pypi:one==1", "pypi:two==1"]


def test_clear_removes_what_is_named(capsys, stored):
    assert main(["cache", "clear", "one-000000000000"]) == errors.EXIT_OK
    assert capsys.readouterr().out == "removed one-000000000000\n1.5 MB freed\n"
    assert [p.name for p in (stored / "checkpoints").iterdir()] == ["two-111111111111"]


def test_clear_all(capsys, stored):
    assert main(["cache", "clear", "--all"]) == errors.EXIT_OK
    assert capsys.readouterr().out.endswith("3.0 MB freed\n")
    assert list((stored / "checkpoints").iterdir()) == []


def test_clear_of_an_unknown_name_suggests(capsys, stored):
    assert main(["cache", "clear", "one-00000000000"]) == errors.EXIT_BAD_INPUT
    assert capsys.readouterr().err == (
        "error: the cache holds no 'one-00000000000'\n  hint: did you mean 'one-000000000000'?\n"
    )
