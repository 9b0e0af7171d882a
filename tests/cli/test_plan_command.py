from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mpk_spec import errors
from mpk_spec.cli.main import main
from mpk_spec.planner.plan import Plan

TINY = ("qwen3", "--size", "tiny", "--target", "cpu")


def run(capsys, *arguments, code=errors.EXIT_OK):
    """(standard output, standard error) of `mpk-spec plan ARGUMENTS`."""
    assert main(["plan", *map(str, arguments)]) == code
    shown = capsys.readouterr()
    return shown.out, shown.err


def test_the_report(capsys):
    out, err = run(capsys, *TINY)
    assert out.startswith("qwen3 tiny on the CPU reference (cpu): tp 1, batch 1, context 512\ndecode step: 4 stages, ")
    assert "\nstage y.1, layers 1-2\n" in out and "\nbuffers (" in out and "\nproved: acyclic" in out
    assert out.count("\npredicted ") == 2
    assert err == ""


def test_prefill(capsys):
    out, _ = run(capsys, *TINY, "--step", "prefill")
    assert "\nprefill step, 128 tokens: 4 stages, " in out


@pytest.mark.parametrize("step", ["mixed", "verify"])
def test_other_steps_are_planned_when_asked_for(capsys, step):
    out, _ = run(capsys, *TINY, "--step", step, "--batch", 2)
    assert f"\n{step} step, " in out and f"{step} to {step}" in out


def test_every_question_acts(capsys):
    out, _ = run(capsys, "qwen3", "--size", "tiny", "--target", "a100", "--tp", "2", "--batch", "3", "--context", "77")
    assert out.startswith("qwen3 tiny on NVIDIA A100 80GB SXM (a100): tp 2, batch 3, context 77\n")


def test_without_a_size_the_first_real_one(capsys):
    out, err = run(capsys, "qwen3", "--pin")
    assert 'size: "0.6b"' in out
    assert err.startswith("planning size 0.6b of ") and err.endswith(" (--size chooses another)\n")


def test_json_is_a_plan_that_is_read_again(capsys, tmp_path):
    out, _ = run(capsys, *TINY, "--json")
    path = tmp_path / "plan.json"
    path.write_text(out)
    again, _ = run(capsys, path, "--json")
    assert again == out and Plan.from_json(out).size == "tiny"
    from_file, from_spec = run(capsys, path)[0], run(capsys, *TINY)[0]
    assert from_file == from_spec


def test_output_writes_the_same_json(capsys, tmp_path):
    out, err = run(capsys, *TINY, "--json", "-o", tmp_path / "p.json")
    assert (tmp_path / "p.json").read_text() == out
    assert err == f"wrote {tmp_path / 'p.json'}\n"


def test_explain_and_pin_are_alone_on_standard_output(capsys):
    assert run(capsys, *TINY, "--explain")[0].startswith("qwen3-tiny on cpu, tp 1, batch 1\n\nchoices\n  fusion qkv: ")
    assert run(capsys, *TINY, "--pin")[0].startswith(
        "schedule:\n  - when: {target: cpu, size: tiny, tp: 1, batch: 1}\n"
    )


@pytest.mark.parametrize(
    ("other", "line"),
    [
        ("qwen3:tiny", "the plans are the same"),
        ("qwen3@a100", "target: cpu -> a100"),
        ("llama3", "spec: qwen3 -> llama3"),
    ],
)
def test_differences_to_a_spec(capsys, other, line):
    assert line in run(capsys, *TINY, "--diff", other)[0].splitlines()


def test_differences_to_a_file(capsys, tmp_path):
    run(capsys, *TINY, "--batch", 2, "--pin", "-o", tmp_path / "p.json")
    assert run(capsys, *TINY, "--diff", tmp_path / "p.json")[0].startswith("batch: 1 -> 2\n")


def test_timelines(capsys, tmp_path):
    _, err = run(capsys, *TINY, "--pin", "--timeline", tmp_path / "t.svg")
    assert err == f"wrote {tmp_path / 't.svg'}\n"
    assert (tmp_path / "t.svg").read_text().startswith("<svg ")
    run(capsys, *TINY, "--pin", "--timeline", tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]


def test_measured_constants_are_used_and_announced(capsys, own_cache):
    before, _ = run(capsys, *TINY)
    path = own_cache / "calibration" / "cpu.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"sample_us": 5000}')
    after, err = run(capsys, *TINY)
    assert err == f"predicting with the constants measured for cpu: {path}\n"
    assert before.splitlines()[3] != after.splitlines()[3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "--pin"], "Invalid value for --pin: --json and --pin each print something else"),
        (["--timeline", "t.png"], "Invalid value for --timeline: want FILE.svg or FILE.json, got t.png"),
        (["--step", "dekode"], "Invalid value for --step: want decode, prefill, mixed, verify, got dekode"),
    ],
)
def test_wrong_usage(capsys, arguments, message):
    _, err = run(capsys, *TINY, *arguments, code=errors.EXIT_USAGE)
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["qwen3", "--size", "tiny", "--target", "h1000"], "error: unknown target 'h1000'\n  hint: did you mean"),
        (["qwen3", "--size", "9b"], "error: spec 'qwen3' has no size '9b'\n  hint: known sizes: "),
        (["none.json"], "error: cannot read none.json: No such file or directory\n"),
        (["none.json", "--tp", "2"], "error: none.json is a plan already: --tp has no place beside it\n"),
    ],
)  # fmt: skip
def test_wrong_input(capsys, arguments, message):
    out, err = run(capsys, *arguments, code=errors.EXIT_BAD_INPUT)
    assert err.startswith(message) and out == ""


def test_planning_needs_no_torch_once_the_configuration_is_known(capsys):
    run(capsys, *TINY, "--explain")  # transformers completes the configuration; the cache keeps it
    code = (
        "import sys; from mpk_spec.cli.main import main; "
        "code = main(['plan', 'qwen3', '--size', 'tiny', '--target', 'cpu']); "
        "sys.exit(code or ('torch' in sys.modules) * 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
