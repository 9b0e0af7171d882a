"""Tiny random models and the truth about them, worked out once a run."""

from __future__ import annotations

from functools import cache

SHORT, LONG = 48, 512


@cache
def spec_of(name: str):
    from mpk_spec.schema import load_spec

    return load_spec(name)


@cache
def checkpoint_of(name: str):
    from mpk_spec.runtime.random_model import random_checkpoint

    return random_checkpoint(spec_of(name), "tiny", 0)


@cache
def yardstick_of(name: str, context: int):
    """Six short sequences, or one long one."""
    from mpk_spec.testing.yardstick import Yardstick, sequences

    count = 6 if context == SHORT else 1
    return Yardstick(checkpoint_of(name), sequences(515, count * context, count, context))


def verdict_of(name: str, context: int, defect=None, tp: int = 1):
    from mpk_spec.testing.ours import open_ours

    yardstick = yardstick_of(name, context)
    with yardstick.threads():
        return yardstick.judge(open_ours(spec_of(name), "tiny", checkpoint_of(name), "cpu", context, tp, defect))
