"""Ranks without a GPU: what `runtime.ranks` and `runtime.parallel_backend` drive, in real processes."""

from __future__ import annotations

import os
import threading
import time
from types import SimpleNamespace

import numpy as np
import torch

from mpk_spec.errors import UserError
from mpk_spec.runtime.transport import Reach


class Plain:
    """A rank that only answers."""

    def __init__(self, rank: int, ranks: int, *given):
        self.rank, self.ranks, self.given = rank, ranks, given
        self.aborted = threading.Event()

    def place(self) -> tuple:
        return self.rank, self.ranks, self.given

    def process(self) -> int:
        return os.getpid()

    def refuse(self, *ranks: int) -> None:
        if self.rank in ranks:
            raise UserError(f"rank {self.rank} cannot", "but another could")

    def break_down(self, rank: int) -> None:
        if self.rank == rank:
            raise ZeroDivisionError("a bug")

    def end(self, rank: int, code: int) -> None:
        if self.rank == rank:
            os._exit(code)
        self.aborted.wait()

    def hang(self, others: bool = False) -> None:
        """As a library that waits for a rank that is gone: nothing gets it out of there."""
        if self.rank == 0 or others:
            time.sleep(1000)

    def abort(self) -> None:
        self.aborted.set()

    def close(self) -> None:
        pass


class SlowToClose(Plain):
    """Rank 0 is still closing when the others have done so."""

    def close(self) -> None:
        time.sleep(0.0 if self.rank else 1.0)


class Launcher:
    """A kernel that counts on from the prompt's last id; it looks at the stop and abort flags."""

    def __init__(self, memory, events: bool):
        self.memory, self.events, self.while_waiting = memory, events, None
        self.steps, self.pending = 0, 0

    def start(self, prompt, position, max_new, stop) -> None:
        self.memory.ring[:32] = 0
        self.last, self.max_new, self.ended = prompt[-1], max_new, False

    def tokens(self):
        for n in range(self.max_new):
            if self.memory.ring[1] or self.memory.ring[2]:
                return
            self.memory.ring[32 + n], self.memory.ring[0] = self.last + 1 + n, n + 1
            yield self.last + 1 + n
            time.sleep(0.01)

    def stop(self) -> None:
        self.memory.ring[1] = 1

    def abort(self) -> None:
        self.memory.ring[2] = 1

    def finish(self) -> int:
        if self.memory.ring[2]:
            raise UserError("the kernel was aborted: event 'o_add.done' of stage 1 stands at 1, wanted 2")
        return 1


class Cuda(Plain):
    """A rank as `CudaRank` is one."""

    progress = None

    def prepare(self, transport: str) -> None:
        self.built = [transport]
        self.emitted, self.compiled = SimpleNamespace(step=SimpleNamespace(stages=())), None

    def unique_id(self) -> bytes:
        return b"id"

    def join(self, unique_id: bytes) -> Reach:
        assert unique_id == b"id"
        return Reach(self.rank)

    def take(self, transport: str) -> None:
        if transport != self.built[-1]:
            self.built.append(transport)

    def kernels(self) -> list[str]:
        return self.built

    def load(self) -> None:
        self.memory = SimpleNamespace(ring=np.zeros(1000, np.int32))
        self.launcher = Launcher(self.memory, self.rank == 0)

    def start(self, *arguments) -> None:
        self.launcher.start(*arguments)

    def finish(self) -> int:
        return self.launcher.finish()

    def abort(self) -> None:
        self.launcher.abort()

    def value(self, name: str, tokens: int) -> torch.Tensor:
        return torch.full((tokens, 258), float(self.rank))


class CutOff(Cuda):
    """Rank 1 does not see rank 0's memory."""

    def join(self, unique_id: bytes) -> Reach:
        return Reach(self.rank, unmapped=(0,)) if self.rank == 1 else Reach(self.rank)
