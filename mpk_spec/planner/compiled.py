"""A stage of a plan made ready for the simulation: tasks in an order that can run, with their costs worked out once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from mpk_spec.errors import UserError
from mpk_spec.planner.cost import CostModel, TaskCost, experts_of, task_cost
from mpk_spec.planner.crossing import makers, signallers
from mpk_spec.planner.plan import Plan, Span, Step, Task, Template, Wait


class ReadyWait(NamedTuple):
    """`back`: 0 or -1, the stage it is about. `peers` signal the event too. `makers`: whose values are looked at
    instead of the event, an index into `ReadyStage.makers`; None: nobody's."""

    event: str
    count: int
    back: int
    peers: bool
    makers: int | None


@dataclass
class ReadyTask:
    """A task with its costs."""

    group: int
    index: int
    cost: TaskCost
    waits: tuple[ReadyWait, ...]
    signals: tuple[str, ...]
    idle: bool = False  # an expert's task that nobody chose in this step


@dataclass
class Pool:
    """A claim pool: its tasks in claim order, and the SMs that claim."""

    group: int
    tasks: list[ReadyTask]
    sms: list[int]
    routed: bool  # its tasks' weights are known only when the routing is


@dataclass
class ReadyStage:
    """`order` holds (SM, task) and pools, each after everything that it waits for."""

    template: Template
    order: list[tuple[int, ReadyTask] | Pool] = field(default_factory=list)
    partial: frozenset[str] = frozenset()
    """Events that some task waits for with fewer signals than there are."""
    makers: list[tuple[tuple[int, int], ...]] = field(default_factory=list)
    """Sets of (group, task) whose values some task looks at."""


def compile_stage(
    plan: Plan, step: Step, template: Template, context: int, cost: CostModel, before: Template | None = None
) -> ReadyStage:
    """The `ReadyStage` of a template that follows `before`. Raises UserError for queues that cannot run to the end."""
    looks = _Looks(plan, step, template, before)
    peers = set().union(*(_events_of_peers(one) for one in step.templates))  # also of the stage before
    tasks = [
        [_ready(plan, step, template, g, task, peers, looks, cost, context) for task in group.tasks]
        for g, group in enumerate(template.groups)
    ]
    _check_loads(template)
    ready = ReadyStage(template, partial=_partial(template), makers=looks.found)
    routed = [bool(experts_of(plan, group)) for group in template.groups]
    _order(template, tasks, routed, ready)
    return ready


class _Looks:
    """Whose values the tasks of a template look at; most tasks of a group look at the same."""

    def __init__(self, plan: Plan, step: Step, template: Template, before: Template | None):
        self.feeds = plan.feeds
        self.signalling = {0: signallers(template), -1: signallers(before) if before else {}}
        self.crossing = step.tokens == 1  # steps of several tokens wait for events
        self.found: list[tuple[tuple[int, int], ...]] = []
        self._known: dict[tuple[str, int, tuple[Span, ...]], int] = {}
        self._numbers: dict[tuple[int, tuple[tuple[int, int], ...]], int] = {}

    def of(self, task: Task, wait: Wait) -> int | None:
        """The index of the set in `found`; None for a wait that is for its event."""
        if not wait.data or not self.crossing:
            return None
        key = wait.event, wait.stage, task.reads
        if key not in self._known:
            reads = (replace(s, tensor=self.feeds.get(s.tensor, s.tensor)) for s in task.reads)
            made = makers(self.signalling[wait.stage].get(wait.event, ()), reads)
            number = self._numbers.setdefault((wait.stage, made), len(self.found))
            if number == len(self.found):
                self.found.append(made)
            self._known[key] = number
        return self._known[key]


def _ready(plan, step, template, g, task: Task, peers: set[str], looks: _Looks, cost, context) -> ReadyTask:
    group = template.groups[g]
    found = task_cost(plan, step, group, task, cost, context)
    idle = group.launch == "dynamic" and task.load_bytes > 0 and found.weight_bytes == 0
    waits = tuple(ReadyWait(w.event, w.count, w.stage, w.event in peers, looks.of(task, w)) for w in task.waits)
    return ReadyTask(g, task.index, found, waits, task.signals, idle)


def _events_of_peers(template: Template) -> set[str]:
    """Events with more signals than this rank's tasks give: the peers' tasks give the others."""
    own: dict[str, int] = {}
    for group in template.groups:
        for task in group.tasks:
            for event in task.signals:
                own[event] = own.get(event, 0) + 1
    return {event for event, count in template.events.items() if count > own.get(event, 0)}


def _partial(template: Template) -> frozenset[str]:
    waits = [w for group in template.groups for task in group.tasks for w in task.waits if w.stage == 0]
    return frozenset(w.event for w in waits if w.count < template.events.get(w.event, 0))


def _check_loads(template: Template) -> None:
    """The ring is first in, first out, so a loader's order must be its workers'."""
    for sm, (queue, loads) in enumerate(zip(template.queues, template.loads, strict=True)):
        streamed = set(loads)
        if [entry for entry in queue if entry in streamed] != list(loads):
            raise UserError(f"stage '{template.name}': SM {sm} streams its tasks in another order than it runs them")


def _order(template: Template, tasks: list[list[ReadyTask]], routed: list[bool], ready: ReadyStage) -> None:
    """Fills `ready.order`: runs every queue until it waits, and again when the event it waits for has its signals."""
    seen: dict[str, int] = {}
    needed = _own_needs(template)
    at = [0] * len(template.queues)
    arrived: dict[int, list[int]] = {}
    claimers = {g: sum((g, -1) in q for q in template.queues) for g, group in enumerate(template.groups)
                if group.launch == "dynamic"}  # fmt: skip
    parked: dict[str, list[int]] = {}
    work = list(range(len(template.queues)))[::-1]

    def missing(waits: tuple[ReadyWait, ...]) -> str | None:
        short = (w.event for w in waits if w.back == 0 and seen.get(w.event, 0) < needed.get(w.event, 0))
        return next(short, None)

    def signal(task: ReadyTask) -> None:
        for event in task.signals:
            seen[event] = seen.get(event, 0) + 1
            if seen[event] >= needed.get(event, 0):
                work.extend(reversed(parked.pop(event, [])))

    def run_pool(g: int, sm: int) -> bool:
        """True when the pool has run, and `sm` may go on; its other SMs are put to work again."""
        event = next((e for t in tasks[g] if (e := missing(t.waits))), None)
        if event is not None:
            parked.setdefault(event, []).append(sm)
            return False
        ready.order.append(Pool(g, tasks[g], sorted(arrived[g]), routed[g]))
        for task in tasks[g]:
            signal(task)
        for other in arrived[g]:
            at[other] += 1
        work.extend(other for other in sorted(arrived[g], reverse=True) if other != sm)
        return True

    while work:
        sm = work.pop()
        queue = template.queues[sm]
        while at[sm] < len(queue):
            g, index = queue[at[sm]]
            if index < 0:
                if sm not in arrived.setdefault(g, []):
                    arrived[g].append(sm)
                if len(arrived[g]) < claimers[g] or not run_pool(g, sm):
                    break
                continue
            task = tasks[g][index]
            event = missing(task.waits)
            if event is not None:
                parked.setdefault(event, []).append(sm)
                break
            ready.order.append((sm, task))
            at[sm] += 1
            signal(task)
    stuck = next((sm for sm, n in enumerate(at) if n < len(template.queues[sm])), None)
    if stuck is not None:
        g, index = template.queues[stuck][at[stuck]]
        name = template.groups[g].name
        raise UserError(f"stage '{template.name}': SM {stuck} waits for ever before '{name}' task {max(index, 0)}")


def _own_needs(template: Template) -> dict[str, int]:
    """Signals of this rank that must have come before anyone waiting in this stage may run."""
    own: dict[str, int] = {}
    for group in template.groups:
        for task in group.tasks:
            for event in task.signals:
                own[event] = own.get(event, 0) + 1
    needs = dict(own)
    asked: dict[str, int] = {}
    for group in template.groups:
        for task in group.tasks:
            for wait in task.waits:
                if wait.stage == 0:
                    asked[wait.event] = max(asked.get(wait.event, 0), wait.count)
    for event, count in asked.items():
        # an event that nobody signals keeps its count: whoever waits for it is stuck, and that is said
        needs[event] = min(count, own[event]) if event in own else count
    return needs
