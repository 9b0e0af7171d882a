"""How far logits are from the truth, and when that is near enough."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MARGIN = 1.10  # ours may be this much further from the truth than Hugging Face's own bf16 run
SIGMAS = 2.0  # and what chance alone may add, in standard errors
EXTREME = 4 / 3  # how much the largest of millions of errors moves from one set of ids to another
FLOAT_NOISE = 1e-9  # nats: below it two KL divergences are the same number in float32
_ROWS = 64  # positions looked at together: float64 logits of a large vocabulary are a megabyte each


@dataclass(frozen=True)
class Metrics:
    """Distance of some logits x from the true ones over `positions` teacher-forced positions.

    kl_mean, kl_p99: KL(truth || x) in nats, its mean and 99th percentile, each with its standard error.
    max_error: the largest absolute difference of a logit. flips: positions whose most probable token differs.
    broken: positions with a NaN or an infinity, which make the other numbers infinite.
    """

    positions: int
    kl_mean: float
    kl_mean_error: float
    kl_p99: float
    kl_p99_error: float
    max_error: float
    flips: int
    broken: int = 0


@dataclass(frozen=True)
class Tally:
    """Distances of single positions `[positions]`: KL divergence (float64), largest error, flipped, broken."""

    kl: torch.Tensor
    worst: torch.Tensor
    flipped: torch.Tensor
    broken: torch.Tensor

    def metrics(self, rows: torch.Tensor | None = None) -> Metrics:
        """Of all positions, or of those that the bool tensor `rows` picks."""
        kl, worst, flipped, broken = (
            t if rows is None else t[rows] for t in (self.kl, self.worst, self.flipped, self.broken)
        )
        count, lost = len(kl), int(broken.sum())
        if lost:
            return Metrics(count, math.inf, 0.0, math.inf, 0.0, math.inf, int(flipped.sum()), lost)
        spread = kl.std().item() if count > 1 else 0.0
        error = spread / math.sqrt(count)
        return Metrics(count, kl.mean().item(), error, *_p99(kl), worst.max().item(), int(flipped.sum()))


def tally(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Tally:
    """Every position of all (true, other) pairs of logits, `[positions, vocab]` each. On the GPU where there is one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: list[tuple[torch.Tensor, ...]] = []
    for whole_truth, whole_other in pairs:
        for truth, other in zip(whole_truth.split(_ROWS), whole_other.split(_ROWS), strict=True):
            truth, other = truth.to(device), other.to(device)
            p, q = truth.double().log_softmax(-1), other.double().log_softmax(-1)
            flipped = truth.argmax(-1) != other.argmax(-1)
            broken = (~other.isfinite()).any(-1)
            rows = ((p.exp() * (p - q)).sum(-1), (truth - other).abs().amax(-1), flipped, broken)
            found.append(tuple(row.cpu() for row in rows))
    return Tally(*(torch.cat(column) for column in zip(*found, strict=True)))


def measure(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Metrics:
    """Metrics over all (true, other) pairs of logits, `[positions, vocab]` each."""
    return tally(pairs).metrics()


def _p99(kl: torch.Tensor) -> tuple[float, float]:
    """The 99th percentile and its standard error: how far it moves when one in a hundred is a little more or less."""
    wobble = math.sqrt(0.99 * 0.01 / len(kl))
    low, middle, high = (kl.quantile(min(q, 1.0)).item() for q in (0.99 - wobble, 0.99, 0.99 + wobble))
    return middle, (high - low) / 2


@dataclass(frozen=True)
class Row:
    """One line of a verdict: `limit` is the most that `ours` may be."""

    name: str
    rival: float
    ours: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.ours <= self.limit


@dataclass(frozen=True)
class Verdict:
    """Ours against Hugging Face's bf16 run, each by its distance from Hugging Face in float32.

    Ours may be 10 % further away, and what chance explains: a few thousand positions give each number a standard error
    (KL: a few per cent of it), and two of the difference are allowed. Flips are counts of rare events, so their
    variance is the count itself. The largest error is an extreme value, which has no standard error; it gets a third.
    With the default 2,000 positions a planted defect exceeds the limits by factors of 2 to 1000.
    """

    rival: Metrics
    ours: Metrics
    alone: Verdict | None = None
    """The same for those positions alone that were computed token by token."""

    @property
    def rows(self) -> tuple[Row, ...]:
        rival, ours = self.rival, self.ours
        mean = math.hypot(MARGIN * rival.kl_mean_error, ours.kl_mean_error)
        p99 = math.hypot(MARGIN * rival.kl_p99_error, ours.kl_p99_error)
        return (
            Row("KL mean", rival.kl_mean, ours.kl_mean, MARGIN * rival.kl_mean + SIGMAS * mean + FLOAT_NOISE),
            Row("KL 99th percentile", rival.kl_p99, ours.kl_p99, MARGIN * rival.kl_p99 + SIGMAS * p99 + FLOAT_NOISE),
            Row("max logit error", rival.max_error, ours.max_error, MARGIN * EXTREME * rival.max_error),
            Row("top-1 flips", rival.flips, ours.flips, most_flips(rival.flips)),
        )

    @property
    def passed(self) -> bool:
        return not self.ours.broken and all(row.passed for row in self.rows) and (not self.alone or self.alone.passed)

    @property
    def kl_ratio(self) -> float:
        """KL mean of ours over the rival's, without any allowance."""
        return self.ours.kl_mean / max(self.rival.kl_mean, FLOAT_NOISE)

    def data(self) -> dict:
        """For JSON; infinities as null."""
        rows = [{k: _finite(v) for k, v in asdict(row).items()} | {"passed": row.passed} for row in self.rows]
        found = {"positions": self.ours.positions, "broken_positions": self.ours.broken, "passed": self.passed}
        alone = {"token_by_token": self.alone.data()} if self.alone else {}
        return {**found, "kl_ratio": _finite(self.kl_ratio), "rows": rows, **alone}


def most_flips(rival: int) -> int:
    """The largest count that is not more than 10 % and two standard deviations, sqrt(rival + it), above the rival's."""
    most = rival
    while most + 1 <= MARGIN * rival + SIGMAS * math.sqrt(rival + most + 1):
        most += 1
    return most


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value
