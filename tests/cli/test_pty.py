"""A chat in a real terminal: line editing, streamed text, Ctrl-C, Ctrl-D."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT_S = 60


class Terminal:
    def __init__(self, *arguments: str):
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mpk_spec", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: _control(theirs),
            env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb", "OMP_NUM_THREADS": "1"},
        )
        os.close(theirs)
        self.seen = ""

    def wait_for(self, text: str) -> None:
        """Reads until `text` appears after what was waited for before."""
        ends = time.monotonic() + LIMIT_S
        while text not in self.seen:
            ready, _, _ = select.select([self._ours], [], [], max(0, ends - time.monotonic()))
            assert ready, f"no {text!r} in {self.seen!r}"
            self.seen += os.read(self._ours, 4096).decode(errors="replace")
        self.seen = self.seen.partition(text)[2]

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())


def _control(terminal: int) -> None:
    """Makes `terminal` the one whose Ctrl-C reaches the process."""
    import fcntl
    import termios

    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


@pytest.mark.slow
def test_a_chat_in_a_terminal():
    chat = Terminal("chat", "qwen3", "--size", "tiny", "--weights", "random:0", "--backend", "torch", "-c", "500")
    try:
        chat.wait_for("/help lists the commands")
        chat.wait_for("> ")
        chat.type("hello\n")
        chat.wait_for("hello")
        time.sleep(0.5)  # into the answer, which ends only where the context does
        chat.type("\x03")
        chat.wait_for("[stopped; what was said stays in the conversation]")
        chat.wait_for("tok/s, first token after")
        chat.wait_for("> ")
        chat.type("/stats\n")
        chat.wait_for("backend: torch, Qwen3ForCausalLM")
        chat.wait_for("> ")
        time.sleep(1)  # a prompt is shown a moment before a key is waited for
        chat.type("\x03")
        chat.wait_for("[Ctrl-C again, Ctrl-D or /exit leaves]")
        chat.wait_for("> ")
        chat.type("\x04")
        assert chat.process.wait(timeout=30) == 0
    finally:
        chat.process.kill()
        chat.process.wait()
