"""Memory: every read comes after the writes that it needs, every write after the uses that it ends.

Program order is stages, then groups, then (within a group) reads of what the group does not write, writes, reads of
what it does write: an attention that appends reads its own appends. Walking in that order, each buffer remembers for
each part who wrote it last and who read it since.

Tensors whose bytes overlap end each other's contents. Buffers of the same place, size and layout are compared span by
span, others as wholes. The KV cache is one buffer per layer, never overlapping and kept over steps; other contents end
with the step, except what feeds the next one.

With several ranks an inbox has one slot per rank, written by that rank in every rank's memory and read by its owner.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from mpk_spec.planner.plan import Plan
from mpk_spec.planner.verify.code import ReadSet, inbox_tensors
from mpk_spec.planner.verify.order import Stage
from mpk_spec.planner.verify.report import Report


@dataclass(slots=True)
class Segment:
    """A part of a buffer. `tensor` is what lies there (None: nothing yet), `step` when it was written."""

    lo: int
    hi: int
    tensor: str | None
    step: int
    writers: int
    readers: int

    def copy(self) -> Segment:
        return Segment(self.lo, self.hi, self.tensor, self.step, self.writers, self.readers)


@dataclass
class Buffer:
    segments: list[Segment]
    inbox: bool
    state: bool
    overlaps: list[tuple] | None = None
    """Keys of the other buffers that share bytes with it."""

    def copy(self) -> Buffer:
        return Buffer([s.copy() for s in self.segments], self.inbox, self.state, self.overlaps)

    def first(self, lo: int) -> int:
        return max(bisect_right(self.segments, lo, key=lambda s: s.lo) - 1, 0)

    def split(self, at: int) -> None:
        """Makes `at` a border between segments."""
        if at <= self.segments[0].lo or at >= self.segments[-1].hi:
            return
        i = self.first(at)
        segment = self.segments[i]
        if segment.lo < at < segment.hi:
            right = segment.copy()
            segment.hi = right.lo = at
            self.segments.insert(i + 1, right)

    def within(self, lo: int, hi: int) -> list[Segment]:
        if lo <= self.segments[0].lo and hi >= self.segments[-1].hi:
            return self.segments
        found = []
        for i in range(self.first(lo), len(self.segments)):
            segment = self.segments[i]
            if segment.lo >= hi:
                break
            if segment.hi > lo:
                found.append(segment)
        return found


class Hazards:
    """The state of all memory during a walk. `name` turns a bit into the name of its task."""

    def __init__(self, plan: Plan, report: Report, name: Callable[[int], str]):
        self.plan, self.report, self.name = plan, report, name
        self.buffers: dict[tuple, Buffer] = {}
        self.keys: dict[str, tuple] = {}
        self.reads = self.writes = 0
        inboxes = inbox_tensors(plan)
        for t in plan.tensors.values():
            key = (t.placement, t.offset, t.bytes, t.extent, t.dtype, t.name in inboxes) if t.bytes else (t.name,)
            self.keys[t.name] = key
            if key not in self.buffers:
                self.buffers[key] = Buffer([Segment(0, t.extent, None, -1, 0, 0)], t.name in inboxes, False)
        for key, buffer in self.buffers.items():
            buffer.overlaps = [k for k in self.buffers if k != key and _share_bytes(k, key)]

    def copy(self, name: Callable[[int], str]) -> Hazards:
        other = object.__new__(Hazards)
        other.__dict__.update(self.__dict__)
        other.name = name
        other.buffers = {k: b.copy() for k, b in self.buffers.items()}
        return other

    def walk(self, stage: Stage, own: list[int], peers: list[int]) -> None:
        """Checks one stage, given what each task knows, and remembers its accesses."""
        for group in stage.code.groups:
            for reads in group.reads:
                if reads.tensor not in group.writes:
                    self._read(stage, reads, own, peers, inside=False)
            for tensor, spans in group.writes.items():
                self._write(stage, tensor, spans, own, peers)
            for reads in group.reads:
                if reads.tensor in group.writes:
                    self._read(stage, reads, own, peers, inside=True)

    def _buffer(self, tensor: str, layer: int | None) -> Buffer | None:
        state = self.plan.states.get(tensor)
        key = (tensor, layer) if state else self.keys.get(self.plan.feeds.get(tensor, tensor))
        if key is None:
            return None
        if state and key not in self.buffers:
            self.buffers[key] = Buffer([Segment(0, state.extent, None, -1, 0, 0)], False, True, [])
        return self.buffers[key]

    def _read(self, stage: Stage, reads: ReadSet, own: list[int], peers: list[int], inside: bool) -> None:
        buffer = self._buffer(reads.tensor, stage.layer)
        if buffer is None:
            return  # a weight; unknown names are told by `limits`
        self.reads += len(reads.tasks)
        buffer.split(reads.lo)
        buffer.split(reads.hi)
        base, need, readers = stage.base, 0, reads.mask << stage.base
        for segment in buffer.within(reads.lo, reads.hi):
            wrong = self._wrong_content(stage, reads.tensor, buffer, segment)
            if wrong:
                said = f"reads '{reads.tensor}' [{reads.lo}, {reads.hi})"
                self._tell(stage, reads.tasks[0], f"{said} {wrong}", reads.tensor, wrong[:24])
            else:
                need |= segment.writers
            segment.readers |= readers
        if not need:
            return
        for n in reads.tasks:
            if need & own[n] == need and not buffer.inbox:
                continue
            late = need & ~own[n] & ~((1 << (base + n)) if inside else 0)
            what = f"reads '{reads.tensor}' [{reads.lo}, {reads.hi}) and nothing makes it wait for"
            if late:
                self._tell(stage, n, f"{what} its writer {self._first(late)}", reads.tensor, "RAW")
            if buffer.inbox and need & ~peers[n]:
                writer = self._first(need & ~peers[n])
                self._tell(stage, n, f"{what} {writer} of the other ranks, its writer", reads.tensor, "RAW peers")

    def _wrong_content(self, stage: Stage, tensor: str, buffer: Buffer, segment: Segment) -> str | None:
        """Why what lies there is not the value wanted, in program order."""
        part = f"[{segment.lo}, {segment.hi})"
        if buffer.state:
            return None if segment.step == stage.step else f"before this step's append to {part}"
        source = self.plan.feeds.get(tensor)
        if segment.tensor is None:
            return None if source else f"before anything writes {part}"
        if segment.tensor != (source or tensor):
            return f"after '{segment.tensor}' took its memory"
        if source:
            return None if segment.step < stage.step else f"after this step has written '{source}', which feeds it"
        return None if segment.step == stage.step else f"of the step before: this step does not write {part}"

    def _write(self, stage: Stage, tensor: str, spans, own: list[int], peers: list[int]) -> None:
        buffer = self._buffer(tensor, stage.layer)
        if buffer is None:
            return
        self.writes += len(spans)
        base, segments, at = stage.base, buffer.segments, 0
        others, abroad = self._others(buffer)
        fresh = []
        for lo, hi, n in spans:
            while segments[at].hi <= lo:
                at += 1
            readers = writers = alien = 0
            for i in range(at, len(segments)):
                segment = segments[i]
                if segment.lo >= hi:
                    break
                readers |= segment.readers
                writers |= segment.writers
                if segment.tensor != tensor:
                    alien |= segment.readers | segment.writers
            need = readers | writers | others
            if need & own[n] != need and need & ~own[n] & ~(1 << (base + n)):
                late = need & ~own[n] & ~(1 << (base + n))
                self._tell_write(stage, n, tensor, lo, hi, late, readers, others | alien, "")
            need = (readers | others) if buffer.inbox else abroad
            if self.plan.tp > 1 and need & peers[n] != need:
                late = need & ~peers[n]
                self._tell_write(stage, n, tensor, lo, hi, late, readers, others | alien, " of the other ranks")
            fresh.append(Segment(lo, hi, tensor, stage.step, 1 << (base + n), 0))
        self._replace(buffer, fresh)
        for key in buffer.overlaps or ():
            for segment in self.buffers[key].segments:
                segment.tensor = tensor

    def _others(self, buffer: Buffer) -> tuple[int, int]:
        """All uses of overlapping buffers, and those of them that other ranks made in this rank's memory."""
        uses = abroad = 0
        for key in buffer.overlaps or ():
            other = self.buffers[key]
            for segment in other.segments:
                uses |= segment.readers | segment.writers
                if other.inbox:
                    abroad |= segment.writers
        return uses, abroad

    def _replace(self, buffer: Buffer, fresh: list[Segment]) -> None:
        """Puts the fresh segments (sorted by `lo`) in the place of what they cover."""
        whole = fresh[0].lo == 0 and fresh[-1].hi == buffer.segments[-1].hi
        if whole and all(a.hi == b.lo for a, b in pairwise(fresh)):
            buffer.segments = fresh
            return
        for new in fresh:
            buffer.split(new.lo)
            buffer.split(new.hi)
        kept = []
        starts = {new.lo: new for new in fresh}
        end = -1
        for segment in buffer.segments:
            new = starts.get(segment.lo)
            if new is not None:
                kept.append(new)
                end = new.hi
            elif segment.lo >= end:
                kept.append(segment)
        buffer.segments = kept

    def _tell_write(self, stage, n, tensor, lo, hi, late, readers, others, whose) -> None:
        user = self._first(late) + whose
        what = f"writes '{tensor}' [{lo}, {hi}) and nothing makes it wait for"
        if late & others:
            self._tell(stage, n, f"{what} {user}, which uses the same bytes", tensor, "reuse", whose)
        elif late & readers:
            self._tell(stage, n, f"{what} {user}, which reads the value before", tensor, "WAR", whose)
        else:
            self._tell(stage, n, f"{what} {user}, which writes the value before", tensor, "WAW", whose)

    def _first(self, bits: int) -> str:
        return self.name((bits & -bits).bit_length() - 1)

    def _tell(self, stage: Stage, n: int, what: str, *key: object) -> None:
        task = stage.code.name(n)
        self.report.add(f"{self.name(stage.base + n)} {what}", stage.code.kind, task.split("[")[0], *key)


def _share_bytes(a: tuple, b: tuple) -> bool:
    if len(a) < 6 or len(b) < 6 or a[0] != b[0]:
        return False
    return a[1] < b[1] + b[2] and b[1] < a[1] + a[2]
