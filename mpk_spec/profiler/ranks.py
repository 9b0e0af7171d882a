"""Several ranks' times by one clock, from the events that they signal to one another and the values that cross as data.

Each GPU has a nanosecond timer of its own, and nobody sets them together. But no event is seen before its last signal
was sent, and no values before they were stored: the difference of two clocks is at most the shortest time, read on
both, from a rank's last signal to its being seen on the other, and likewise the other way round. Halfway between the
two is what it is if the quickest signals take as long there as back, and half of the way there and back is how wrong
that can be.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mpk_spec.errors import UserError
from mpk_spec.planner.plan import Step
from mpk_spec.profiler.clock import Times

READING_US = 0.25  # how far clocks are read beside what they time: so much came out where two ranks shared a GPU


@dataclass(frozen=True)
class Exchange:
    """What one group's tasks get from all ranks: in stage `stage`, sent in stage `sent`.

    data: its values cross as data, else tasks wait for the event that says they are there. seen: (SM, place) of each
    SM's first such task. senders: (SM, place) of the tasks that send it on every rank.
    """

    stage: int
    group: int
    sent: int
    data: bool
    seen: tuple[tuple[int, int], ...]
    senders: tuple[tuple[int, int], ...]

    def last_sent(self, times: Times, number: int) -> float:
        """When a rank had sent the last of its own in step `number`: signals, or values."""
        sent = times.stored if self.data else times.signalled
        return max(float(sent[number, sm, self.sent, place]) for sm, place in self.senders)

    def arrived(self, times: Times, number: int) -> np.ndarray:
        """When each SM saw the event, or had seen all values and prepared them."""
        sms, places = zip(*self.seen, strict=True)
        seen = times.seen if self.data else times.ready
        return seen[number, list(sms), self.stage, list(places)]


@dataclass(frozen=True)
class Clocks:
    """By rank: what its clock shows when rank 0's shows 0, and how far that may be off; microseconds."""

    ahead: tuple[float, ...]
    within: tuple[float, ...]

    def says(self) -> str:
        """What it rests on that the ranks' times lie side by side, for people."""
        worst = max(self.within)
        return (
            "each GPU has its own timer; they are set side by side by what the ranks send one another for sums, "
            f"taking the quickest to be as long there as back: right within {worst:.2f} us"
        )


def exchanges(step: Step) -> list[Exchange]:
    """All of a step, in the order of stages. Waits that reach into the step before are left out."""
    crossing = [_crossing(step, t) for t in range(len(step.templates))]
    found = []
    for number, stage in enumerate(step.stages):
        for group, back, event, data in _waits(step, stage.template):
            if number + back < 0:
                continue
            sender = step.stages[number + back].template
            if event in crossing[sender] and _reads(step, stage.template, group, sender, crossing[sender][event]):
                seen = _places(step, stage.template, group, event)
                found.append(Exchange(number, group, number + back, data, seen, crossing[sender][event]))
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
        within.append(max((there + back) / 2, READING_US))
    moved = [times.shifted(us) for times, us in zip(ranks, ahead, strict=True)]
    return moved, Clocks(tuple(ahead), tuple(within))


def _quickest(sender: Times, receiver: Times, pairs: list[Exchange]) -> float:
    """The shortest time from the last thing sent, by its sender's clock, to its being seen, by the receiver's.

    Of the SMs that see an event the median counts, so that one SM's badly read clock says nothing.
    """
    return min(
        float(np.median(one.arrived(receiver, number))) - one.last_sent(sender, number)
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


def _waits(step: Step, template: int) -> Iterator[tuple[int, int, str, bool]]:
    """(group, stages back, event, whether its values are looked at) of all that a template's tasks wait for."""
    for g, group in enumerate(step.templates[template].groups):
        waits = {wait for task in group.tasks for wait in task.waits}
        yield from sorted({(g, wait.stage, wait.event, wait.data and step.tokens == 1) for wait in waits})


def _reads(step: Step, template: int, group: int, sender: int, senders: tuple[tuple[int, int], ...]) -> bool:
    """Whether a group reads what the senders write: a step's end waits for events of much that it does not read."""
    read = {span.tensor for task in step.templates[template].groups[group].tasks for span in task.reads}
    made = step.templates[sender]
    sent = (made.queues[sm][place] for sm, place in senders)
    return any(span.tensor in read for g, task in sent for span in made.groups[g].tasks[task].writes)


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
