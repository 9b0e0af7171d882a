"""A template in the form that the walk over stages needs: tasks numbered, spans gathered, one legal order.

Tasks of a template are numbered through (`offsets[group] + index`); in a walk, task `n` of a stage is bit `base + n` of
Python integers that serve as sets.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mpk_spec.planner.plan import Plan, Template


@dataclass
class ReadSet:
    """All tasks of a group that read one span. `mask` has their numbers as bits."""

    tensor: str
    lo: int
    hi: int
    tasks: list[int] = field(default_factory=list)
    mask: int = 0


@dataclass
class GroupCode:
    reads: list[ReadSet]
    writes: dict[str, list[tuple[int, int, int]]]
    """Tensor to sorted (lo, hi, task number)."""


@dataclass
class Code:
    """One template, prepared. `sms[n]` is the SM that runs task n, -1 for a task of a claim pool."""

    kind: str
    template: Template
    offsets: list[int]
    size: int
    sms: list[int]
    waits: list[tuple[tuple[int, str], ...]]
    signals: list[tuple[str, ...]]
    cross: list[bool]
    """Whether the task writes peers' inboxes: then it signals on every rank."""
    totals: dict[str, int]
    """Event to the number of signals that it gets, those of other ranks included."""
    signallers: dict[str, list[int]]
    groups: list[GroupCode]
    order: list[int] = field(default_factory=list)
    same: Code | None = None
    """An earlier template of the step that differs in nothing that matters here."""

    def like(self, other: Code) -> bool:
        """Whether both are ordered and use memory alike, whatever they compute."""
        return (
            self.template.queues == other.template.queues
            and self.waits == other.waits
            and self.signals == other.signals
            and self.offsets == other.offsets
            and self.groups == other.groups
            and [g.name for g in self.template.groups] == [g.name for g in other.template.groups]
        )

    def name(self, number: int) -> str:
        group = max(g for g, first in enumerate(self.offsets) if first <= number)
        return f"{self.template.groups[group].name}[{number - self.offsets[group]}]"


def compile_template(plan: Plan, kind: str, template: Template) -> Code:
    """Numbers the tasks and gathers their spans, waits and signals. Queue entries must be valid (`limits.check`)."""
    offsets, size = [], 0
    for group in template.groups:
        offsets.append(size)
        size += len(group.tasks)
    sms = [-1] * size
    for sm, queue in enumerate(template.queues):
        for group, task in queue:
            if task >= 0:
                sms[offsets[group] + task] = sm
    inboxes = inbox_tensors(plan)
    code = Code(kind, template, offsets, size, sms, [], [], [], {}, {}, [])
    number = 0
    for group in template.groups:
        reads: dict[tuple[str, int, int], ReadSet] = {}
        writes: dict[str, list[tuple[int, int, int]]] = {}
        for task in group.tasks:
            for span in task.reads:
                key = (span.tensor, span.lo, span.hi)
                entry = reads.get(key)
                if entry is None:
                    entry = reads[key] = ReadSet(*key)
                entry.tasks.append(number)
                entry.mask |= 1 << number
            for span in task.writes:
                writes.setdefault(span.tensor, []).append((span.lo, span.hi, number))
            cross = any(s.tensor in inboxes for s in task.writes)
            code.cross.append(cross)
            code.waits.append(tuple((w.stage, w.event) for w in task.waits))
            code.signals.append(task.signals)
            for event in task.signals:
                code.totals[event] = code.totals.get(event, 0) + (plan.tp if cross else 1)
                code.signallers.setdefault(event, []).append(number)
            number += 1
        for spans in writes.values():
            spans.sort()
        code.groups.append(GroupCode(list(reads.values()), writes))
    return code


def inbox_tensors(plan: Plan) -> frozenset[str]:
    """The tensors that ranks write into each other's memory."""
    return frozenset(t.name for t in plan.tensors.values() if t.inbox) if plan.tp > 1 else frozenset()
