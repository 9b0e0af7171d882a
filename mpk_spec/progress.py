"""How what takes long says how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # (stage, done, total), from any thread; total 0 where it is not known


def quiet(stage: str, done: int, total: int) -> None:
    """For whoever does not want to know."""
