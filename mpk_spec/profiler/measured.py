"""Measured steps in the form of simulated ones, so that both are reported, drawn and compared by the same code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from mpk_spec.errors import UserError
from mpk_spec.planner.cost import CostModel
from mpk_spec.planner.crossing import makers, signallers
from mpk_spec.planner.plan import Step, Task
from mpk_spec.planner.simulate import Ran, Simulation
from mpk_spec.profiler.clock import Times

NOTHING = (-np.inf, -1)  # when, and by which record
AT_ONCE_US = 0.15  # from one task to the next where nothing has to be waited for
LATE = 3  # times as long as a hop takes at least: a signal may be on its way


def measured_steps(times: Times, simulated: Simulation) -> list[Simulation]:
    """One `Simulation` per recorded step but the first, whose end is where the second begins.

    `simulated`: the prediction for the same plan; bytes and costs are taken from it. Raises UserError for less than two
    steps.
    """
    steps = times.asked.shape[0]
    recorded = [n for n in range(steps) if np.isfinite(times.stored[n]).any()]
    if len(recorded) < 2:
        raise UserError(f"{len(recorded)} steps were recorded, at least 2 are needed", "run more tokens")
    return [_step(times, n, simulated) for n in recorded if n - 1 in recorded]


def _step(times: Times, number: int, simulated: Simulation) -> Simulation:
    step, began = simulated.step, float(np.nanmax(times.stored[number - 1]))
    records = sorted(_records(times, number, step, began), key=lambda ran: (ran.stage, ran.group, ran.task))
    _Links(records, step, simulated.cost).fill_in()
    last = max(range(len(records)), key=lambda n: records[n].stored)
    streamed = {(stage - simulated.warm, group): size for (stage, group), size in simulated.streamed.items()}
    return replace(
        simulated, us=records[last].stored, stages=list(step.stages), warm=0, records=records, first=0, last=last,
        streamed=streamed,
    )  # fmt: skip


def _records(times: Times, number: int, step: Step, began: float) -> Iterator[Ran]:
    names = ("asked", "ready", "seen", "computed", "stored", "signalled", "waited")
    columns = [getattr(times, name)[number].tolist() for name in names]
    for stage, made in enumerate(step.stages):
        for sm, queue in enumerate(step.templates[made.template].queues):
            for place, (group, task) in enumerate(queue):
                *at, waited = (c[sm][stage][place] for c in columns)
                if at[0] != at[0]:
                    continue  # not run: it is shown as missing by the number of tasks
                yield Ran(stage, sm, group, task, *(t - began for t in at), waited, -1, "queue")


class _Links:
    """What each task's start waited for: the last of its signals, the last values that it saw, or the task before it on
    its SM.

    A signal sent before the SM was free counts too if it was still on its way, and so do values.
    """

    def __init__(self, records: list[Ran], step: Step, cost: CostModel):
        self.records, self.cost = records, cost
        self.stages = step.stages
        self.templates = [step.templates[stage.template] for stage in step.stages]
        known = [signallers(template) for template in step.templates]
        self.signallers = [known[stage.template] for stage in step.stages]
        self.index = {(r.stage, r.group, r.task): n for n, r in enumerate(records)}
        self._fired: dict[tuple[int, str, int], tuple[float, int]] = {}
        self._made: dict[tuple, tuple[float, int]] = {}
        self._makers: dict[tuple, tuple[tuple[int, int], ...]] = {}

    def fill_in(self) -> None:
        """`after` and `by` of all records; `start` becomes when values were seen, where a task waited for those."""
        behind: dict[int, int] = {}
        for n in sorted(range(len(self.records)), key=lambda n: self.records[n].free):
            ran = self.records[n]
            task = self.templates[ran.stage].groups[ran.group].tasks[ran.task]
            event, values = self._event(ran, task), self._values(ran, task)
            if self._looked_for(ran, values, behind):
                ran.start, ran.after, ran.by = ran.ready, values[1], "data"
            elif event[1] >= 0 and self._waited_for(ran, event[0]):
                ran.after, ran.by = event[1], "event"
            else:
                ran.after = behind.get(ran.sm, -1)
            behind[ran.sm] = n

    def _looked_for(self, ran: Ran, values: tuple[float, int], behind: dict[int, int]) -> bool:
        """Whether a task waited for its values: they came after its SM had stored those of the task before, as the
        simulation reckons. It did not where it had seen all it needed before: an attention's part without positions
        reads nothing.
        """
        own = self.records[behind[ran.sm]].stored if ran.sm in behind else -np.inf
        return own <= values[0] < ran.ready

    def _waited_for(self, ran: Ran, signalled: float) -> bool:
        """Whether a task's start was the event's doing: it came when the SM was free, or was on its way then."""
        still = signalled + LATE * self.cost.hop_us > ran.free
        return signalled > ran.free or (still and ran.start - ran.free > AT_ONCE_US)

    def _event(self, ran: Ran, task: Task) -> tuple[float, int]:
        waits = (w for w in task.waits if not w.data and ran.stage + w.stage >= 0)
        return max((self._signal(ran.stage + w.stage, w.event, w.count) for w in waits), default=NOTHING)

    def _values(self, ran: Ran, task: Task) -> tuple[float, int]:
        waits = (w for w in task.waits if w.data and ran.stage + w.stage >= 0)
        return max((self._stored(ran.stage + w.stage, w.event, task) for w in waits), default=NOTHING)

    def _signal(self, stage: int, event: str, count: int) -> tuple[float, int]:
        """When the event had `count` signals, and whose was the last."""
        key = stage, event, count
        if key not in self._fired:
            sent = (self.index.get((stage, g, task.index)) for g, task in self.signallers[stage].get(event, ()))
            order = sorted((self.records[n].done, n) for n in sent if n is not None)
            self._fired[key] = order[min(count, len(order)) - 1] if order else NOTHING
        return self._fired[key]

    def _stored(self, stage: int, event: str, task: Task) -> tuple[float, int]:
        """When the last of the event's signallers had stored of which the task reads something, and which that was."""
        key = stage, event, task.reads
        if key not in self._made:
            found = (self.index.get((stage, *maker)) for maker in self._makers_of(stage, event, task))
            self._made[key] = max(((self.records[n].stored, n) for n in found if n is not None), default=NOTHING)
        return self._made[key]

    def _makers_of(self, stage: int, event: str, task: Task) -> tuple[tuple[int, int], ...]:
        key = self.stages[stage].template, event, task.reads
        if key not in self._makers:
            self._makers[key] = makers(self.signallers[stage].get(event, ()), task.reads)
        return self._makers[key]
