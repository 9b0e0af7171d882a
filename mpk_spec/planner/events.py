"""Events from overlap of regions. A consumer waits once per producing group that it is not already behind.

Sets of tasks are Python integers used as bit sets over the tasks of one stage, numbered in program order. Between two
stages the order is whole: the first tasks of a stage wait for the last tasks of the one before.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from mpk_spec.planner.plan import Group, Task, Wait

MAX_SIGNALS = 4  # a task that would signal more events signals one for its whole group instead


@dataclass
class StageOrder:
    """What the events of one stage establish. `before[n]`: the tasks that are done when task `n` starts."""

    groups: list[Group]
    events: dict[str, int] = field(default_factory=dict)
    before: list[int] = field(default_factory=list)
    members: dict[str, int] = field(default_factory=dict)
    exits: tuple[tuple[str, int], ...] = ()
    entries: tuple[tuple[int, int], ...] = ()  # (group, task) that start the stage


class _Regions:
    """Readers and writers of each tensor so far, as (lo, hi, bit)."""

    def __init__(self):
        self.writers: dict[str, list[tuple[int, int, int]]] = {}
        self.readers: dict[str, list[tuple[int, int, int]]] = {}
        self._cache: dict[tuple, int] = {}

    def touching(self, kind: str, tensor: str, lo: int, hi: int) -> int:
        key = (kind, tensor, lo, hi)
        if key not in self._cache:
            mask = 0
            for a, b, bit in getattr(self, kind).get(tensor, ()):
                if a < hi and lo < b:
                    mask |= bit
            self._cache[key] = mask
        return self._cache[key]

    def add(self, group: Group, first: int) -> None:
        fresh: dict[str, list[tuple[int, int, int]]] = {}
        for n, task in enumerate(group.tasks):
            for span in task.writes:
                fresh.setdefault(span.tensor, []).append((span.lo, span.hi, 1 << (first + n)))
        for tensor, spans in fresh.items():
            self.writers.setdefault(tensor, []).extend(spans)
        for n, task in enumerate(group.tasks):
            for span in task.reads:
                self.readers.setdefault(span.tensor, []).append((span.lo, span.hi, 1 << (first + n)))
        self._cache.clear()


def connect(groups: list[Group], tp: int, inboxes: frozenset[str]) -> StageOrder:
    """Adds waits and signals inside one stage."""
    order = StageOrder(list(groups))
    first = [0]
    for group in groups:
        first.append(first[-1] + len(group.tasks))
    masks = [((1 << len(g.tasks)) - 1) << f for g, f in zip(groups, first, strict=False)]
    signals: list[list[str]] = [[] for _ in range(first[-1])]
    waits: list[list[Wait]] = [[] for _ in range(first[-1])]
    regions, closure = _Regions(), {}

    def behind(mask: int) -> int:
        """The tasks of `mask` and all that those are behind."""
        if mask not in closure:
            found, rest = mask, mask
            while rest:
                low = rest & -rest
                found |= order.before[low.bit_length() - 1]
                rest ^= low
            closure[mask] = found
        return closure[mask]

    def event(producer: int, mask: int) -> str:
        """The event that all of `mask` signal; made on first use."""
        whole = mask == masks[producer]
        name = f"{groups[producer].name}.done"
        if not whole:
            members = sorted(n for n in range(first[producer], first[producer + 1]) if mask >> n & 1)
            name += f"[{members[0] - first[producer]}:{members[-1] - first[producer] + 1}]"
            while order.members.get(name, mask) != mask:  # other tasks between the same two
                name += "'"
        if name not in order.events:
            order.members[name] = mask
            crossing = any(s.tensor in inboxes for t in groups[producer].tasks for s in t.writes)
            order.events[name] = mask.bit_count() * (tp if crossing else 1)
            for n in range(first[producer], first[producer + 1]):
                if mask >> n & 1:
                    signals[n].append(name)
        return name

    for consumer, group in enumerate(groups):
        needed = [_needs(regions, task) for task in group.tasks]
        known = [0] * len(group.tasks)
        for producer in reversed(range(consumer)):
            wanted = [n & masks[producer] for n in needed]
            wanted = [w & ~k for w, k in zip(wanted, known, strict=True)]
            sets = {needed[n] & masks[producer] for n, w in enumerate(wanted) if w}
            if not sets:
                continue
            fine = _fine_enough(sets, masks[producer], first[producer], len(groups[producer].tasks), signals)
            for n, missing in enumerate(wanted):
                if missing:
                    mask = needed[n] & masks[producer] if fine else masks[producer]
                    name = event(producer, mask)
                    waits[first[consumer] + n].append(Wait(name, order.events[name]))
                    known[n] |= behind(mask)
        order.before += known
        regions.add(group, first[consumer])
    seen = 0
    for known in order.before:
        seen |= known
    exits = []
    for n, mask in enumerate(masks):
        if mask & ~seen:
            name = event(n, mask)
            exits.append((name, order.events[name]))
    order.exits = tuple(exits)
    order.groups, entries = [], []
    for n, group in enumerate(groups):
        tasks = []
        for t, task in enumerate(group.tasks):
            at = first[n] + t
            tasks.append(replace(task, waits=tuple(waits[at]), signals=tuple(signals[at])))
            if not waits[at]:
                entries.append((n, t))
        order.groups.append(replace(group, tasks=tuple(tasks)))
    order.entries = tuple(entries)
    return order


def _needs(regions: _Regions, task: Task) -> int:
    """The tasks that must be done before: writers of what it reads, readers and writers of what it writes."""
    mask = 0
    for span in task.reads:
        mask |= regions.touching("writers", span.tensor, span.lo, span.hi)
    for span in task.writes:
        mask |= regions.touching("writers", span.tensor, span.lo, span.hi)
        mask |= regions.touching("readers", span.tensor, span.lo, span.hi)
    return mask


def _fine_enough(sets: set[int], whole: int, first: int, count: int, signals: list[list[str]]) -> bool:
    """Whether events for just the tasks needed are worth it: no task may come to signal more than MAX_SIGNALS."""
    if sets == {whole}:
        return True
    return all(len(signals[n]) + sum(s >> n & 1 for s in sets) <= MAX_SIGNALS for n in range(first, first + count))


def enter(order: StageOrder, exits: tuple[tuple[str, int], ...]) -> tuple[Group, ...]:
    """The stage's groups, the first tasks waiting for the end of the stage before."""
    entries = set(order.entries)
    waits = tuple(Wait(name, count, -1) for name, count in exits)
    return tuple(
        replace(
            group,
            tasks=tuple(replace(t, waits=waits) if (n, i) in entries else t for i, t in enumerate(group.tasks)),
        )
        for n, group in enumerate(order.groups)
    )
