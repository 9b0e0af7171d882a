"""Walks over steps: order and memory of stage after stage, with induction over repeating layers.

Where a sequence of layers repeats, its repetitions are walked until the state after one is the state after the one
before, moved by one repetition: what SMs and pending events know, and who last used each part of each buffer. Knowledge
of a task spreads independently of other tasks, so from there on every repetition is like the last one and the rest is
left out. (Knowledge of layers further back only grows. Their KV cache is used again in the next step, of which `prove`
shows that all its tasks come after all tasks of this one.)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field

from mpk_spec.planner.plan import Plan, Step
from mpk_spec.planner.verify.code import Code
from mpk_spec.planner.verify.hazards import Hazards
from mpk_spec.planner.verify.order import Knowledge, Stage
from mpk_spec.planner.verify.report import Report

MAX_PERIOD = 16
"""Layers in the longest repeating sequence looked for."""
MIN_REPEATS = 4
"""Shorter runs are walked whole."""


@dataclass
class Walked:
    """One step of a walk. `bits`: all its tasks. `own`, `peers`: what each of its tasks knows (the least of them).

    `appends`: those of its tasks that write the KV cache. `enders`: bit and knowledge of those that make what feeds the
    next step.
    """

    stages: list[Stage]
    bits: int = 0
    crossing: int = 0
    own: int = -1
    peers: int = -1
    peers_at_end: list[int] = field(default_factory=list)
    induced: int = 0
    appends: int = 0
    enders: list[tuple[int, int]] = field(default_factory=list)


class Walk:
    """Steps one after another, from an idle machine."""

    def __init__(self, plan: Plan, codes: dict[str, list[Code]], report: Report, full: bool, keep: bool = False):
        self.plan, self.codes, self.report, self.full, self.keep = plan, codes, report, full, keep
        self.knowledge = Knowledge(plan.num_sms, plan.tp)
        self.stages: list[Stage] = []
        self.bases: list[int] = []
        self.end = 0
        self.steps = 0
        self.hazards = Hazards(plan, report, self.name)

    def copy(self) -> Walk:
        other = object.__new__(Walk)
        other.__dict__.update(self.__dict__)
        other.knowledge = self.knowledge.copy()
        other.stages, other.bases = list(self.stages), list(self.bases)
        other.hazards = self.hazards.copy(other.name)
        return other

    def name(self, bit: int) -> str:
        """A task's name: step, layer (or template), group, task."""
        stage = self.stages[bisect_right(self.bases, bit) - 1]
        place = f"layer {stage.layer}" if stage.layer is not None else stage.code.template.name
        nth = ("", "next ", "second next ")[stage.step]
        return f"{nth}{stage.code.kind}, {place}, {stage.code.name(bit - stage.base)}"

    def run(self, kind: str) -> Walked:
        """Walks one step of that kind."""
        step, walked = self.plan.steps[kind], Walked([])
        reach = max((-s for code in self.codes[kind] for waits in code.waits for s, _ in waits), default=0)
        index = 0
        alike = [id(code.same or code) for code in (self.codes[kind][s.template] for s in step.stages)]
        while index < len(step.stages):
            period, repeats = (0, 0) if self.full else find_run(alike, step, index)
            if not repeats:
                self._stage(step, index, walked)
                index += 1
                continue
            walked.induced += self._repeat(step, index, period, repeats, reach, walked)
            index += period * repeats
        self.steps += 1
        self._check_end(walked)
        return walked

    def _check_end(self, walked: Walked) -> None:
        """The step ends after all its appends: the next one loads what they wrote ahead of its own events."""
        for bit, known in walked.enders:
            late = walked.appends & ~known
            if late:
                append = self.name((late & -late).bit_length() - 1)
                said = f"ends the step and nothing makes it wait for {append}, which writes the KV cache"
                self.report.add(f"{self.name(bit)} {said}", walked.stages[0].code.kind, "end")

    def _repeat(self, step: Step, index: int, period: int, repeats: int, reach: int, walked: Walked) -> int:
        """Walks a run of layers until it repeats itself; the number of stages left out."""
        starts, before = [self.end], None
        for repeat in range(repeats):
            for at in range(index + repeat * period, index + (repeat + 1) * period):
                self._stage(step, at, walked)
            starts.append(self.end)
            if repeat >= 1 and reach <= period * repeat:
                now = self._state(starts, reach)
                if now == before:
                    return (repeats - repeat - 1) * period
                before = now
        return 0

    def _stage(self, step: Step, index: int, walked: Walked) -> None:
        code = self.codes[step.kind][step.stages[index].template]
        stage = Stage(code, self.steps, index, step.stages[index].layer, self.end, {}, {})
        own, peers = self.knowledge.walk(stage, self.stages)
        if self.keep:
            stage.known = own, peers
        self.stages.append(stage)
        self.bases.append(self.end)
        self.end += code.size
        self.hazards.walk(stage, own, peers)
        walked.stages.append(stage)
        walked.bits |= stage.bits
        for n in self._writers(code, self.plan.states):
            walked.appends |= 1 << (stage.base + n)
        walked.enders += [(stage.base + n, own[n]) for n in self._writers(code, self.plan.feeds.values())]
        for n, known in enumerate(own):
            walked.own &= known
            if code.cross[n]:
                walked.crossing |= 1 << (stage.base + n)
        for known in peers:
            walked.peers &= known
        walked.peers_at_end = peers

    @staticmethod
    def _writers(code: Code, tensors: Iterable[str]) -> list[int]:
        return [n for t in tensors for group in code.groups for _, _, n in group.writes.get(t, ())]

    def _state(self, starts: list[int], reach: int):
        """Everything that later checks depend on, relative to the last repetition.

        A set of tasks becomes three: those of the last repetition, of the one before, and of before the run (only
        those that some buffer still remembers). Older repetitions may be remembered by no buffer.
        """
        first, previous, last = starts[0], starts[-3], starts[-2]
        buffers = [b for b in self.hazards.buffers.values() if not b.state]
        remembered = 0
        for buffer in buffers:
            for s in buffer.segments:
                remembered |= s.writers | s.readers
        old = remembered & ((1 << first) - 1)
        width = (1 << (last - previous)) - 1

        def relative(bits: int) -> tuple[int, int, int]:
            return bits & old, bits >> previous & width, bits >> last

        recent = self.stages[len(self.stages) - reach :] if reach else []
        events = [sorted((e, relative(b)) for e, b in s.own.items()) for s in recent]
        events += [sorted((e, relative(b)) for e, b in s.peers.items()) for s in recent]
        sms = [relative(bits) for bits in [*self.knowledge.own, *self.knowledge.peers]]
        memory = [
            [(s.lo, s.hi, s.tensor, s.step, relative(s.writers), relative(s.readers)) for s in b.segments]
            for b in buffers
        ]
        lost = remembered & ~old & ((1 << previous) - 1)
        return old, sms, events, memory, lost


def find_run(alike: list[int], step: Step, index: int) -> tuple[int, int]:
    """The repeating sequence that starts at stage `index`: its period and number of repeats, (0, 0) where none is.

    `alike`: equal numbers for stages with like templates. Its layers must be met nowhere else in the step.
    """
    stages, best = step.stages, (0, 0)
    for period in range(1, min(MAX_PERIOD, (len(stages) - index) // MIN_REPEATS) + 1):
        repeats = 1
        while _repeats(alike, index, period, repeats):
            repeats += 1
        if repeats >= MIN_REPEATS and period * repeats > best[0] * best[1]:
            best = period, repeats
    if not best[1]:
        return best
    end = index + best[0] * best[1]
    layers = [s.layer for s in stages[index:end] if s.layer is not None]
    elsewhere = {s.layer for s in (*stages[:index], *stages[end:])}
    return best if len(set(layers)) == len(layers) and not elsewhere & set(layers) else (0, 0)


def _repeats(alike: list[int], index: int, period: int, repeats: int) -> bool:
    start = index + period * repeats
    return start + period <= len(alike) and alike[start : start + period] == alike[start - period : start]
