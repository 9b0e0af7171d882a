"""Times that are sums of counted pieces: what a piece takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

HOLD = 0.01  # how much of a group's time a constant may be off if that moves it by its own size or their mean


@dataclass(frozen=True)
class Sample:
    """`counts` of pieces that took `us` microseconds together."""

    counts: tuple[float, ...]
    us: float


def fitted(groups: list[list[Sample]], known: list[float]) -> np.ndarray:
    """What a piece of each kind takes, not negative: the relative errors of the groups' sums are smallest.

    What the groups do not tell apart, and what they tell nothing about, stays near `known`.
    """
    sums = np.array([(*np.sum([s.counts for s in g], 0), sum(s.us for s in g)) for g in groups]).reshape(
        -1, len(known) + 1
    )
    sums /= np.abs(sums[:, -1:])
    size = np.maximum(known, max(0.01, float(np.mean(known))))
    a = np.vstack([sums[:, :-1], HOLD * np.diag(1 / size)])
    b = np.append(sums[:, -1], HOLD * np.array(known) / size)
    free = np.ones(len(known), bool)
    while True:
        values = np.zeros(len(known))
        values[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
        if (values >= 0).all():
            return values
        free[values.argmin()] = False
