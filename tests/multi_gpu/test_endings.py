"""What happens to two ranks when one stands still or ends, and how the commands start and end them.

Each group of ranks has a process of its own as rank 0: NVSHMEM is joined once in a process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from tiny_ranks import alive

from mpk_spec.errors import UserError

pytestmark = pytest.mark.multi_gpu

IDS = list(range(40, 60))
CHAT = ["chat", "qwen3", "--size", "tiny", "--weights", "random:0", "--backend", "cuda", "-c", "256", "-p", "hello"]
MPK = [sys.executable, "-m", "mpk_spec"]


def environment() -> dict[str, str]:
    """Without what would make NVSHMEM talk on standard output, which is read here."""
    kept = {name: value for name, value in os.environ.items() if name != "NVSHMEM_DEBUG"}
    return {**kept, "PYTHONPATH": os.pathsep.join(sys.path)}


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=90, stdin=subprocess.DEVNULL
    )  # fmt: skip


def free_memory() -> list[int]:
    """Bytes on each of the two GPUs."""
    import torch

    return [torch.cuda.mem_get_info(gpu)[0] for gpu in range(2)]


def check_freed(before: list[int]) -> None:
    """All that the ranks had is free again, soon after they have ended."""
    slack, deadline = 64 << 20, time.monotonic() + 10.0
    while (now := free_memory()) and any(a < b - slack for a, b in zip(now, before, strict=True)):
        assert time.monotonic() < deadline, f"free before the ranks: {before}, after them: {now}"
        time.sleep(0.1)


def test_an_abort_is_said_and_the_ranks_start_again(backend):
    whole = list(backend.stream(IDS, max_new_tokens=20))
    tokens = backend.stream(IDS, max_new_tokens=200)
    next(tokens)
    backend.ranks.local.abort()
    with pytest.raises(UserError, match="the kernel was aborted: SM"):
        list(tokens)
    assert list(backend.stream(IDS, max_new_tokens=20)) == whole


KILL = """
import os, signal, time
from tiny_ranks import open_tiny
from mpk_spec.runtime.ranks import RankLost

backend = open_tiny(2)
other = backend.ranks.processes[0].pid
tokens = backend.stream(list(range(40, 60)), max_new_tokens=230)
next(tokens)
started = time.monotonic()
os.kill(other, signal.SIGKILL)
try:
    while True:  # an answer is over in milliseconds: go on until one is broken off
        list(tokens)
        tokens = backend.stream(list(range(40, 60)), max_new_tokens=230)
except RankLost as error:
    print(f"{time.monotonic() - started:.1f} {error}", flush=True)
"""


def test_a_rank_killed_in_the_middle_of_an_answer(two_gpus, transport):
    before = free_memory()
    done = run(sys.executable, "-c", KILL)
    assert done.returncode == 0, done.stderr
    seconds, _, said = done.stdout.strip().partition(" ")
    assert float(seconds) < 5.0
    assert said.startswith("rank 1 was killed by SIGKILL")
    check_freed(before)


FOREVER = """
from tiny_ranks import open_tiny

backend = open_tiny(2)
print(backend.ranks.processes[0].pid, flush=True)
while True:
    list(backend.stream(list(range(40, 60)), max_new_tokens=200))
"""


def test_no_rank_outlives_rank_0(two_gpus, transport):
    before = free_memory()
    process = subprocess.Popen([sys.executable, "-c", FOREVER], env=environment(), text=True, stdout=subprocess.PIPE)
    try:
        other = int(process.stdout.readline())
        time.sleep(0.5)
    finally:
        process.kill()
        process.communicate()
    deadline = time.monotonic() + 10.0
    while alive(other) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(other)
    check_freed(before)


DELAYS = """
from tiny_ranks import open_tiny, same_bits_with_delays

backend = open_tiny(2, ("MPK_DELAYS",))
same_bits_with_delays(backend)
backend.close()
"""


def test_random_delays_change_no_bit(two_gpus, transport):
    done = run(sys.executable, "-c", DELAYS)
    assert done.returncode == 0, done.stderr


def test_chat_starts_its_own_ranks_and_so_does_torchrun(two_gpus, transport):
    ours = run(*MPK, *CHAT, "-n", "12", "--tp", "2")
    assert ours.returncode == 0, ours.stderr
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29511"]
    theirs = run(*launcher, "-m", "mpk_spec", *CHAT, "-n", "12")
    assert theirs.returncode == 0, theirs.stderr
    assert ours.stdout == theirs.stdout
    assert ours.stdout.strip()


def test_a_build_answers_as_its_spec_does(two_gpus, tmp_path):
    from mpk_spec.runtime.select import target_here

    folder, target = str(tmp_path / "built"), target_here()[0].name
    made = run(*MPK, "build", "qwen3", "--size", "tiny", "-c", "256", "--tp", "2", "--target", target, "-o", folder)
    assert made.returncode == 0, made.stderr
    ours = run(*MPK, *CHAT, "-n", "12", "--tp", "2")
    theirs = run(*MPK, "chat", folder, "--weights", "random:0", "-p", "hello", "-n", "12")
    assert theirs.returncode == 0, theirs.stderr
    assert ours.stdout == theirs.stdout
    assert ours.stdout.strip()


def test_no_further_from_float32_than_hugging_face_in_bf16(two_gpus, transport):
    options = ["--weights", "random:0", "--backend", "cuda", "--tp", "2", "--positions", "1000"]
    done = run(*MPK, "compare", "qwen3", "--size", "tiny", *options)
    assert done.returncode == 0, done.stdout + done.stderr


def test_more_ranks_than_gpus_are_refused(two_gpus):
    import torch

    degree = "4" if torch.cuda.device_count() < 4 else "8"
    if torch.cuda.device_count() >= int(degree):
        pytest.skip(f"this machine has {torch.cuda.device_count()} GPUs")
    refused = run(*MPK, *CHAT, "--tp", degree)
    assert refused.returncode == 1
    assert f"{degree} ranks need {degree} GPUs" in refused.stderr
