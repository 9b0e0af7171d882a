"""Happens-before: for each task, the set of tasks that are surely done when it starts.

It follows from queues and waits alone. A static task knows what the task before it in its SM's queue knew, and that
one; a wait for all signals of an event adds what every signaller knew. A pool task knows its waits only, since any SM
may claim it, and nobody knows a pool task by its place in a queue.

With several ranks, all run the same plan. `own` is what this rank is known to have done, `peers` what every other rank
is known to have done. Signals that cross ranks merge the two: who signals me knew what it had done (my peers' work) and
what its peers, me among them, had done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpk_spec.planner.verify.code import Code
from mpk_spec.planner.verify.report import Report


def find_order(code: Code, report: Report) -> bool:
    """Fills `code.order` with an order in which all tasks can run whatever the timing and whoever claims; else reports.

    The worst case for claim pools: one SM claims all of a pool, in order, and every SM waits for the pool's end.
    """
    graph = _Graph(code)
    missing = {event: len(tasks) for event, tasks in code.signallers.items()}
    users: dict[int | str, list[int]] = {}
    left = []
    for item, (before, events) in enumerate(zip(graph.before, graph.events, strict=True)):
        needs = [*before, *(e for e in events if e in missing)]
        left.append(min(len(needs), 1) if item in graph.any_of else len(needs))
        for need in needs:
            users.setdefault(need, []).append(item)
    done = [False] * len(left)
    ready = [i for i, n in enumerate(left) if n == 0]
    while ready:
        item = ready.pop()
        done[item] = True
        fired: list[int | str] = [item]
        if item < code.size:
            code.order.append(item)
            for event in code.signals[item]:
                missing[event] -= 1
                if missing[event] == 0:
                    fired.append(event)
        for user in (u for what in fired for u in users.get(what, ())):
            left[user] -= 1
            if left[user] == 0:
                ready.append(user)
    if not all(done):
        _report_cycle(code, graph, done, report)
    return all(done)


class _Graph:
    """What must be done before what: tasks, then for pools their arrivals, ends, and each SM's way in and out."""

    def __init__(self, code: Code):
        template = code.template
        self.names: dict[int, str] = {}
        self.before: list[list[int]] = [[] for _ in range(code.size)]
        self.events = [[event for stage, event in waits if stage == 0] for waits in code.waits]
        self.any_of: set[int] = set()
        pools: dict[int, tuple[int, int]] = {}
        for g, group in enumerate(template.groups):
            if group.launch != "dynamic":
                continue
            arrival = last = self._add(f"the first SM at the pool of {group.name}", [])
            self.any_of.add(arrival)
            for task in range(code.offsets[g], code.offsets[g] + len(group.tasks)):
                self.before[task].append(last)
                last = task
            pools[g] = arrival, self._add(f"the pool of {group.name}", [last])
        for sm, queue in enumerate(template.queues):
            last = self._add(f"SM {sm}", [])
            for g, task in queue:
                if task >= 0:
                    self.before[code.offsets[g] + task].append(last)
                    last = code.offsets[g] + task
                    continue
                arrival, end = pools[g]
                self.before[arrival].append(last)
                last = self._add(f"SM {sm} after the pool of {template.groups[g].name}", [last, end])

    def _add(self, name: str, before: list[int]) -> int:
        self.before.append(before)
        self.events.append([])
        self.names[len(self.before) - 1] = name
        return len(self.before) - 1


def _report_cycle(code: Code, graph: _Graph, done: list[bool], report: Report) -> None:
    """Walks from a stuck task to what it waits for until a task comes twice."""
    item = done.index(False)
    path: list[int] = []
    reasons: dict[int, str] = {}
    while item not in path:
        path.append(item)
        stuck = [b for b in graph.before[item] if not done[b]]
        if stuck:
            reasons[item] = "comes after"
            item = stuck[0]
            continue
        for event in graph.events[item]:
            open_tasks = [s for s in code.signallers.get(event, ()) if not done[s]]
            if open_tasks:
                reasons[item] = f"waits for '{event}' of"
                item = open_tasks[0]
                break
    cycle = [*path[path.index(item) :], item]
    names = [graph.names.get(i) or code.name(i) for i in cycle]
    steps = [f" {reasons[i]} {name}" for i, name in zip(cycle, names[1:], strict=False)]
    where = f"{code.kind}, template '{code.template.name}'"
    report.add(f"{where}: wait cycle: {names[0]}{', which'.join(steps)}")


@dataclass
class Stage:
    """One stage of a walk: where its bits start and what its events tell."""

    code: Code
    step: int
    index: int
    layer: int | None
    base: int
    own: dict[str, int]
    peers: dict[str, int]
    known: tuple[list[int], list[int]] | None = None
    """What each task knew, kept where counters are checked."""

    @property
    def bits(self) -> int:
        return ((1 << self.code.size) - 1) << self.base


class Knowledge:
    """What SMs and tasks know as stages go by."""

    def __init__(self, num_sms: int, ranks: int):
        self.ranks = ranks
        self.own = [0] * num_sms
        self.peers = [0] * num_sms

    def copy(self) -> Knowledge:
        other = Knowledge(0, self.ranks)
        other.own, other.peers = list(self.own), list(self.peers)
        return other

    def walk(self, stage: Stage, before: Sequence[Stage]) -> tuple[list[int], list[int]]:
        """Runs one stage. Returns for each of its tasks the tasks of this rank and of the peers that came before it."""
        code, base, parallel = stage.code, stage.base, self.ranks > 1
        own, peers = [0] * code.size, [0] * code.size
        for n in code.order:
            sm = code.sms[n]
            mine = self.own[sm] if sm >= 0 else 0
            theirs = self.peers[sm] if sm >= 0 else 0
            for back, event in code.waits[n]:
                if -back > len(before):
                    continue
                source = before[back] if back else stage
                mine |= source.own.get(event, 0)
                if parallel:
                    theirs |= source.peers.get(event, 0)
            own[n], peers[n] = mine, theirs
            mine |= 1 << (base + n)
            if sm >= 0:
                self.own[sm], self.peers[sm] = mine, theirs
            if code.cross[n]:
                mine = theirs = mine | theirs
            for event in code.signals[n]:
                stage.own[event] = stage.own.get(event, 0) | mine
                if parallel:
                    stage.peers[event] = stage.peers.get(event, 0) | theirs
        return own, peers
