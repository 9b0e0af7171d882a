"""Recorded cycles of 132 clocks -> microseconds of one.

A task's times are cycles of its SM's clock, and once per task the GPU's common nanosecond timer was read with it. Where
that timer is coarse (a microsecond on some GPUs), the difference of the two clocks is averaged over neighbouring tasks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from mpk_spec.errors import UserError

FINE_NS = 64  # a timer that ticks this often is used as it is
NEIGHBOURS = 8  # tasks before and after that a coarse one is averaged with
PHASES = ("wait event", "wait values", "wait weights", "compute", "epilogue", "signal")
OFF_PATH = ("signal",)  # phases during which the SM's workers are with their next task


@dataclass(frozen=True)
class Copies:
    """The copies of all SMs' loaders, `[copy]`. at: when each was issued, in microseconds."""

    at: np.ndarray
    bytes: np.ndarray


@dataclass(frozen=True)
class Times:
    """float64 `[step, SM, stage, place]`, NaN where the SM has no such task. Microseconds from the first record on.

    `seen`: the inputs are there, prepared; values that cross as data were looked at from `ready` on until then. In that
    time a linear also waits for its first weights, before it looks. `waited` is a duration, what the task waited for
    weights or the cache after that (attention: once it was ready), all before `computed`;
    `opened` may come before that, where an attention takes its first keys ahead of its event. `copies`: what the
    loaders asked memory for, if that was recorded too.
    """

    asked: np.ndarray
    ready: np.ndarray
    seen: np.ndarray
    opened: np.ndarray
    waited: np.ndarray
    computed: np.ndarray
    stored: np.ndarray
    signalled: np.ndarray
    copies: Copies | None = None

    def shifted(self, us: float) -> Times:
        """The same by a clock that shows `us` less."""
        moments = {f.name: getattr(self, f.name) - us for f in fields(self) if f.name not in ("waited", "copies")}
        return replace(self, **moments, copies=self.copies and replace(self.copies, at=self.copies.at - us))

    def phases(self) -> np.ndarray:
        """`[PHASES, step, SM, stage, place]`: durations that add up to asked..signalled."""
        return np.stack(
            [
                self.ready - self.asked,
                self.seen - self.ready,
                self.waited,
                self.computed - self.seen - self.waited,
                self.stored - self.computed,
                self.signalled - self.stored,
            ]
        )


def common_clock(raw: np.ndarray, copies: np.ndarray | None = None) -> Times:
    """`raw`: `cuda_probe.TIMES` `[step, SM, stage, place]`; copies: `cuda_probe.COPIES` of the same steps.

    Raises UserError where nothing was recorded.
    """
    there = raw["signalled"] != 0
    if not there.any():
        raise UserError("the profile is empty: none of the steps to record was run", "run more tokens")
    us_per_cycle, zero = _rate(raw, there), raw["global_ns"][there].min()
    first = np.where(there, raw["asked"], np.iinfo(np.uint64).max).min((0, 2, 3), keepdims=True)  # of each SM
    asked = (raw["asked"] - first).astype(np.float64) * us_per_cycle
    apart = (raw["global_ns"] - zero).astype(np.float64) / 1e3 - asked
    if _tick(raw["global_ns"][there]) > FINE_NS:
        apart = _smooth(apart, there)
    origin = asked + apart

    def at(name: str, *instead: str) -> np.ndarray:
        """`name`, or the first of `instead` that a task came by which did not come by `name`."""
        cycles = raw[name]
        for other in instead:
            cycles = np.where(cycles != 0, cycles, raw[other])
        return np.where(there, origin + (cycles - raw["asked"]).astype(np.float64) * us_per_cycle, np.nan)

    times = Times(
        asked=np.where(there, origin, np.nan),
        ready=at("ready", "asked"),
        seen=at("seen", "ready", "asked"),
        opened=at("opened", "seen", "ready", "asked"),
        waited=np.where(there, raw["waited"].astype(np.float64) * us_per_cycle, np.nan),
        computed=at("computed", "stored", "signalled"),
        stored=at("stored", "signalled"),
        signalled=at("signalled", "asked"),
    )
    return times if copies is None else replace(times, copies=_by_tasks(copies, raw, times))


def _by_tasks(copies: np.ndarray, raw: np.ndarray, times: Times) -> Copies:
    """Copies know the lower half of their SM's clock: they lie between what its tasks are known to have done before and
    after them. Those before an SM's first task and after its last are left out.
    """
    found = []
    for sm, own in enumerate(copies):
        own = own[own["bytes"] != 0]
        there = raw["signalled"][:, sm] != 0
        cycles = np.concatenate([raw[name][:, sm][there] for name in ("asked", "signalled")])
        us = np.concatenate([getattr(times, name)[:, sm][there] for name in ("asked", "signalled")])
        if not len(cycles):
            continue
        order = np.argsort(cycles)
        tasks = (cycles[order] - cycles[order[0]]).astype(np.int64)
        apart = (own["clock"] - cycles[order[0]].astype(np.uint32)).view(np.int32).astype(np.int64)
        inside = (apart >= 0) & (apart <= tasks[-1])
        at = np.interp(apart[inside], tasks, us[order])
        found.append((at, own["bytes"][inside].astype(np.float64)))
    nothing = (np.zeros(0),) * 2
    return Copies(*(np.concatenate(part) for part in zip(nothing, *found, strict=True)))


def _rate(raw: np.ndarray, there: np.ndarray) -> float:
    """Microseconds per cycle, from the SMs with the longest record: all SMs run at one speed."""
    nanoseconds = cycles = 0
    for sm in range(raw.shape[1]):
        own = raw[:, sm][there[:, sm]]
        if len(own) > 1:
            nanoseconds += int(own["global_ns"].max() - own["global_ns"].min())
            cycles += int(own["asked"].max() - own["asked"].min())
    if not nanoseconds or not cycles:
        raise UserError("the profile is too short: no SM ran two tasks at different times", "record more steps")
    return nanoseconds / 1e3 / cycles


def _tick(values: np.ndarray) -> int:
    """The smallest step of the timer that was seen."""
    steps = np.diff(np.unique(values))
    return int(steps.min()) if len(steps) else 0


def _smooth(apart: np.ndarray, there: np.ndarray) -> np.ndarray:
    """The mean over each task's neighbours on its SM."""
    out = apart.copy()
    window = np.ones(2 * NEIGHBOURS + 1)
    for sm in range(apart.shape[1]):
        own = apart[:, sm][there[:, sm]]
        if not len(own):
            continue
        sums = np.convolve(own, window)[NEIGHBOURS:-NEIGHBOURS]
        counts = np.convolve(np.ones_like(own), window)[NEIGHBOURS:-NEIGHBOURS]
        part = out[:, sm]
        part[there[:, sm]] = sums / counts
    return out
