"""The program as a whole: every exit code, every command's help, completion, and how little it imports."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpk_spec import errors
from mpk_spec.cli import build
from mpk_spec.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mpk_spec", *arguments]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=settings, timeout=60)


@pytest.fixture
def build_raises(monkeypatch):
    """Makes `mpk-spec build` raise, in place of the command's own function."""

    def arrange(error: BaseException) -> None:
        def command() -> None:
            raise error

        monkeypatch.setattr(build, "command", command)

    return arrange


@pytest.fixture(autouse=True)
def forget_loaded_commands(monkeypatch):
    """Commands are loaded once per process; each test gets them as they are now."""
    import typer

    from mpk_spec.cli import main as module

    fresh = typer.main.get_command(module.app)
    monkeypatch.setattr(module, "app", fresh)


def test_exit_0_when_it_worked(capsys):
    assert main(["--version"]) == errors.EXIT_OK
    assert re.fullmatch(r"mpk-spec \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_exit_1_for_a_machine_or_version_that_cannot(capsys):
    assert main(["build", "smollm2", "--size", "tiny", "--target", "cpu"]) == errors.EXIT_BAD_INPUT
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "error: this plan is for the CPU\n  hint: plan it for a GPU: --target h100\n"


def test_exit_1_for_a_bad_spec_with_its_position_first(capsys, build_raises):
    position = errors.Position("a.yaml", 3, 2, 4)
    build_raises(errors.SpecError(errors.Problem("unknown name 'q_pro'", position, "did you mean 'q_proj'?", " q_pro")))
    assert main(["build"]) == errors.EXIT_BAD_INPUT
    assert capsys.readouterr().err == (
        "a.yaml:3:2: unknown name 'q_pro'\n  |  q_pro\n  |  ^^^^\n  hint: did you mean 'q_proj'?\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chatt"], "No such command 'chatt'. Did you mean 'chat'?"),
        (["--colour"], "No such option: --colour"),
        (["build"], "Missing argument 'SPEC'."),
        (["build", "a", "b"], "Got unexpected extra argument"),
        (["chat", "smollm2", "-n", "many"], "Invalid value for '-n' / '--max-new-tokens'"),
        (["chat", "smollm2", "-n", "0"], "Invalid value for '-n' / '--max-new-tokens'"),
        (["cache", "clear"], "name the entries to remove, or say --all"),
    ],
)
def test_exit_2_for_a_wrong_command_line(capsys, arguments, message):
    assert main(arguments) == errors.EXIT_USAGE
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert "╭" not in shown.err


def test_exit_3_for_a_bug_with_a_log_that_is_named(capsys, build_raises, own_cache):
    build_raises(KeyError("lost"))
    assert main(["build"]) == errors.EXIT_BUG
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    named = re.fullmatch(r"this is a bug in mpk-spec: KeyError: 'lost'; the log is (.*)\n", shown)
    log = Path(named[1])
    assert log.parent == own_cache / "logs"
    text = log.read_text()
    assert "arguments: ['build']" in text
    assert "in command\n    raise error\nKeyError: 'lost'" in text


def test_exit_3_shows_the_traceback_where_no_log_can_be_written(capsys, build_raises, own_cache):
    own_cache.write_text("a file where the folder should be")
    build_raises(KeyError("lost"))
    assert main(["build"]) == errors.EXIT_BUG
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "its log could not be written" in shown


def test_exit_4_for_a_verdict_that_failed(capsys, build_raises):
    build_raises(errors.VerdictFailed("2 of 9 checks failed"))
    assert main(["build"]) == errors.EXIT_VERDICT
    assert capsys.readouterr().err == "error: 2 of 9 checks failed\n"


def test_exit_130_when_interrupted(capsys, build_raises):
    build_raises(KeyboardInterrupt())
    assert main(["build"]) == errors.EXIT_INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


def test_a_real_ctrl_c_ends_with_130_and_one_line(tmp_path):
    slow = (
        "import time; from mpk_spec.cli import build, main\n"
        "def command():\n  print('ready', flush=True); time.sleep(30)\n"
        "build.command = command; main.run()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, "build"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=20)
    assert (process.returncode, shown) == (130, "interrupted\n")


def test_a_reader_that_goes_away_is_no_error():
    script = "from mpk_spec.cli import build, main\n"
    script += "def command():\n  [print('x' * 1000) for _ in range(1000)]\nbuild.command = command; main.run()"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "build"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=20) == errors.EXIT_OK


@pytest.mark.parametrize(
    "command", [["tune"], ["tune", "--calibrate"], ["profile"], ["profile", "--tp", "2"]], ids=" ".join
)
def test_what_measures_the_kernel_offers_no_cpu(monkeypatch, capsys, command):
    """These commands have no --backend."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    asked = [command[0], "qwen3", "--size", "tiny", "--weights", "random:0", *command[1:]]
    assert main(asked) == errors.EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert "this measures the kernel: it needs a GPU" in said and "--backend" not in said


def test_the_readme_has_the_table_of_exit_codes():
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {int(code): meaning for code, meaning in rows} == errors.EXIT_CODES


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(capsys, name):
    assert main([name, "-h"]) == errors.EXIT_OK
    short = capsys.readouterr().out
    assert short.startswith(f"Usage: mpk-spec {name} ")
    assert main([name, "--help"]) == errors.EXIT_OK
    assert capsys.readouterr().out == short


def test_help_lists_every_command(capsys):
    assert main(["-h"]) == errors.EXIT_OK
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\S", shown, re.MULTILINE) for name in COMMANDS)


def test_help_imports_nothing_heavy():
    script = "import sys; from mpk_spec.cli.main import COMMANDS, main\n"
    script += "for name in ['', *COMMANDS]: main([name, '-h'] if name else ['-h'])\n"
    script += "print(*{'torch', 'transformers', 'numpy', 'yaml', 'jinja2'} & set(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == "\n"


def test_help_answers_at_once():
    def once() -> float:
        started = time.perf_counter()
        program("--help")
        return time.perf_counter() - started

    assert min(once() for _ in range(3)) < 1.0  # 0.15 s on an idle machine; importing torch alone takes longer


def test_the_shell_completes_commands():
    shown = program(_MPK_SPEC_COMPLETE="complete_bash", COMP_WORDS="mpk-spec c", COMP_CWORD="1").stdout.split()
    assert shown == ["chat", "compare", "cache"]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("chat smo", ["smollm2"]),
        ("test qwen3", ["qwen3", "qwen3_moe"]),
        ("chat smollm2 --backend c", ["cuda", "cpu"]),
        ("bench smollm2 --spec l", ["llama3"]),
        ("plan qwen3 --target h", ["h100", "h200"]),
        ("plan ./my", []),  # a file: the shell's own business
    ],
)
def test_the_shell_completes_names(words, offered):
    line = f"mpk-spec {words}"
    cword = str(line.count(" "))
    assert program(_MPK_SPEC_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=cword).stdout.split() == offered


def test_the_program_runs_from_a_source_tree(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mpk_spec", "--version"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, "")
