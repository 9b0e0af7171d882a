"""Two slow judges of tiny plans that share no code with the verifier.

`unordered` lists the uses of memory words that program order puts after one another and no chain of queue places and
events does. `execute` runs the plan on imaginary SMs of random speed, with words that remember who wrote them, and
tells what goes wrong.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from random import Random

from mpk_spec.planner.plan import Plan, Task, Template

Name = tuple[int, int, int, int, int]  # rank, step, stage, group, task


@dataclass
class Access:
    """What a task touches: words that it reads before and after its group's writes, and words that it writes."""

    before: list
    after: list
    writes: list


class Program:
    """Some steps of a plan on all ranks."""

    def __init__(self, plan: Plan, kinds: tuple[str, ...]):
        self.plan, self.kinds = plan, kinds
        self.stages: list[tuple[int, int, Template, int | None]] = []
        for step, kind in enumerate(kinds):
            for index, stage in enumerate(plan.steps[kind].stages):
                self.stages.append((step, index, plan.steps[kind].templates[stage.template], stage.layer))
        self.inboxes = {t.name for t in plan.tensors.values() if t.inbox and plan.tp > 1}

    def words(self, rank: int, tensor: str, lo: int, hi: int, layer: int | None, writer: int | None = None):
        """Words of a span in the memory of `rank`; of an inbox all slots, or that of `writer` only."""
        if tensor in self.plan.weights:
            return []
        if tensor in self.plan.states:
            return [(rank, tensor, layer, i) for i in range(lo, hi)]
        t = self.plan.tensors[self.plan.feeds.get(tensor, tensor)]
        slots = [0] if t.name not in self.inboxes else range(self.plan.tp) if writer is None else [writer]
        size = t.bytes // 4 // (self.plan.tp if t.name in self.inboxes else 1)
        start = t.offset // 4
        return [(rank, t.placement, start + slot * size + i) for slot in slots for i in range(lo, hi)]

    def access(self, rank: int, group, task: Task, layer: int | None) -> Access:
        wrote = {s.tensor for t in group.tasks for s in t.writes}
        found = Access([], [], [])
        for s in task.reads:
            (found.after if s.tensor in wrote else found.before).extend(self.words(rank, s.tensor, s.lo, s.hi, layer))
        for s in task.writes:
            owners = range(self.plan.tp) if s.tensor in self.inboxes else [rank]
            for owner in owners:
                found.writes.extend(self.words(owner, s.tensor, s.lo, s.hi, layer, rank))
        return found

    def crosses(self, task: Task) -> bool:
        return any(s.tensor in self.inboxes for s in task.writes)

    def groups(self):
        """(stage number, group number, group, layer) in program order."""
        for number, (_, _, template, layer) in enumerate(self.stages):
            for g, group in enumerate(template.groups):
                yield number, g, group, layer

    def source(self, number: int, back: int) -> int | None:
        return number + back if number + back >= 0 else None


def _conflicts(program: Program) -> list[tuple[Name, Name]]:
    """Pairs of tasks that program order puts one after the other because they use the same word."""
    pairs, writers, readers = set(), {}, defaultdict(list)

    def read(name, words):
        for word in words:
            if word in writers:
                pairs.add((writers[word], name))
            readers[word].append(name)

    for number, g, group, layer in program.groups():
        tasks = [(r, t) for r in range(program.plan.tp) for t in group.tasks]
        found = {(r, t.index): program.access(r, group, t, layer) for r, t in tasks}
        name = {(r, t.index): (r, *program.stages[number][:2], g, t.index) for r, t in tasks}
        for key, access in found.items():
            read(name[key], access.before)
        for key, access in found.items():
            for word in access.writes:
                pairs.update((other, name[key]) for other in readers.pop(word, ()))
                if word in writers:
                    pairs.add((writers[word], name[key]))
                writers[word] = name[key]
        for key, access in found.items():
            read(name[key], access.after)
    return [(a, b) for a, b in pairs if a != b]


def _edges(program: Program) -> dict[Name, set[Name]]:
    """Task to the tasks that surely come later. Waits for fewer than all signals order nothing."""
    plan, later = program.plan, defaultdict(set)
    signallers: dict[tuple[int, int, str], list[Name]] = defaultdict(list)
    for number, g, group, _ in program.groups():
        for rank in range(plan.tp):
            for task in group.tasks:
                for event in task.signals:
                    for seen in range(plan.tp) if program.crosses(task) else [rank]:
                        at = program.stages[number][:2]
                        signallers[(seen, number, event)].append((rank, *at, g, task.index))
    for number, g, group, _ in program.groups():
        for rank in range(plan.tp):
            for task in group.tasks:
                for wait in task.waits:
                    source = program.source(number, wait.stage)
                    names = signallers.get((rank, source, wait.event), []) if source is not None else []
                    if wait.count == len(names):
                        for name in names:
                            later[name].add((rank, *program.stages[number][:2], g, task.index))
    for rank in range(plan.tp):
        for sm in range(plan.num_sms):
            last = None
            for step, index, template, _ in program.stages:
                for g, t in template.queues[sm]:
                    if t < 0:
                        continue
                    name = (rank, step, index, g, t)
                    if last is not None:
                        later[last].add(name)
                    last = name
    return later


def unordered(plan: Plan, kinds: tuple[str, ...]) -> list[tuple[Name, Name]]:
    """Conflicting pairs without a chain of events and queue places between them."""
    program = Program(plan, kinds)
    later = _edges(program)
    reach: dict[Name, set[Name]] = {}
    bad = []
    for a, b in _conflicts(program):
        if a not in reach:
            seen, todo = set(), [a]
            while todo:
                for name in later.get(todo.pop(), ()):
                    if name not in seen:
                        seen.add(name)
                        todo.append(name)
            reach[a] = seen
        if b not in reach[a]:
            bad.append((a, b))
    return bad


def expected_tags(program: Program) -> dict[Name, dict]:
    """What each task finds in the words that it reads, if everything runs in program order."""
    memory: dict = {}
    wanted: dict[Name, dict] = {}
    for number, g, group, layer in program.groups():
        tasks = [(r, t) for r in range(program.plan.tp) for t in group.tasks]
        found = [((r, *program.stages[number][:2], g, t.index), program.access(r, group, t, layer)) for r, t in tasks]
        for name, access in found:
            wanted[name] = {w: memory.get(w) for w in access.before}
        for name, access in found:
            memory.update((w, name) for w in access.writes)
        for name, access in found:
            wanted[name] |= {w: memory.get(w) for w in access.after}
    return wanted


def wrong_in_order(plan: Plan, kinds: tuple[str, ...]) -> str | None:
    """A read that finds another value than it means even in program order: overwritten, unwritten, of another step."""
    program = Program(plan, kinds)
    holds: dict = {}

    def read(task: Task, rank: int, step: int, layer: int | None) -> str | None:
        for s in task.reads:
            source, fed = plan.feeds.get(s.tensor, s.tensor), s.tensor in plan.feeds
            for word in program.words(rank, s.tensor, s.lo, s.hi, layer):
                tensor, when = holds.get(word, (None, -1))
                first = fed and tensor is None
                if not first and (tensor != source or (when >= step if fed else when != step)):
                    return f"step {step} reads {s} and finds {tensor} of step {when}"
        return None

    for number, _, group, layer in program.groups():
        step = program.stages[number][0]
        wrote = {s.tensor for t in group.tasks for s in t.writes}
        for after in (False, True):
            for rank in range(plan.tp):
                for task in group.tasks:
                    part = replace(task, reads=tuple(s for s in task.reads if (s.tensor in wrote) == after))
                    wrong = read(part, rank, step, layer)
                    if wrong:
                        return wrong
            for rank in range(plan.tp if not after else 0):
                for task in group.tasks:
                    for s in task.writes:
                        for owner in range(plan.tp) if s.tensor in program.inboxes else [rank]:
                            words = program.words(owner, s.tensor, s.lo, s.hi, layer, rank)
                            holds.update((w, (s.tensor, step)) for w in words)
    return None


class Execution:
    """One run with random speeds. `problem` is set when something goes wrong."""

    def __init__(self, plan: Plan, kinds: tuple[str, ...], random: Random):
        self.plan, self.program, self.random = plan, Program(plan, kinds), random
        self.wanted = expected_tags(self.program)
        self.memory: dict = {}
        self.counts: dict = defaultdict(int)
        self.claimed: dict = defaultdict(int)
        self.problem: str | None = None
        self.workers = [_Worker(self, r, sm) for r in range(plan.tp) for sm in range(plan.num_sms)]
        self.speeds = [10.0 ** random.uniform(-2, 0) for _ in self.workers]

    def run(self) -> str | None:
        while self.problem is None:
            able = [(w, s) for w, s in zip(self.workers, self.speeds, strict=True) if w.able()]
            if not able:
                stuck = [w for w in self.workers if not w.done]
                return f"deadlock of {len(stuck)} SMs" if stuck else None
            workers, speeds = zip(*able, strict=True)
            self.random.choices(workers, speeds)[0].move()
        return self.problem

    def base(self, number: int, event: str) -> int:
        """Signals that the same counter had from earlier steps of this kind."""
        step, _, template, _ = self.program.stages[number]
        kind = self.program.kinds[step]
        return self.program.kinds[:step].count(kind) * template.events.get(event, 0)

    def counter(self, rank: int, number: int, event: str) -> tuple:
        step, index, _, _ = self.program.stages[number]
        return rank, self.program.kinds[step], index, event

    def open(self, rank: int, number: int, task: Task) -> bool:
        for wait in task.waits:
            source = self.program.source(number, wait.stage)
            if source is None:
                continue
            if self.counts[self.counter(rank, source, wait.event)] < self.base(source, wait.event) + wait.count:
                return False
        return True

    def check(self, name: Name, words, but=()) -> None:
        for word in words:
            if word not in but and self.memory.get(word) != self.wanted[name][word]:
                self.problem = f"{name} finds {self.memory.get(word)} at {word}, not {self.wanted[name][word]}"


class _Worker:
    """One SM: its queue and its ring. A task starts (reads), writes now or later, and ends (reads again, signals)."""

    def __init__(self, run: Execution, rank: int, sm: int):
        self.run, self.rank, self.sm = run, rank, sm
        stages = list(enumerate(run.program.stages))
        self.queue = [(n, g, t) for n, (_, _, template, _) in stages for g, t in template.queues[sm]]
        self.chunks = [
            (n, g, t)
            for n, (_, _, template, _) in stages
            for g, t in template.loads[sm]
            for _ in range(template.groups[g].tasks[t].load_chunks if t >= 0 else 1)
        ]
        self.loaded = self.at = 0
        self.running: tuple | None = None
        self.begun: set = set()
        self.passed: set = set()

    @property
    def done(self) -> bool:
        return self.running is None and self.at == len(self.queue)

    def _load(self) -> None:
        """Streams as far as the ring has room: a chunk leaves once its task has begun (a pool's: once it is empty)."""
        stages = self.run.plan.ring_bytes // self.run.plan.chunk_bytes
        while self.loaded < len(self.chunks):
            chunk = self.chunks[self.loaded]
            gone = self.loaded < stages or self.chunks[self.loaded - stages] in self.begun | self.passed
            if not gone or (chunk[2] < 0 and chunk not in self.passed):
                return
            self.loaded += 1

    def _next(self):
        """(stage, group, task) that could start, None where there is none or its events are not there yet."""
        while self.at < len(self.queue):
            n, g, t = self.queue[self.at]
            group = self.run.program.stages[n][2].groups[g]
            if t < 0:
                key = (self.rank, n, g)
                if (*key, "mine", self.sm) not in self.run.claimed:
                    if self.run.claimed[key] >= len(group.tasks):
                        self.passed.add((n, g, -1))
                        self.at += 1
                        continue
                    return n, g, -1  # to be claimed
                t = self.run.claimed[(*key, "mine", self.sm)]
            return (n, g, t) if self.run.open(self.rank, n, group.tasks[t]) else None
        return None

    def able(self) -> bool:
        self._load()
        if self.running is None:
            return self._next() is not None
        n, g, t, _, _ = self.running
        return self.queue[self.at][2] < 0 or (n, g, t) not in self.chunks[self.loaded :]

    def move(self) -> None:
        if self.running is None:
            self._start(*self._next())
            return
        n, g, t, name, access = self.running
        if name not in self.begun:
            self._write(name, access)
        own = set(access.writes)
        self.run.check(name, access.before, own)
        self.run.check(name, access.after)
        task = self.run.program.stages[n][2].groups[g].tasks[t]
        for event in task.signals:
            for rank in range(self.run.plan.tp) if self.run.program.crosses(task) else [self.rank]:
                self.run.counts[self.run.counter(rank, n, event)] += 1
        self.running = None
        if self.queue[self.at][2] < 0:
            del self.run.claimed[(self.rank, n, g, "mine", self.sm)]
        else:
            self.at += 1

    def _start(self, n: int, g: int, t: int) -> None:
        if t < 0:  # claim the next task of the pool; it starts when its events are there
            self.run.claimed[(self.rank, n, g, "mine", self.sm)] = self.run.claimed[(self.rank, n, g)]
            self.run.claimed[(self.rank, n, g)] += 1
            return
        step, index, template, layer = self.run.program.stages[n]
        group = template.groups[g]
        name = (self.rank, step, index, g, t)
        access = self.run.program.access(self.rank, group, group.tasks[t], layer)
        self.begun.add((n, g, t))
        self.run.check(name, access.before)
        self.run.check(name, access.after, set(access.writes))
        if self.run.random.random() < 0.5:
            self._write(name, access)
        self.running = n, g, t, name, access

    def _write(self, name: Name, access: Access) -> None:
        self.begun.add(name)
        self.run.memory.update((w, name) for w in access.writes)


def execute(plan: Plan, kinds: tuple[str, ...], seed: int) -> str | None:
    """What goes wrong in one random run; None if all is well."""
    return wrong_in_order(plan, kinds) or Execution(plan, kinds, Random(seed)).run()
