"""Several ranks' times by one clock, from the events that they signal to one another.

Each GPU has a nanosecond timer of its own, and nobody sets them together. But no event is seen before its last signal
was sent: the difference of two clocks is at most the shortest time, read on both, from a rank's last signal to its
being seen on the other, and likewise the other way round. Halfway between the two is what it is if the quickest signals
take as long there as back, and half of the way there and back is how wrong that can be.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mpk_spec.errors import UserError
from mpk_spec.planner.plan import Step
from mpk_spec.profiler.clock import Times


@dataclass(frozen=True)
class Exchange:
    """An event of all ranks that one group's tasks wait for: in stage `stage`, signalled in stage `sent`.

    seen: (SM, place) of each SM's first such task. senders: (SM, place) of the tasks that signal it on every rank.
    """

    stage: int
    group: int
    sent: int
    seen: tuple[tuple[int, int], ...]
    senders: tuple[tuple[int, int], ...]

    def last_signal(self, times: Times, number: int) -> float:
        """When a rank's own last signal was sent in step `number`."""
        return max(float(times.signalled[number, sm, self.sent, place]) for sm, place in self.senders)

    def ready(self, times: Times, number: int) -> np.ndarray:
        """When each SM saw the event."""
        sms, places = zip(*self.seen, strict=True)
        return times.ready[number, list(sms), self.stage, list(places)]


@dataclass(frozen=True)
class Clocks:
    """By rank: what its clock shows when rank 0's shows 0, and how far that may be off; microseconds."""

    ahead: tuple[float, ...]
    within: tuple[float, ...]

    def says(self) -> str:
        """What it rests on that the ranks' times lie side by side, for people."""
        worst = max(self.within)
        return (
            "each GPU has its own timer; they are set side by side by the signals of the sums over ranks, "
            f"taking the quickest to be as long there as back: right within {worst:.2f} us"
        )


def exchanges(step: Step) -> list[Exchange]:
    """All of a step, in the order of stages. Waits that reach into the step before are left out."""
    crossing = [_crossing(step, t) for t in range(len(step.templates))]
    found = []
    for number, stage in enumerate(step.stages):
        for group, back, event in _waits(step, stage.template):
            if number + back < 0:
                continue
            sender = step.stages[number + back].template
            if event in crossing[sender]:
                seen = _places(step, stage.template, group, event)
                found.append(Exchange(number, group, number + back, seen, crossing[sender][event]))
    return found


def align(ranks: list[Times], step: Step) -> tuple[list[Times], Clocks]:
    """All ranks' times by rank 0's clock. Raises UserError where the step has no event of all ranks."""
    pairs = exchanges(step)
    if not pairs:
        raise UserError("this plan's ranks exchange nothing: their clocks cannot be set side by side")
    ahead, within = [0.0], [0.0]
    for other in ranks[1:]:
        there, back = _quickest(ranks[0], other, pairs), _quickest(other, ranks[0], pairs)
        ahead.append((there - back) / 2)
        within.append((there + back) / 2)
    moved = [times.shifted(us) for times, us in zip(ranks, ahead, strict=True)]
    return moved, Clocks(tuple(ahead), tuple(within))


def _quickest(sender: Times, receiver: Times, pairs: list[Exchange]) -> float:
    """The shortest time from a last signal, by its sender's clock, to its being seen, by the receiver's.

    Of the SMs that see an event the median counts, so that one SM's badly read clock says nothing.
    """
    return min(
        float(np.median(one.ready(receiver, number))) - one.last_signal(sender, number)
        for one in pairs
        for number in range(sender.asked.shape[0])
    )


def _crossing(step: Step, template: int) -> dict[str, tuple[tuple[int, int], ...]]:
    """Events of a template that count other ranks' signals too -> (SM, place) of this rank's senders."""
    made, senders = step.templates[template], {}
    for sm, queue in enumerate(made.queues):
        for place, (group, task) in enumerate(queue):
            for event in made.groups[group].tasks[task].signals:
                senders.setdefault(event, []).append((sm, place))
    return {event: tuple(at) for event, at in senders.items() if made.events[event] > len(at)}


def _waits(step: Step, template: int) -> Iterator[tuple[int, int, str]]:
    """(group, stages back, event) of all that a template's tasks wait for, once each."""
    for g, group in enumerate(step.templates[template].groups):
        yield from sorted({(g, wait.stage, wait.event) for task in group.tasks for wait in task.waits})


def _places(step: Step, template: int, group: int, event: str) -> tuple[tuple[int, int], ...]:
    """(SM, place) of each SM's first task of the group, if that one waits for the event."""
    made, found = step.templates[template], []
    for sm, queue in enumerate(made.queues):
        first = next((p for p, (g, _) in enumerate(queue) if g == group), None)
        if first is not None:
            task = made.groups[group].tasks[queue[first][1]]
            if any(wait.event == event for wait in task.waits):
                found.append((sm, first))
    return tuple(found)
