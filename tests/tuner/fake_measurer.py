"""A GPU that is a formula: what a plan takes, which plans compute wrong numbers, and how long measuring takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

from mpk_spec.errors import UserError
from mpk_spec.planner import plan
from mpk_spec.planner.plan import Group, Plan
from mpk_spec.schema import load_spec
from mpk_spec.tuner.journal import Journal, Measurement
from mpk_spec.tuner.search import Search
from mpk_spec.tuner.space import Rules, with_rules


def planned(rules: Rules) -> Plan:
    return _planned(json.dumps(rules))


@cache
def _planned(text: str) -> Plan:
    rules = json.loads(text)
    return plan(with_rules(load_spec("qwen3"), rules), size="tiny", target="h100", context=256, verified=False)


def group(made: Plan, name: str) -> Group:
    return next(g for t in made.steps["decode"].templates for g in t.groups if g.name == name)


def milliseconds(made: Plan) -> float:
    """Least with 3 splits of attention and 256 KiB of prefetch."""
    splits = abs(group(made, "attend").kv_splits - 3) * 0.1
    return 5.0 + splits - made.prefetch_bytes / 2**18 * 0.2


class FakeMeasurer:
    def __init__(
        self,
        ms: Callable[[Plan], float] = milliseconds,
        wrong: Callable[[Plan], bool] = lambda made: False,
        fails: Callable[[Plan], bool] = lambda made: False,
        noise: float = 0.0,
    ):
        self.ms, self.wrong, self.fails, self.noise = ms, wrong, fails, noise
        self.measured: list[Plan] = []
        self.prepared: list[str] = []
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def prepare(self, plans: list[Plan]) -> None:
        self.prepared += [p.key for p in plans]

    def measure(self, made: Plan) -> Measurement:
        self.now += 10
        self.measured.append(made)
        if self.fails(made):
            raise UserError("the kernel was aborted: SM 3", "a hint")
        ms, right = self.ms(made), not self.wrong(made)
        return Measurement(ms, ms, ms, right, "same bits" if right else "logits differ by 3")

    def in_turn(self, plans: tuple[Plan, Plan], pairs: int) -> list[tuple[float, float]]:
        a, b = (self.ms(p) for p in plans)
        return [(a, b + self.noise * (-1) ** n) for n in range(pairs)]


def search(measurer: FakeMeasurer, path, limit: float | None = None) -> tuple[Search, list[str]]:
    said: list[str] = []
    return Search(load_spec("qwen3"), planned, measurer, Journal(path), said.append, limit, measurer.clock), said
