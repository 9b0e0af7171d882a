"""The processes of several ranks, on any machine: calls, errors, and what happens when a rank ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_rank
import pytest

from mpk_spec.errors import UserError
from mpk_spec.planner import plan
from mpk_spec.runtime.parallel_backend import ParallelBackend
from mpk_spec.runtime.ranks import RankLost, Ranks
from mpk_spec.schema import load_spec

SOON_S = 8.0


@pytest.fixture
def ranks():
    made = Ranks(2)
    yield made
    made.close()
    assert all(process.poll() is not None for process in made.processes)


def ended(pid: int) -> bool:
    """Whether a process is gone; one that nobody has waited for yet counts."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_every_rank_has_an_object_and_answers(ranks):
    ranks.open(fake_rank.Plain, "given")
    assert ranks.call("place") == [(0, 2, ("given",)), (1, 2, ("given",))]
    assert len(set(ranks.call("process"))) == 2


def test_an_error_names_its_rank_and_the_ranks_go_on(ranks):
    ranks.open(fake_rank.Plain)
    with pytest.raises(UserError) as error:
        ranks.call("refuse", 1)
    assert (error.value.message, error.value.hint) == ("rank 1: rank 1 cannot", "but another could")
    with pytest.raises(UserError, match="rank 0: rank 0 cannot; rank 1: rank 1 cannot"):
        ranks.call("refuse", 0, 1)
    assert ranks.call("place")[1][0] == 1


def test_a_bug_of_another_rank_comes_with_its_traceback(ranks):
    ranks.open(fake_rank.Plain)
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 failed:.*ZeroDivisionError: a bug"):
        ranks.call("break_down", 1)


def test_a_rank_that_ends_in_a_call_ends_the_call(ranks):
    ranks.open(fake_rank.Plain)
    started = time.monotonic()
    with pytest.raises(RankLost, match="rank 1 ended with exit code 7"):
        ranks.call("end", 1, 7)
    assert time.monotonic() - started < SOON_S
    with pytest.raises(RankLost):
        ranks.call("place")


def test_a_rank_that_is_killed_between_calls_is_noticed(ranks):
    ranks.open(fake_rank.Plain)
    os.kill(ranks.processes[0].pid, signal.SIGKILL)
    deadline = time.monotonic() + SOON_S
    while ranks.lost is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ranks.lost == "rank 1 was killed by SIGKILL"
    assert ranks.local.aborted.is_set()


def test_a_rank_that_has_closed_is_not_lost():
    ranks = Ranks(2)
    ranks.open(fake_rank.SlowToClose)
    ranks.close()
    assert ranks.lost is None
    assert [process.returncode for process in ranks.processes] == [0]


def test_of_three_ranks_the_third_ends_too():
    three = Ranks(3)
    three.open(fake_rank.Plain)
    pids = three.call("process")
    os.kill(pids[1], signal.SIGKILL)
    deadline = time.monotonic() + SOON_S
    while not ended(pids[2]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ended(pids[2])
    three.close()


HANGING = """
import fake_rank
from mpk_spec.runtime.ranks import Ranks
ranks = Ranks(2)
ranks.open(fake_rank.Plain)
print(ranks.processes[0].pid, flush=True)
ranks.call("hang", {others})
"""


def hanging(others: bool) -> tuple[subprocess.Popen, int]:
    return started(HANGING.format(others=others))


def started(program: str, **how) -> tuple[subprocess.Popen, int]:
    """A process that is rank 0, and the process id of rank 1, which it prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        **how,
    )  # fmt: skip
    return process, int(process.stdout.readline())


def test_rank_0_ends_even_inside_a_library_that_waits_for_the_lost_rank():
    process, other = hanging(False)
    os.kill(other, signal.SIGKILL)
    _, said = process.communicate(timeout=SOON_S)
    assert process.returncode == 1
    assert "rank 1 was killed by SIGKILL" in said


@pytest.mark.parametrize("others", [False, True], ids=["idle", "inside a library"])
def test_no_rank_outlives_rank_0(others):
    process, other = hanging(others)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + SOON_S
    while not ended(other) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ended(other)


INTERRUPTED = """
import signal
import sys
import fake_rank
from mpk_spec.cli.boundary import guarded
from mpk_spec.runtime.ranks import Ranks

def work():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start what runs in the background without
    ranks = Ranks(2)
    ranks.open(fake_rank.Plain)
    print(ranks.processes[0].pid, flush=True)
    ranks.call("hang", False)

sys.exit(guarded(work))
"""


def test_ctrl_c_reaches_all_ranks():
    """A terminal sends it to every process of the group: rank 0 ends, and the others since it does."""
    process, other = started(INTERRUPTED, start_new_session=True)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=SOON_S)
    assert (process.returncode, said) == (130, "interrupted\n")
    deadline = time.monotonic() + SOON_S
    while not ended(other) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ended(other)


def test_a_rank_that_does_not_start_is_named(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="rank 1 ended with exit code 1 before it was ready"):
        Ranks(2)


def test_torchrun_with_another_number_of_ranks_is_refused(monkeypatch):
    for name, value in {"WORLD_SIZE": "4", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="torchrun started 4 processes for 2 ranks"):
        Ranks(2)


# --- the backend on top ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return plan(load_spec("qwen3"), size="tiny", target="h200", context=256, tp=2)


@pytest.fixture
def backend(tiny):
    made = ParallelBackend(tiny, None, make=fake_rank.Cuda)
    yield made
    made.close()


def test_the_backend_streams_and_keeps_what_it_has_seen(backend):
    assert list(backend.stream([5, 6], max_new_tokens=3)) == [7, 8, 9]
    assert backend._cached == [5, 6, 7, 8]
    assert list(backend.stream([5, 6, 7, 8, 9, 40], max_new_tokens=1)) == [41]


def test_an_answer_can_be_broken_off(backend):
    tokens = backend.stream([1], max_new_tokens=100)
    assert [next(tokens), next(tokens)] == [2, 3]
    tokens.close()
    assert list(backend.stream([1], max_new_tokens=2)) == [2, 3]


def test_logits_are_every_ranks_share_of_the_vocabulary(backend):
    found = backend.logits([1, 2, 3])
    assert tuple(found.shape) == (3, 515)
    assert found[0].tolist() == [0.0] * 258 + [1.0] * 257


def test_a_rank_killed_in_the_middle_of_an_answer_ends_it(backend):
    tokens = backend.stream([1], max_new_tokens=900)
    next(tokens)
    started = time.monotonic()
    os.kill(backend.ranks.processes[0].pid, signal.SIGKILL)
    with pytest.raises(RankLost, match=r"rank 1 was killed by SIGKILL; the kernel was aborted: event 'o_add\.done'"):
        list(tokens)
    assert time.monotonic() - started < SOON_S


UNDER_TORCHRUN = """
import os
import sys
import fake_rank
from mpk_spec.runtime import follower
from mpk_spec.runtime.ranks import Ranks
if os.environ["RANK"] != "0":
    follower.run()
ranks = Ranks(3)
ranks.open(fake_rank.Plain)
print([answer[0] for answer in ranks.call("place")], len(ranks.processes))
ranks.close()
"""


def test_torchrun_can_start_the_ranks(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(UNDER_TORCHRUN)
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "3", "--master-port", "29533", str(program)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[0, 1, 2] 0"


def test_ranks_that_a_command_does_not_need_end_with_it():
    """Under torchrun, on a machine without GPUs say: the others wait for a call that never comes."""
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29534", "-m", "mpk_spec"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, *command, "--version"], env=environment, capture_output=True, text=True, timeout=30
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("mpk-spec ") and len(done.stdout.splitlines()) == 1
