"""Values that cross as data: what their readers must know by events all the same, and what nobody may rely on.

A step of one token relies on events less than the rest of the proof assumes: a wait marked `data` is for the event of
the write before. `seen` is what a task knows then, by its queue and the other events. By it are proved: a copy was
cleared, for all to see, before its readers look at it; who clears a part is who wrote it; everything else is read and
overwritten in the order of events; a step ends after all of it.

The rest of the proof takes a `data` wait for one of its event. That holds if the task reads something of every
signaller, or knows without that wait that it is `done`. Of an attention's parts those that saw no position are not
read, and their tasks do nothing. Steps of several tokens wait for the events themselves, and know more.

What the sampling reads crosses as data as well, once in a step. The tasks that wrote it are over when the step ends,
and so is what they knew to be; their other stores are seen by who waits for their event, in the next step.

What a step is about crosses as data too. Its words say which step they belong to, so that nothing needs to be cleared;
that all of the step before is over they tell (`done`), and nothing else: an SM knows what its own waits tell.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import groupby

from mpk_spec.planner.crossing import write_before
from mpk_spec.planner.plan import Plan, Span, Task, Wait
from mpk_spec.planner.verify.code import Code
from mpk_spec.planner.verify.copies import check_copies
from mpk_spec.planner.verify.report import Report


class _Write:
    """One write of a tensor: its parts in order, each with the bit of the task that makes it."""

    def __init__(self, group: int, parts: list[tuple[int, int, int]], sms: list[int]):
        self.group, self.parts, self.sms = group, parts, sms
        self.ends = [hi for _, hi, _ in parts]
        self._found: dict[tuple[int, int], int] = {}

    def touching(self, span: Span) -> int:
        """The writers of a span."""
        key = span.lo, span.hi
        if key not in self._found:
            mask, at = 0, bisect_right(self.ends, span.lo)
            while at < len(self.parts) and self.parts[at][0] < span.hi:
                mask |= self.parts[at][2]
                at += 1
            self._found[key] = mask
        return self._found[key]

    def by(self, sm: int) -> int:
        """The tasks of an SM."""
        return sum(bit for (_, _, bit), at in zip(self.parts, self.sms, strict=True) if at == sm)

    def where(self) -> list[tuple[int, int, int]]:
        return [(lo, hi, sm) for (lo, hi, _), sm in zip(self.parts, self.sms, strict=True)]


def check_data(plan: Plan, codes: dict[str, list[Code]], report: Report) -> None:
    """Two steps of one token, one after the other. The plan must have passed all other checks."""
    turning = {t.name for t in plan.tensors.values() if t.turns > 1}
    marked = any(_data_waits(code) for kind in codes.values() for code in kind)
    if not turning:
        if marked:
            report.add("a wait is for data, and no tensor has a second copy")
        return
    _check_alone(plan, turning, report)
    check_copies(plan, report)
    kinds = [[codes[kind][s.template] for s in step.stages] for kind, step in plan.steps.items()]
    first, *others = kinds
    if any(len(o) != len(first) or not all(map(_alike, o, first)) for o in others):
        report.add("values cross as data and the plan's steps differ in their queues, spans or waits")
        return
    if not report:
        _Walk(plan, turning, first, report).run()


def _data_waits(code: Code) -> list[tuple[int, tuple[str, ...]]]:
    tasks = [t for g in code.template.groups for t in g.tasks]
    return [(n, events) for n, t in enumerate(tasks) if (events := tuple(w.event for w in t.waits if w.data))]


def _alike(a: Code, b: Code) -> bool:
    return a.like(b) and _data_waits(a) == _data_waits(b)


def _check_alone(plan: Plan, turning: set[str], report: Report) -> None:
    for name in sorted(turning):
        one = plan.tensors[name]
        for other in plan.tensors.values():
            apart = other.placement != one.placement or other.offset + other.bytes <= one.offset
            if other is not one and not apart and other.offset < one.offset + one.bytes:
                report.add(f"'{name}' crosses as data and shares bytes with '{other.name}'")


KEPT = 8
"""Of a run of like layers so many are walked. What a task knows it has from the two layers before, and hands on: it is
the same in every layer of the run but the first ones, and what reaches the run's end from its middle reaches it from
further back in the same way."""


def shortened(templates: list[int]) -> list[int]:
    """Which stages to walk: of each run with one template the first and the last ones."""
    kept: list[int] = []
    for _, run in groupby(enumerate(templates), key=lambda numbered: numbered[1]):
        stages = [stage for stage, _ in run]
        kept += stages if len(stages) <= KEPT else [*stages[: KEPT // 2], *stages[-KEPT // 2 :]]
    return kept


@dataclass
class _Stage:
    """`seen`, `done`: by event, what is visible to whoever waits for it, and what has been run."""

    code: Code
    base: int
    writes: dict[str, _Write]
    seen: dict[str, int] = field(default_factory=dict)
    done: dict[str, int] = field(default_factory=dict)
    _signallers: dict[str, int] = field(default_factory=dict)

    def signallers(self, event: str) -> int:
        if event not in self._signallers:
            bits = 0
            for n in self.code.signallers.get(event, ()):
                bits |= 1 << n
            self._signallers[event] = bits << self.base
        return self._signallers[event]


class _Walk:
    """`past[tensor]`: its writes in order; `readers[tensor]`: all its readers; `seen`, `done`: what each SM knows."""

    def __init__(self, plan: Plan, turning: set[str], codes: list[Code], report: Report):
        self.plan, self.turning, self.report = plan, turning, report
        stages = next(iter(plan.steps.values())).stages
        walked = shortened([s.template for s in stages])
        self.codes = [codes[n] for n in walked]
        self.layers = [stages[n].layer is not None for n in walked]
        self.inboxes = {n for n in turning if plan.tensors[n].inbox} if plan.tp > 1 else set()
        self.seen, self.done = [0] * plan.num_sms, [0] * plan.num_sms
        self.stages: list[_Stage] = []
        self.past: dict[str, list[_Write]] = {}
        self.readers: dict[str, int] = {}
        self.end = 0

    def run(self) -> None:
        for step in range(2):
            begin, known, looked = self.end, 0, 0
            for code, layer in zip(self.codes, self.layers, strict=True):
                seen, values = self._stage(code, layer, check=step > 0)
                known, looked = known | seen, looked | values
            everything = (1 << self.end) - (1 << begin)
            late = everything & ~known & ~looked
            if late:
                self.report.add(f"a step of one token ends and no event says that {self._name(late)} is done")
                return
            if self.plan.tp == 1:  # of several ranks one says that a step begins: its end tells nothing of the others'
                self.done = [known | looked | s for s in self.done]

    def _stage(self, code: Code, layer: bool, check: bool) -> tuple[int, int]:
        """Runs one stage; returns what whoever writes what feeds the next step knows, and which tasks are over because
        it has seen their values, or those of others who knew it."""
        tasks = [(g, t) for g, group in enumerate(code.template.groups) for t in group.tasks]
        stage = _Stage(code, self.end, self._writes(code, self.end))
        self.stages.append(stage)
        self.end += code.size
        known_at_end = looked_at = 0
        for n in code.order:
            group, task = tasks[n]
            seen, done = self._known(stage, n, task)
            if check:
                for span in task.reads:
                    polled = self._polled(stage, group, span, layer, task)
                    self._check_read(stage, n, group, span, seen, polled)
                    if span.tensor in self.inboxes and polled:
                        self._check_ranks(stage, n, group, span, task)
                for span in task.writes:
                    self._check_write(stage, n, span, seen, done)
            bit = 1 << (stage.base + n)
            self.seen[code.sms[n]], self.done[code.sms[n]] = seen | bit, done | bit
            for event in task.signals:
                stage.seen[event] = stage.seen.get(event, 0) | seen | bit
                stage.done[event] = stage.done.get(event, 0) | done | bit
            if any(s.tensor in self.plan.feeds.values() for s in task.writes):
                known_at_end |= seen | bit
                for wait in task.waits:
                    looked_at |= self.stages[wait.stage - 1].seen.get(wait.event, 0) if wait.data else 0
        for tensor, write in stage.writes.items():
            self._check_turn(stage, tensor, write)
            self.past.setdefault(tensor, []).append(write)
        for n, (_, task) in enumerate(tasks):
            for span in task.reads:
                self.readers[span.tensor] = self.readers.get(span.tensor, 0) | 1 << (stage.base + n)
        return known_at_end, looked_at

    def _writes(self, code: Code, base: int) -> dict[str, _Write]:
        return {
            tensor: _Write(g, [(lo, hi, 1 << (base + n)) for lo, hi, n in parts], [code.sms[n] for *_, n in parts])
            for g, group in enumerate(code.groups)
            for tensor, parts in group.writes.items()
        }

    def _polled(self, stage: _Stage, group: int, span: Span, layer: bool, task: Task) -> bool:
        """Whether a task looks for values of a tensor that lies twice. After the layers: for those made there, and for
        those whose events it does not wait for."""
        here = stage.writes.get(span.tensor)
        if span.tensor not in self.turning or layer or (here is not None and here.group < group):
            return span.tensor in self.turning
        sources = [(w.event, self.stages[len(self.stages) - 1 + w.stage]) for w in task.waits if w.data]
        made = [(source.signallers(event), source.writes.get(span.tensor)) for event, source in sources]
        return any(write and bits & write.touching(span) for bits, write in made)

    def _known(self, stage: _Stage, n: int, task: Task) -> tuple[int, int]:
        sm, at = stage.code.sms[n], len(self.stages) - 1
        seen, done = self.seen[sm], self.done[sm]
        unread: dict[str, int] = {}
        for wait in task.waits:
            if at + wait.stage < 0:
                continue
            source = self.stages[at + wait.stage]
            if wait.data:
                place, stages = at % len(self.codes), len(self.codes)
                before = at - place + write_before(place + wait.stage, sum(self.layers), stages)
                if before >= 0:
                    seen |= self._cleared(stage, n, wait, source, self.stages[before])
                unread[wait.event] = self._unread(source, task, wait.event)
            else:
                seen |= source.seen.get(wait.event, 0)
            if not unread.get(wait.event):
                done |= source.done.get(wait.event, 0)
        for event, bits in unread.items():
            if bits & ~done:
                self._tell(stage, n, f"waits for '{event}' as data and reads nothing of", bits & ~done)
        return seen, done

    def _cleared(self, stage: _Stage, n: int, wait: Wait, source: _Stage, before: _Stage) -> int:
        """What the event of the write before makes visible: the kernel waits for as many signals as of this one."""
        total = before.code.totals.get(wait.event, 0)
        if total and not total == source.code.totals.get(wait.event) == wait.count:
            name = stage.code.name(n)
            said = f"{name} waits for {wait.count} signals of '{wait.event}' as data; the time before it has {total}"
            self.report.add(said, name.split("[")[0], wait.event, "count")
        return before.seen.get(wait.event, 0)

    def _check_ranks(self, stage: _Stage, n: int, group: int, span: Span, task: Task) -> None:
        """That other ranks have cleared their parts is told by an event of all ranks, not by what this one has done."""
        here = stage.writes.get(span.tensor)
        inside = here is not None and here.group < group
        if not inside and not self.past.get(span.tensor):
            return
        writers = (here if inside else self.past[span.tensor][-1]).touching(span)
        for wait in task.waits:
            at = len(self.stages) - 1 + wait.stage
            writers &= ~(self.stages[at].signallers(wait.event) if at >= 0 else 0)
        if writers:
            said = f"looks at parts of '{span.tensor}' of other ranks and waits for no event of"
            self._tell(stage, n, said, writers)

    def _unread(self, source: _Stage, task: Task, event: str) -> int:
        """The signallers of an event of which a task reads nothing that crosses as data."""
        bits = source.signallers(event)
        for span in task.reads:
            if span.tensor in self.turning and span.tensor in source.writes:
                bits &= ~source.writes[span.tensor].touching(span)
        return bits

    def _check_read(self, stage: _Stage, n: int, group: int, span: Span, seen: int, polled: bool) -> None:
        tensor = span.tensor
        here = stage.writes.get(tensor)
        writes = list(self.past.get(tensor, []))
        if here is not None and here.group < group:
            writes.append(here)
        if not writes:
            return  # a weight, this task's own page, or what the step is given
        if polled and len(writes) < 2:
            return
        late = writes[-2 if polled else -1].touching(span) & ~seen & ~(1 << (stage.base + n))
        if late and polled:
            said = f"looks at '{tensor}' [{span.lo}, {span.hi}), and no event says that it is cleared by"
            self._tell(stage, n, said, late)
        elif late:
            self._tell(
                stage, n, f"reads '{tensor}' [{span.lo}, {span.hi}), and no event says that it is written by", late
            )

    def _check_write(self, stage: _Stage, n: int, span: Span, seen: int, done: int) -> None:
        """What does not cross as data is overwritten in the order of events or by who wrote it, after its readers.

        A page of the cache is one task's.
        """
        if span.tensor in self.turning or span.tensor in self.plan.states or not self.past.get(span.tensor):
            return
        before = self.past[span.tensor][-1]
        late = before.touching(span) & ~seen & ~before.by(stage.code.sms[n]) | self.readers.get(span.tensor, 0) & ~done
        if late:
            what = f"writes '{span.tensor}' [{span.lo}, {span.hi}), and"
            self._tell(stage, n, f"{what} no event says that the value before is done with by", late)

    def _check_turn(self, stage: _Stage, tensor: str, write: _Write) -> None:
        """Who clears a part of a copy is who wrote it and who will write it: the same SM."""
        before = self.past.get(tensor)
        if tensor in self.turning and before and before[-1].where() != write.where():
            name = stage.code.template.name
            self.report.add(f"'{tensor}' is written on other SMs in '{name}' than the time before", tensor, "turn")

    def _find(self, bit: int) -> tuple[_Stage, int]:
        number = bit.bit_length() - 1
        stage = next(s for s in reversed(self.stages) if s.base <= number)
        return stage, number - stage.base

    def _name(self, bits: int) -> str:
        stage, n = self._find(bits & -bits)
        return stage.code.name(n)

    def _tell(self, stage: _Stage, n: int, what: str, bits: int) -> None:
        name = stage.code.name(n)
        self.report.add(
            f"{name} {what} {self._name(bits)}", stage.code.kind, name.split("[")[0], what.split("'")[0], "data"
        )
