"""Rank 0's hold on the others: starts their processes, has one object on every rank, calls its methods everywhere.

Calls are made by rank 0 alone, one after the other, and every rank answers each. A rank that ends is noticed at once,
by a thread: it aborts what runs here, cuts the other ranks off (which then do the same), and if rank 0 does not come
back from what it was waiting for, ends the process.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from mpk_spec.errors import EXIT_BAD_INPUT, MpkSpecError, UserError
from mpk_spec.runtime import links
from mpk_spec.runtime.links import HOST, Place

GRACE_S = 5.0  # for what waits for a lost rank to give up by itself
ANSWER_S = 30.0  # for the other ranks to say that they failed too


class RankLost(MpkSpecError):
    """A rank ended in the middle of the work: the others cannot go on. Exit code 1."""

    exit_code = EXIT_BAD_INPUT


class Ranks:
    """The processes of all ranks; this one is rank 0. `make(rank, ranks, *args)` makes each rank's object."""

    gathered = False  # ever, by this process

    def __init__(self, ranks: int):
        self.ranks, self.lost, self.lost_at, self.local = ranks, None, 0.0, None
        self.processes: list[subprocess.Popen] = []
        self.links: list = []
        self._busy, self._number, self._lock = False, 0, threading.Lock()
        place = Place.from_environment()
        if place is not None and place.ranks != ranks:
            raise UserError(
                f"torchrun started {place.ranks} processes for {ranks} ranks", f"torchrun --nproc-per-node {ranks}"
            )
        try:
            Ranks.gathered = True
            self._store = place.store() if place else self._start()
            self.links = links.accept(self._store, ranks, self._check_started)
        except BaseException:
            self.kill()
            raise
        self._watch = links.watch(dict(enumerate(self.links, 1)), self._lose)

    def _start(self):
        """Starts the other ranks as processes of our own, as torchrun would."""
        from torch.distributed import TCPStore

        store = TCPStore(HOST, 0, self.ranks, True, wait_for_workers=False)
        common = {
            **os.environ, "WORLD_SIZE": str(self.ranks), "LOCAL_WORLD_SIZE": str(self.ranks), "MASTER_ADDR": HOST,
            "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
            "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
        }  # fmt: skip
        command = [sys.executable, "-m", "mpk_spec.runtime.follower"]
        for rank in range(1, self.ranks):
            variables = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            # standard output is rank 0's: whatever else prints goes to standard error
            process = subprocess.Popen(command, env=variables, stdin=subprocess.DEVNULL, stdout=2)
            self.processes.append(process)
        return store

    def _check_started(self) -> None:
        for rank, process in enumerate(self.processes, 1):
            if process.poll() is not None:
                raise UserError(f"rank {rank} {ending(process.returncode)} before it was ready")

    # calls

    def open(self, make: Callable[..., Any], *args: Any) -> None:
        """Makes every rank's object. `make` is found by name on the other ranks, so it belongs to a module."""
        self.call("open", make, self.ranks, args)

    def call(self, method: str, *args: Any) -> list[Any]:
        """The method's results by rank. Raises UserError with what each rank says that failed, and RankLost."""
        self.check()
        self._busy = True
        self._number += 1
        try:
            for rank, link in enumerate(self.links, 1):
                self._send(rank, link, (self._number, method, args))
            results, errors = [None] * self.ranks, {}
            try:
                results[0] = self._local(method, args)
            except UserError as error:
                errors[0] = error
            except RuntimeError:  # perhaps what a lost rank leaves behind
                self._wait_for_news()
                raise
            deadline = time.monotonic() + ANSWER_S if errors else None
            for rank, link in enumerate(self.links, 1):
                kind, value = self._answer(rank, link, deadline)
                if kind == "error":
                    errors[rank] = UserError(*value)
                    deadline = deadline or time.monotonic() + ANSWER_S
                elif kind == "bug":
                    raise RuntimeError(f"rank {rank} failed:\n{value}")
                else:
                    results[rank] = value
            self.check()
            if errors:
                raise together(errors)
            return results
        finally:
            self._busy = False

    def _local(self, method: str, args: tuple) -> Any:
        if method == "open":
            make, ranks, more = args
            self.local = make(0, ranks, *more)
            return None
        return getattr(self.local, method)(*args)

    def _send(self, rank: int, link, message: Any) -> None:
        try:
            links.send(link, message)
        except OSError:
            self._gone(rank)

    def _answer(self, rank: int, link, deadline: float | None):
        """The answer to the last call; those to calls that were broken off are passed over."""
        while True:
            try:
                while not link.poll(0.1):
                    self.check()
                    if deadline is not None and time.monotonic() > deadline:
                        self._lose(rank, f"rank {rank} did not answer within {ANSWER_S:.0f} s")
                number, kind, value = links.receive(link)
            except (OSError, EOFError):
                self._gone(rank)
            if number == self._number:
                return kind, value

    # endings

    def check(self) -> None:
        """Raises RankLost once a rank is lost."""
        if self.lost is not None:
            raise RankLost(self.lost)

    def check_stuck(self) -> None:
        """Raises RankLost where a rank was lost so long ago that what runs here should have ended by itself."""
        if self.lost is not None and time.monotonic() > self.lost_at + GRACE_S:
            raise RankLost(f"{self.lost}; the kernel here does not end")

    def _wait_for_news(self) -> None:
        """Gives the watching thread time to notice that a rank has ended; raises RankLost if one has."""
        deadline = time.monotonic() + 2.0
        while self.lost is None and time.monotonic() < deadline:
            time.sleep(0.05)
        self.check()

    def _gone(self, rank: int) -> None:
        self._lose(rank)
        self.check()

    def _lose(self, rank: int, why: str | None = None) -> None:
        """Called by the watching thread or by whoever notices first."""
        with self._lock:
            if self.lost is not None:
                return
            why = why or f"rank {rank} {self._ending(rank)}"
            self.lost_at, self.lost = time.monotonic(), why
        atexit.register(signal.alarm, int(GRACE_S))  # libraries that wait for the lost rank must not keep us alive
        abort = getattr(self.local, "abort", None)
        if abort is not None:
            abort()
        for link in self.links:
            links.cut(link)
        threading.Thread(target=self._give_up, daemon=True).start()

    def _ending(self, rank: int) -> str:
        if not self.processes:
            return "ended"
        try:
            return ending(self.processes[rank - 1].wait(1.0))
        except subprocess.TimeoutExpired:
            return "closed its connection"

    def _give_up(self) -> None:
        """Ends the process where a call does not come back, inside a library that waits for the lost rank, say."""
        deadline = time.monotonic() + GRACE_S
        while self._busy:
            if time.monotonic() > deadline:
                print(f"error: {self.lost}; what waits for it here cannot be broken off", file=sys.stderr, flush=True)
                self.kill()
                os._exit(EXIT_BAD_INPUT)
            time.sleep(0.1)

    def close(self) -> None:
        """Frees what every rank holds and ends the other ranks' processes."""
        try:
            if self.lost is None and self.links:
                self.call("close")
        finally:
            if self.links:
                self._watch.set()
            self.kill()

    def kill(self) -> None:
        """Cuts the links, which ends the processes behind them, and makes sure of those that we started."""
        for link in self.links:
            links.cut(link)
        self.links = []
        deadline = time.monotonic() + GRACE_S
        for process in self.processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def ending(code: int) -> str:
    """How a process ended, for people."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def together(errors: dict[int, UserError]) -> UserError:
    """One error of several ranks'."""
    messages = {error.message for error in errors.values()}
    hint = next((e.hint for e in errors.values() if e.hint), None)
    if len(messages) == 1 and len(errors) > 1:
        return UserError(messages.pop(), hint)
    return UserError("; ".join(f"rank {rank}: {error.message}" for rank, error in sorted(errors.items())), hint)
