"""In the place of `runtime.ranks.Ranks`: all ranks' objects in this process, called one after the other."""

from __future__ import annotations


class RanksHere:
    lost, processes = None, ()

    def __init__(self, ranks: int):
        self.ranks = range(ranks)

    def open(self, make, *arguments) -> None:
        self.objects = [make(rank, len(self.ranks), *arguments) for rank in self.ranks]
        self.local = self.objects[0]

    def call(self, method: str, *arguments) -> list:
        return [getattr(o, method)(*arguments) for o in self.objects]

    def check_stuck(self) -> None:
        pass

    def close(self) -> None:
        self.call("close")

    def kill(self) -> None:
        self.objects = []
