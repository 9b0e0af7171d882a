"""Claim pools: what the kernel is told of groups whose tasks SMs claim (cuda_templates/runtime/pool.cuh)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mpk_spec.errors import UserError
from mpk_spec.planner.plan import Group, Step, Template

FROM_POOL = 0xFFFF  # `Entry.run` of a pool in a queue
MOST_TASKS = 0xFFFE  # their numbers, and "no more", are 16 bits


@dataclass(frozen=True)
class ClaimPool:
    """A dynamic group of a template. Its tasks' entries lie once, behind all SMs' programs, from `first` on; where its
    tasks' rows begin, and the last one's end, is in `Programs.pool_rows` from `row` on."""

    template: int
    group: int
    name: str
    weight: int
    tasks: int
    first: int
    row: int


def dynamic_groups(step: Step) -> Iterator[tuple[int, int, Group]]:
    """(template, number of the group, group) of every pool, in the order of the kernel's numbers."""
    for t, template in enumerate(step.templates):
        for g, group in enumerate(template.groups):
            if group.launch == "dynamic":
                yield t, g, group


def check_order(template: Template) -> None:
    """UserError where something that comes before a pool in a queue may wait for its tasks: loaders claim ahead."""
    if all(group.launch == "static" for group in template.groups):
        return
    made = {}  # event -> the last group that signals it
    for g, group in enumerate(template.groups):
        made |= {event: g for task in group.tasks for event in task.signals}
    for g, group in enumerate(template.groups):
        waits = {w.event for task in group.tasks for w in task.waits if w.stage == 0}
        if late := sorted(e for e in waits if made.get(e, -1) >= g):
            raise UserError(f"stage '{template.name}': '{group.name}' waits for '{late[0]}' of a later group")
    for sm, queue in enumerate(template.queues):
        if [g for g, _ in queue] != sorted(g for g, _ in queue):
            raise UserError(f"stage '{template.name}': SM {sm} does not run its groups in their order")
