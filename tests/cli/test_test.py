"""`mpk-spec test`: lines of expected and got, goldens written and compared, an exit code."""

from __future__ import annotations

import json
import shutil

import pytest

from mpk_spec import errors
from mpk_spec.cli.main import main
from mpk_spec.paths import specs_dir


@pytest.fixture
def spec(tmp_path):
    """A copy of a spec, so that its goldens can be written."""
    for name in ("qwen3.yaml", "llama3.yaml"):
        shutil.copy(specs_dir() / name, tmp_path / name)
    return str(tmp_path / "llama3.yaml")


def test_checks_of_one_size_pass(capsys):
    assert main(["test", "llama3", "--size", "tiny", "-k", "tiny]"]) == errors.EXIT_OK
    shown = capsys.readouterr()
    assert "pass  llama3/plans[tiny]" in shown.out
    assert shown.err.splitlines()[-1].startswith("1 passed, 0 failed, ") or "2 passed, 0 failed" in shown.err


def test_a_failing_check_says_where_and_what(capsys, tmp_path, spec):
    path = tmp_path / "llama3.yaml"
    path.write_text(path.read_text().replace("equal: 1235814400", "equal: 1235814401"))
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "equal: 1235814401" in text)
    assert main(["test", spec, "-k", "parameters"]) == errors.EXIT_VERDICT
    shown = capsys.readouterr()
    assert (
        shown.out == f"FAIL  llama3/parameters                  expected 1235814401, got 1235814400, {path}:{line}:3\n"
    )
    assert shown.err == "error: 0 passed, 1 failed, 0 skipped\n"


def test_goldens_are_written_then_compared(capsys, tmp_path, spec):
    golden = tmp_path / "golden" / "llama3" / "tiny.txt"
    arguments = ["test", spec, "--size", "tiny", "-k", "golden"]
    assert main(arguments) == errors.EXIT_OK
    assert f"skip  llama3/golden[tiny]                {golden.parent} does not exist" in capsys.readouterr().out
    assert main([*arguments, "--update"]) == errors.EXIT_OK
    assert golden.read_text().startswith("llama3 tiny on h100, tp 1")
    assert main(arguments) == errors.EXIT_OK
    assert "pass  llama3/golden[tiny]" in capsys.readouterr().out
    golden.write_text(golden.read_text().replace("tp 1", "tp 3"))
    assert main(arguments) == errors.EXIT_VERDICT
    shown = capsys.readouterr().out
    assert "      -llama3 tiny on h100, tp 3, batch 1, context 512\n" in shown
    assert "      +llama3 tiny on h100, tp 1, batch 1, context 512\n" in shown


def test_json_has_every_check(capsys):
    assert main(["test", "llama3", "--json", "-k", "parameters"]) == errors.EXIT_OK
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["spec"], found["check"], found["verdict"]) == ("llama3", "parameters", "pass")
    assert (found["expected"], found["got"]) == ("1235814400", "1235814400")
    assert found["file"].endswith("llama3.yaml") and found["line"] > 1


def test_mistakes_of_all_specs_are_told_before_anything_runs(capsys, tmp_path, spec):
    path = tmp_path / "llama3.yaml"
    path.write_text(path.read_text().replace("checks:\n  parameters:", "checks:\n  parameter:"))
    for command in (["test", "qwen3", spec], ["validate", spec]):
        assert main(command) == errors.EXIT_BAD_INPUT
        shown = capsys.readouterr()
        assert shown.out == ""
        assert "unknown check 'parameter'" in shown.err and "did you mean 'parameters'?" in shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-k", "nothing"], "no check has 'nothing' in its name"),
        (["--size", "9b"], "none of these specs has a size '9b'"),
    ],
)
def test_what_matches_nothing_is_an_error(capsys, arguments, message):
    assert main(["test", "llama3", *arguments]) == errors.EXIT_BAD_INPUT
    assert f"error: {message}" in capsys.readouterr().err


def test_without_a_name_all_specs_are_tested(capsys):
    assert main(["test", "-k", "/parameters"]) == errors.EXIT_OK
    names = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert names == sorted(f"{path.stem}/parameters" for path in specs_dir().glob("*.yaml"))
