"""What happens to two ranks when one stands still or ends, and how the commands start and end them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from tiny_ranks import alive, open_on

from mpk_spec.errors import UserError
from mpk_spec.runtime.ranks import RankLost

pytestmark = [pytest.mark.multi_gpu, pytest.mark.timeout(120)]

IDS = list(range(40, 60))
CHAT = ["chat", "qwen3", "--size", "tiny", "--weights", "random:0", "--backend", "cuda", "-c", "256", "-p", "hello"]


def test_an_abort_is_said_and_the_ranks_start_again(backend):
    whole = list(backend.stream(IDS, max_new_tokens=20))
    tokens = backend.stream(IDS, max_new_tokens=200)
    next(tokens)
    backend.ranks.local.abort()
    with pytest.raises(UserError, match="the kernel was aborted: SM"):
        list(tokens)
    assert list(backend.stream(IDS, max_new_tokens=20)) == whole


def test_a_rank_killed_in_the_middle_of_an_answer(two_gpus, checkpoint):
    backend = open_on(2, checkpoint)
    other = backend.ranks.processes[0].pid
    said = None
    for _ in range(50):  # answers are short: begin until one is broken off
        tokens = backend.stream(IDS, max_new_tokens=230)
        next(tokens)
        started = time.monotonic()
        os.kill(other, signal.SIGKILL)
        try:
            list(tokens)
        except RankLost as error:
            said = str(error)
            break
    assert said is not None
    assert time.monotonic() - started < 5.0
    assert "rank 1 was killed by SIGKILL" in said
    assert not alive(other)
    with pytest.raises(RankLost):
        list(backend.stream(IDS, max_new_tokens=2))
    backend.close()


PROGRAM = """
import sys
sys.path.insert(0, {folder!r})
from tiny_ranks import open_on, SPEC, SIZE, SEED
from mpk_spec.runtime.random_model import random_checkpoint
from mpk_spec.schema import load_spec
backend = open_on(2, random_checkpoint(load_spec(SPEC), SIZE, SEED))
print(backend.ranks.processes[0].pid, flush=True)
while True:
    list(backend.stream(list(range(40, 60)), max_new_tokens=200))
"""


def test_no_rank_outlives_rank_0(two_gpus):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    program = PROGRAM.format(folder=os.path.dirname(__file__))
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, text=True, stdout=subprocess.PIPE
    )  # fmt: skip
    other = int(process.stdout.readline())
    time.sleep(0.5)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10.0
    while alive(other) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(other)


def run(*command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=90, stdin=subprocess.DEVNULL
    )  # fmt: skip


def test_chat_starts_its_own_ranks_and_so_does_torchrun(two_gpus):
    ours = run(sys.executable, "-m", "mpk_spec", *CHAT, "-n", "12", "--tp", "2")
    assert ours.returncode == 0, ours.stderr
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29511"]
    theirs = run(*launcher, "-m", "mpk_spec", *CHAT, "-n", "12")
    assert theirs.returncode == 0, theirs.stderr
    assert ours.stdout == theirs.stdout
    assert ours.stdout.strip()


def test_more_ranks_than_gpus_are_refused(two_gpus):
    import torch

    degree = "4" if torch.cuda.device_count() < 4 else "8"
    if torch.cuda.device_count() >= int(degree):
        pytest.skip(f"this machine has {torch.cuda.device_count()} GPUs")
    refused = run(sys.executable, "-m", "mpk_spec", *CHAT, "--tp", degree)
    assert refused.returncode == 1
    assert f"{degree} ranks need {degree} GPUs" in refused.stderr
