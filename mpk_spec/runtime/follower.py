"""The process of a rank other than 0: does what rank 0 says until it says "close" or is gone.

Started by `runtime.ranks` as `python -m mpk_spec.runtime.follower`, or by torchrun as `python -m mpk_spec ...`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from typing import Any

from mpk_spec.errors import EXIT_BAD_INPUT, EXIT_OK, UserError
from mpk_spec.runtime import links
from mpk_spec.runtime.links import Place
from mpk_spec.runtime.ranks import GRACE_S, Ranks


def main() -> int:
    """Runs this rank; returns the process's exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for rank 0, which tells us what comes of it
    place = Place.from_environment()
    if place is None:
        raise UserError("this process belongs to no group of ranks: it is started by mpk-spec or torchrun")
    link = links.connect(place.store(), place.rank)
    return EXIT_OK if link is None else Follower(place.rank, link).run()


def dismiss() -> None:
    """For rank 0 at its end: after a command that called no rank (on the CPU, say), torchrun's others must not wait."""
    place = Place.from_environment()
    if place is not None and not Ranks.gathered:
        links.dismiss(place.store())


class Follower:
    """Holds one rank's object and answers calls of its methods."""

    def __init__(self, rank: int, link):
        self.rank, self.link, self.held = rank, link, None

    def run(self) -> int:
        over = links.watch({0: self.link}, self._alone)
        while True:
            try:
                number, method, args = links.receive(self.link)
            except (OSError, EOFError):
                return EXIT_BAD_INPUT
            if method == "close":
                over.set()
            answer = self._answer(method, args)
            try:
                links.send(self.link, (number, *answer))
            except OSError:
                return EXIT_BAD_INPUT
            if method == "close":
                self.link.poll(GRACE_S)  # until rank 0 hangs up: ending any sooner would look like an accident to it
                return EXIT_OK

    def _answer(self, method: str, args: tuple) -> tuple[str, Any]:
        """("ok", result), ("error", message and hint) or ("bug", traceback)."""
        try:
            if method == "open":
                make, ranks, more = args
                self.held = make(self.rank, ranks, *more)
                return "ok", None
            return "ok", getattr(self.held, method)(*args)
        except UserError as error:
            return "error", (error.message, error.hint)
        except Exception:  # a bug, which rank 0 reports
            return "bug", traceback.format_exc()

    def _alone(self, _: int) -> None:
        """Rank 0 is gone, or has given up: stop what runs, and end, also from inside a library that waits."""
        abort = getattr(self.held, "abort", None)
        if abort is not None:
            abort()
        time.sleep(GRACE_S)
        print(f"rank {self.rank}: rank 0 is gone", file=sys.stderr, flush=True)
        os._exit(EXIT_BAD_INPUT)


def run() -> None:
    """The process from begin to end: all is freed or lost when it ends, so that no library gets to wait once more."""
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
