"""The rate at which the loaders asked memory for what they stream: over a token, and operator by operator.

A loader that has as much on its way as it may issues a copy whenever one lands. So what was asked for in a microsecond
is what came in it, but for the time that a copy takes; where less was asked for, memory had less to do.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mpk_spec.planner.plan import Step
from mpk_spec.planner.report import table
from mpk_spec.profiler.clock import Times

BIN_US = 1.0


@dataclass(frozen=True)
class Rate:
    """While most SMs were at one operator's tasks, in microseconds of a token: how long, how much of that time memory's
    whole rate would have needed for what was asked for, and how much more it could have brought.

    Beyond its rate is asked for what lies in L2 by then: `spare_us` counts only what was below.
    """

    name: str
    stages: int
    us: float
    floor_us: float
    spare_us: float


def rate_of(times: Times, begin: float, end: float, bin_us: float = BIN_US) -> np.ndarray:
    """GB/s in each bin from `begin` to about `end`, microseconds."""
    bins = max(1, round((end - begin) / bin_us))
    edges = (begin, begin + bins * bin_us)
    return np.histogram(times.copies.at, bins, edges, weights=times.copies.bytes)[0] / bin_us / 1e3


def rates(times: Times, step: Step, gbps: float) -> list[Rate]:
    """By operator, a token on the average of all recorded but the first; none where no copies were recorded.

    gbps: memory's whole rate.
    """
    tokens = times.asked.shape[0] - 1
    if times.copies is None or not len(times.copies.at) or tokens < 1:
        return []
    names = list(dict.fromkeys(g.name for s in step.stages for g in step.templates[s.template].groups))
    sums = np.zeros((len(names), 3))
    for number in range(1, tokens + 1):
        begin, end = float(np.nanmax(times.stored[number - 1])), float(np.nanmax(times.stored[number]))
        part = rate_of(times, begin, end) / gbps
        at = _most(times, step, names, number, begin, len(part))
        for n in range(len(names)):
            mine = part[at == n]
            sums[n] += len(mine), mine.sum(), np.clip(1 - mine, 0, None).sum()
    sums *= BIN_US / tokens
    stages = [sum(any(g.name == n for g in step.templates[s.template].groups) for s in step.stages) for n in names]
    return [Rate(n, count, *map(float, row)) for n, count, row in zip(names, stages, sums, strict=True) if row[0]]


def _most(times: Times, step: Step, names: list[str], number: int, begin: float, bins: int) -> np.ndarray:
    """Of each bin the operator that most SMs are at, waiting for it included."""
    working = np.zeros((len(names), bins + 1))
    for stage, made in enumerate(step.stages):
        template = step.templates[made.template]
        for sm, queue in enumerate(template.queues):
            for place, (group, _) in enumerate(queue):
                asked, stored = times.asked[number, sm, stage, place], times.stored[number, sm, stage, place]
                if np.isfinite(asked) and np.isfinite(stored):
                    row = working[names.index(template.groups[group].name)]
                    for moment, by in ((asked, 1), (stored, -1)):
                        row[min(bins, max(0, int((moment - begin) / BIN_US)))] += by
    return np.cumsum(working, 1)[:, :bins].argmax(0)


def data(found: list[Rate]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(rate) for rate in found]


def page(found: list[Rate], gbps: float) -> str:
    """For people."""
    rows = [_row(r, gbps) for r in found]
    whole = [sum(getattr(r, key) for r in found) for key in ("us", "floor_us", "spare_us")]
    rows.append(_row(Rate("token", 1, *whole), gbps))
    title = (
        f"memory, of {gbps:.0f} GB/s, while most SMs are at an operator: what the loaders asked for; spare: what it\n"
        "could have brought besides, in us of a token (what was brought into L2 ahead counts when it is copied)"
    )
    return title + "\n" + table(["operator", "a layer", "us", "GB/s", "%", "spare"], rows, frozenset({"operator"}))


def _row(rate: Rate, gbps: float) -> list[Any]:
    part = rate.floor_us / rate.us
    return [rate.name, f"{rate.us / rate.stages:.2f}", f"{rate.us:.1f}", f"{part * gbps:.0f}", f"{100 * part:.1f}",
            f"{rate.spare_us:.1f}"]  # fmt: skip
