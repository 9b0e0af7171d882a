"""Coordinate descent over a plan's knobs: one after the other, the best value of each, until none gets better."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import sqrt
from statistics import mean, stdev
from typing import TYPE_CHECKING, Protocol

from mpk_spec.errors import MpkSpecError, SpecError, UserError
from mpk_spec.tuner.journal import Journal, Measurement, NotJudged
from mpk_spec.tuner.space import Rules, knobs, shown, with_choice

if TYPE_CHECKING:
    from mpk_spec.planner.plan import Plan
    from mpk_spec.schema import Spec
    from mpk_spec.tuner.space import Knob

STEP = 0.002  # a value must be this much faster to be taken: less is within the noise of a measurement
LEAST_GAIN = 0.001  # of the time, and
SIGMAS = 3.0  # standard errors: what the confirmation must find before rules are recommended
ROUNDS = 2  # over all knobs
PAIRS = 6  # of baseline and best, in turn, to confirm


class Measurer(Protocol):
    """Runs plans on the GPU, or claims to."""

    def prepare(self, plans: list[Plan]) -> None:
        """Told which plans will be measured next."""

    def measure(self, plan: Plan) -> Measurement:
        """UserError where the kernel of this plan cannot be built or fails."""

    def in_turn(self, plans: tuple[Plan, Plan], pairs: int) -> list[tuple[float, float]]:
        """Milliseconds per token of two plans, turn by turn."""


@dataclass(frozen=True)
class Trial:
    """A candidate. `refused`: why it has no plan; then nothing was measured."""

    rules: Rules
    plan: Plan | None
    measured: Measurement | None = None
    refused: str | None = None

    @property
    def ms(self) -> float:
        """Infinite where it must not be chosen."""
        right = self.measured is not None and self.measured.right
        return self.measured.ms if right else float("inf")


@dataclass(frozen=True)
class Gain:
    """Milliseconds per token that the best saves, with its standard error, measured in turn with the baseline."""

    before: float
    after: float
    error: float

    @property
    def is_real(self) -> bool:
        gained = self.before - self.after
        return gained > LEAST_GAIN * self.before and gained > SIGMAS * self.error


@dataclass
class Search:
    """planned: the plan of `spec` under some rules; raises SpecError or UserError for what cannot be.

    limit: seconds from `started` on the clock after which no further candidate is begun.
    """

    spec: Spec
    planned: Callable[[Rules], Plan]
    measurer: Measurer
    journal: Journal
    say: Callable[[str], None]
    limit: float | None = None
    clock: Callable[[], float] = time.monotonic
    trials: list[Trial] = field(default_factory=list)
    out_of_time: bool = False

    def __post_init__(self):
        self.started, self.compiling = self.clock(), 0.0
        self.took: list[float] = []  # seconds, of each measurement
        self.seen: set[str] = set()
        self.failed = False

    def run(self) -> Trial:
        """The best candidate found; the first of `trials` is the plan without rules. UserError where that is wrong."""
        best = baseline = self._try({}, self.planned({}), "without rules")
        if baseline.ms == float("inf"):
            raise UserError(f"the plan without rules does not run as it should: {baseline.measured.output}")
        unchanged = 0
        for _ in range(ROUNDS):
            todo = knobs(best.plan, self.spec)  # fusions that are left out leave other grids
            for knob in todo:
                found = min([best, *self._choices(best, knob)], key=lambda t: t.ms)
                better = found.ms < best.ms * (1 - STEP)
                best, unchanged = (found, 1) if better else (best, unchanged + 1)
                if unchanged >= len(todo) or self.out_of_time:
                    return best
        return best

    def _choices(self, best: Trial, knob: Knob) -> list[Trial]:
        """The candidates that differ from the best in one knob, and were not tried."""
        fresh: list[tuple[Rules, Plan]] = []
        found: list[Trial] = []
        for choice in knob.choices:
            rules = with_choice(best.rules, knob, choice)
            try:
                plan = self.planned(rules)
            except MpkSpecError as error:
                self._refuse(rules, error)
                continue
            if plan.key not in self.seen and plan.key not in [p.key for _, p in fresh]:
                fresh.append((rules, plan))
        self._prepare([p for _, p in fresh if p.key not in self.journal.found])
        for number, (rules, plan) in enumerate(fresh):
            if plan.key not in self.journal.found and self._is_late():
                continue
            place = f"{knob.group} {knob.name} {number + 1}/{len(fresh)}".removeprefix("* ")
            found.append(self._try(rules, plan, place))
        return found

    def _refuse(self, rules: Rules, error: MpkSpecError) -> None:
        if any(t.rules == rules for t in self.trials):
            return
        why = error.problems[0].message if isinstance(error, SpecError) else str(error).splitlines()[0]
        self.trials.append(Trial(rules, None, refused=why))
        self.say(f"{shown(rules)}: refused: {why}")

    def _prepare(self, plans: list[Plan]) -> None:
        if plans and not self._is_late(self.compiling):
            began = self.clock()
            self.measurer.prepare(plans)
            self.compiling = max(self.compiling, self.clock() - began)

    def _is_late(self, more: float = 0.0) -> bool:
        """Whether `more` seconds, another measurement and the confirmation, as long as two, exceed the limit."""
        if self.limit is None:
            return False
        if self.clock() - self.started + more + 3 * min(self.took, default=0) > self.limit and not self.out_of_time:
            self.out_of_time = True
            self.say(f"the {self.limit:g} seconds are over: the same command goes on from here")
        return self.out_of_time

    def _try(self, rules: Rules, plan: Plan, place: str) -> Trial:
        self.seen.add(plan.key)
        known = self.journal.found.get(plan.key)
        try:
            trial = Trial(rules, plan, known or self._measure(rules, plan))
        except NotJudged as error:
            trial = Trial(rules, plan, refused=error.message)
        self.trials.append(trial)
        self.say(f"{place}: {shown(rules)}: {self.told(trial)}{', measured before' if known else ''}")
        return trial

    def _measure(self, rules: Rules, plan: Plan) -> Measurement:
        """Measured now and kept. A candidate whose kernel fails is kept as wrong, so that a next run passes it by."""
        began = self.clock()
        try:
            measured = self.measurer.measure(plan)
        except NotJudged:
            raise
        except (UserError, RuntimeError) as error:
            if self.failed or not rules:
                raise  # two in a row: it is rather the machine that does not work
            self.failed = True
            measured = Measurement(None, None, None, False, f"failed: {str(error).splitlines()[0]}")
            self.journal.add(plan.key, shown(rules), measured)
            if not isinstance(error, UserError):
                raise
            return measured
        self.failed = False
        self.journal.add(plan.key, shown(rules), measured)
        self.took.append(self.clock() - began)
        return measured

    def told(self, trial: Trial) -> str:
        """The trial in words: time, against the plan without rules, output."""
        if trial.refused is not None:
            return f"refused: {trial.refused}"
        measured, first = trial.measured, self.trials[0].measured
        if measured.ms is None:
            return f"WRONG, {measured.output}"
        change = f" ({measured.ms / first.ms - 1:+.2%})" if trial.rules else ""
        return f"{measured.ms:.4f} ms{change}, {measured.output if measured.right else 'WRONG: ' + measured.output}"

    def confirm(self, best: Trial) -> Gain:
        """Best and baseline again, in turn."""
        first = self.trials[0]
        self.say(f"confirming {shown(best.rules)}")
        pairs = self.measurer.in_turn((first.plan, best.plan), PAIRS)
        gains = [before - after for before, after in pairs]
        error = stdev(gains) / sqrt(len(gains))
        return Gain(mean(p[0] for p in pairs), mean(p[1] for p in pairs), error)
