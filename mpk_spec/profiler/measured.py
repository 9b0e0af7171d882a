"""Measured steps in the form of simulated ones, so that both are reported, drawn and compared by the same code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from mpk_spec.errors import UserError
from mpk_spec.planner.plan import Step
from mpk_spec.planner.simulate import Ran, Simulation
from mpk_spec.profiler.clock import Times

AT_ONCE_US = 0.15  # from one task to the next where nothing has to be waited for


def measured_steps(times: Times, simulated: Simulation) -> list[Simulation]:
    """One `Simulation` per recorded step but the first, whose end is where the second begins.

    `simulated`: the prediction for the same plan; bytes and costs are taken from it. Raises UserError for less than two
    steps.
    """
    steps = times.asked.shape[0]
    recorded = [n for n in range(steps) if np.isfinite(times.signalled[n]).any()]
    if len(recorded) < 2:
        raise UserError(f"{len(recorded)} steps were recorded, at least 2 are needed", "run more tokens")
    return [_step(times, n, simulated) for n in recorded if n - 1 in recorded]


def _step(times: Times, number: int, simulated: Simulation) -> Simulation:
    step, began = simulated.step, float(np.nanmax(times.signalled[number - 1]))
    records = sorted(_records(times, number, step, began), key=lambda ran: (ran.stage, ran.group, ran.task))
    _link(records, step)
    last = max(range(len(records)), key=lambda n: records[n].done)
    streamed = {(stage - simulated.warm, group): size for (stage, group), size in simulated.streamed.items()}
    return replace(
        simulated, us=records[last].done, stages=list(step.stages), warm=0, records=records, first=0, last=last,
        streamed=streamed,
    )  # fmt: skip


def _records(times: Times, number: int, step: Step, began: float) -> Iterator[Ran]:
    names = ("asked", "ready", "opened", "computed", "signalled", "waited")
    columns = [getattr(times, name)[number].tolist() for name in names]
    for stage, made in enumerate(step.stages):
        for sm, queue in enumerate(step.templates[made.template].queues):
            for place, (group, task) in enumerate(queue):
                asked, ready, opened, computed, signalled, waited = (c[sm][stage][place] for c in columns)
                if signalled != signalled:
                    continue  # not run: it is shown as missing by the number of tasks
                at = [t - began for t in (asked, ready, opened, computed, signalled)]
                yield Ran(stage, sm, group, task, *at, waited, -1, False)


def _link(records: list[Ran], step: Step) -> None:
    """Fills in what each task's start waited for: the last of its signals, or the task before it on its SM.

    A signal sent before the SM was free counts too if it was still on its way.
    """
    index = {(r.stage, r.group, r.task): n for n, r in enumerate(records)}
    senders = _senders(step)
    fired: dict[tuple[int, str, int], tuple[float, int]] = {}

    def signal(stage: int, event: str, count: int) -> tuple[float, int]:
        """When the event had `count` signals, and whose was the last."""
        key = (stage, event, count)
        if key not in fired:
            sent = (index.get((stage, *sender)) for sender in senders[step.stages[stage].template].get(event, ()))
            order = sorted((records[n].done, n) for n in sent if n is not None)
            fired[key] = order[min(count, len(order)) - 1] if order else (-np.inf, -1)
        return fired[key]

    behind: dict[int, int] = {}
    for n in sorted(range(len(records)), key=lambda n: records[n].free):
        ran = records[n]
        waits = step.templates[step.stages[ran.stage].template].groups[ran.group].tasks[ran.task].waits
        inside = [signal(ran.stage + w.stage, w.event, w.count) for w in waits if ran.stage + w.stage >= 0]
        when, whom = max(inside, default=(-np.inf, -1))
        ran.by_event = whom >= 0 and (when > ran.free or ran.start - ran.free > AT_ONCE_US)
        ran.after = whom if ran.by_event else behind.get(ran.sm, -1)
        behind[ran.sm] = n


def _senders(step: Step) -> list[dict[str, list[tuple[int, int]]]]:
    """Of each template: event -> the (group, task) that signal it."""
    found = []
    for template in step.templates:
        events: dict[str, list[tuple[int, int]]] = {}
        for g, group in enumerate(template.groups):
            for task in group.tasks:
                for event in task.signals:
                    events.setdefault(event, []).append((g, task.index))
        found.append(events)
    return found
