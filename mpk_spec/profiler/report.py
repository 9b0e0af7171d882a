"""A profile in words: where each microsecond of a token went, by operator, and what the simulation had said."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import mean
from typing import TYPE_CHECKING

import numpy as np

from mpk_spec.planner.report import table
from mpk_spec.planner.simulate import Simulation
from mpk_spec.profiler import stream
from mpk_spec.profiler.clock import OFF_PATH, PHASES, Times
from mpk_spec.profiler.measured import measured_steps

if TYPE_CHECKING:
    from mpk_spec.profiler.ranks import Clocks
    from mpk_spec.profiler.sums import Sums

DIFFERS = 0.05  # a larger difference from the simulation is marked: one of the two is wrong
SMALL_US = 1.0  # of a token; less is not marked


@dataclass(frozen=True)
class Row:
    """One operator of one kind of stage; microseconds. `share_us`: of a token, on the average SM's workers."""

    stage: str
    name: str
    stages: int
    tasks: int  # of one stage
    mean: dict[str, float]  # by phase
    most: dict[str, float]
    span_us: float
    share_us: float


@dataclass(frozen=True)
class Critical:
    """One operator's part of the critical path of a token, measured and predicted; microseconds."""

    name: str
    stages: int
    work_us: float
    data_us: float
    hop_us: float
    predicted_us: float

    @property
    def us(self) -> float:
        return self.work_us + self.data_us + self.hop_us

    @property
    def differs(self) -> bool:
        return differs(self.us, self.predicted_us)


@dataclass(frozen=True)
class Profile:
    """What was recorded of some tokens, beside the prediction for one."""

    steps: list[Simulation]
    predicted: Simulation
    rows: list[Row]
    critical: list[Critical]
    between_us: float  # of a token, on the average SM: between tasks, or without any
    rates: list[stream.Rate]  # none where no copies were recorded

    @property
    def us(self) -> float:
        return mean(step.us for step in self.steps)

    def data(self) -> dict:
        """For JSON."""
        return {
            "plan": self.predicted.plan.name, "target": self.predicted.plan.target, "context": self.predicted.context,
            "us_per_token": [round(step.us, 3) for step in self.steps], "predicted_us": self.predicted.us,
            "rows": [asdict(row) for row in self.rows],
            "critical": [{**asdict(c), "us": c.us, "differs": c.differs} for c in self.critical],
            "between_us": self.between_us, "memory": stream.data(self.rates),
        }  # fmt: skip


def differs(measured: float, predicted: float) -> bool:
    apart = abs(measured - predicted)
    return apart > SMALL_US and apart > DIFFERS * max(measured, predicted)


def profile_of(times: Times, predicted: Simulation) -> Profile:
    """`times`: at least two recorded steps of the plan that `predicted` is about."""
    steps = measured_steps(times, predicted)
    rows, inside = _rows(times, steps)
    us = mean(step.us for step in steps)
    rates = stream.rates(times, predicted.step, predicted.cost.stream_gbps)
    return Profile(steps, predicted, rows, _critical(steps, predicted), us - inside, rates)


def _rows(times: Times, steps: list[Simulation]) -> tuple[list[Row], float]:
    """The rows, and what they sum up to of a token."""
    step, phases = steps[0].step, times.phases()[:, 1:]  # the first step is there for its end
    on_path = [phase not in OFF_PATH for phase in PHASES]
    spans = {}
    for one in steps:
        for time in one.groups:
            spans.setdefault((time.stage, time.name), []).append(time.span_us)
    sms, rows = phases.shape[2], []
    for t, template in enumerate(step.templates):
        stages = [n for n, stage in enumerate(step.stages) if stage.template == t]
        for g, group in enumerate(template.groups):
            where = [(sm, p) for sm, queue in enumerate(template.queues) for p, (of, _) in enumerate(queue) if of == g]
            own = np.stack([phases[:, :, sm, stages, place] for sm, place in where], -1)  # [phase, step, stage, task]
            means, most = np.nanmean(own, (1, 2, 3)), np.nanmax(own, (1, 2, 3))
            share = float(np.nansum(own[on_path])) / own.shape[1] / sms
            rows.append(
                Row(
                    template.name, group.name, len(stages), len(where),
                    dict(zip(PHASES, means.tolist(), strict=True)), dict(zip(PHASES, most.tolist(), strict=True)),
                    mean(spans[template.name, group.name]), share,
                )
            )  # fmt: skip
    return rows, sum(row.share_us for row in rows)


def _critical(steps: list[Simulation], predicted: Simulation) -> list[Critical]:
    names = list(dict.fromkeys(time.name for time in steps[0].groups))
    stages = {n: sum(t.stages for t in steps[0].groups if t.name == n) for n in names}

    def part(name: str, what: str) -> float:
        return mean(step.critical.get((name, what), 0.0) for step in steps)

    return [
        Critical(
            name, stages[name], part(name, "work"), part(name, "data"), part(name, "hop"),
            sum(us for (of, _), us in predicted.critical.items() if of == name),
        )
        for name in names
    ]  # fmt: skip


def report(ranks: list[Times], predicted: Simulation) -> tuple[list[Times], str, dict, str]:
    """All ranks' times by one clock, what that rests on, and the profile as data and for people."""
    from mpk_spec.profiler.ranks import align
    from mpk_spec.profiler.sums import predicted_sums, sums_of

    if len(ranks) == 1:
        profile = profile_of(ranks[0], predicted)
        return ranks, "", profile.data(), page(profile)
    ranks, clocks = align(ranks, predicted.step)
    profiles = [profile_of(times, predicted) for times in ranks]
    sums = sums_of(ranks, predicted, predicted_sums(predicted))
    data = {**profiles[0].data(), "ranks": [p.data() for p in profiles], "clocks": asdict(clocks), "sums": sums.data()}
    return ranks, clocks.says(), data, page_of_ranks(profiles, clocks, sums)


def page(profile: Profile) -> str:
    """The report for people."""
    parts = [_head(profile), _phases(profile), path(profile)]
    if profile.rates:
        parts.append(stream.page(profile.rates, profile.predicted.cost.stream_gbps))
    return "\n\n".join(parts)


def page_of_ranks(profiles: list[Profile], clocks: Clocks, sums: Sums) -> str:
    """The report of several ranks: rank 0's tables, and how the others differ."""
    from mpk_spec.profiler import sums as of_sums

    return "\n\n".join([page(profiles[0]), _ranks(profiles, clocks), of_sums.page(sums), clocks.says()])


def _ranks(profiles: list[Profile], clocks: Clocks) -> str:
    """A row per rank: its token, and where the average SM's time of it goes."""
    phases = [phase for phase in PHASES if phase not in OFF_PATH]
    rows = []
    for rank, profile in enumerate(profiles):
        parts = [sum(_part(row, phase, profile) for row in profile.rows) for phase in phases]
        rows.append(
            [rank, f"{profile.us:.1f}", *(f"{us:.1f}" for us in parts), f"{profile.between_us:.1f}",
             f"{clocks.ahead[rank]:.2f}", f"{clocks.within[rank]:.2f}"]
        )  # fmt: skip
    title = "ranks: a token in us, and where it goes on the average SM; what a rank's clock shows more than rank 0's"
    return title + "\n" + table(["rank", "token", *phases, "(no task)", "clock", "within"], rows)


def _part(row: Row, phase: str, profile: Profile) -> float:
    """A phase of an operator's tasks, of a token on the average SM."""
    return row.mean[phase] * row.tasks * row.stages / profile.predicted.plan.num_sms


def _head(profile: Profile) -> str:
    plan, steps = profile.predicted.plan, profile.steps
    ours, said = profile.us, profile.predicted.us
    mark = "  differs by more than 5 %" if differs(ours, said) else ""
    fastest, slowest = min(s.us for s in steps), max(s.us for s in steps)
    return (
        f"{plan.name} on {plan.target}, {profile.predicted.context} positions in the cache, {len(steps)} tokens\n"
        f"measured  {ours / 1e3:.4f} ms a token ({fastest / 1e3:.4f} to {slowest / 1e3:.4f}), with the clocks read "
        f"at every task\n"
        f"predicted {said / 1e3:.4f} ms ({100 * (ours / said - 1):+.1f} %){mark}; "
        f"floor {profile.predicted.floor_ms:.4f} ms at {profile.predicted.cost.stream_gbps:.0f} GB/s"
    )


def _phases(profile: Profile) -> str:
    rows = []
    for row in profile.rows:
        cells = [f"{row.mean[phase]:.2f} {row.most[phase]:.2f}" for phase in PHASES]
        rows.append([row.stage, row.name, row.stages, row.tasks, *cells, f"{row.span_us:.2f}", f"{row.share_us:.1f}"])
    rows.append(["", "(no task)", "", "", *[""] * len(PHASES), "", f"{profile.between_us:.1f}"])
    title = (
        "a task's phases in us, mean and maximum; wait values: looks at inputs until all are there, prepares them;\n"
        "signal: while the SM's workers go on; span: first start to last signal; share: of a token, average SM"
    )
    headers = ["stage", "operator", "stages", "tasks", *PHASES, "span", "share"]
    return title + "\n" + table(headers, rows, frozenset({"stage", "operator"}))


def path(profile: Profile) -> str:
    """The critical path, operator by operator, beside the prediction."""
    rows = []
    for c in profile.critical:
        apart = f"{100 * (c.us / c.predicted_us - 1):+.0f} %" if c.predicted_us else "-"
        rows.append(
            [c.name, f"{c.us / c.stages:.2f}", f"{c.work_us:.1f}", f"{c.data_us:.1f}", f"{c.hop_us:.1f}",
             f"{c.us:.1f}", f"{c.predicted_us:.1f}", apart, "differs" if c.differs else ""]
        )  # fmt: skip
    total = sum(c.us for c in profile.critical)
    rows.append(["token", "", *[""] * 3, f"{total:.1f}", f"{profile.predicted.us:.1f}", "", ""])
    title = (
        "critical path of a token in us, measured and predicted; hop: an event on its way, or values until all,\n"
        "stored by others, are seen and prepared (a linear's first weights come before these); data: weights or the\n"
        "cache are late afterwards"
    )
    headers = ["operator", "a layer", "work", "data", "hop", "measured", "predicted", "apart", ""]
    return title + "\n" + table(headers, rows, frozenset({"operator"}))
