"""A discrete-event simulation of one step in steady state: where the time of a token goes, before there is a kernel.

Every SM has a loader and workers. The loader streams the bytes of the SM's tasks, weights and cache, in queue order,
ahead of events, never more than the ring ahead of what is consumed. The workers take their queue in order: wait for
events, load activations, consume what has arrived, reduce, store; a warp of its own signals meanwhile. Where values
cross as data they look at those instead of waiting for events. Claim pools give their next task to the SM that is free
first. Stages that end a step run once before the one measured, so that the loaders' run-ahead across its start is in
steady state.

A stream is followed at the ends of tasks, not chunk by chunk: within a task the workers consume evenly.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from functools import cached_property
from math import sqrt
from typing import Literal

from mpk_spec.errors import UserError, did_you_mean
from mpk_spec.planner.compiled import Pool, ReadyStage, ReadyTask, compile_stage
from mpk_spec.planner.cost import CostModel, cost_model, read_calibration
from mpk_spec.planner.plan import Plan, Stage, Step

WARM_UP_STAGES = 6
NEVER = (-1.0, -1)  # when, and by which record


@dataclass(slots=True)
class Ran:
    """What one task did, in microseconds from the start of the measured step (negative: the step before).

    free: the SM had nothing else to do; start: events seen; ready: activations there; consumed: all data used; stored:
    its values are; done: signalled. `stalled` is the part of ready..consumed spent waiting for data. `after` is the
    index of the record that start waited for, -1 for none, and `by` what of it: its signal (`event`), its values
    (`data`; start is when they have been seen, and the activations are there then), or its SM (`queue`).
    """

    stage: int
    sm: int
    group: int
    task: int
    free: float
    start: float
    ready: float
    consumed: float
    stored: float
    done: float
    stalled: float
    after: int
    by: Literal["event", "data", "queue"]


@dataclass(frozen=True)
class GroupTime:
    """One group, averaged over the stages that run it; microseconds."""

    stage: str
    name: str
    stages: int
    span_us: float  # first start to last signal
    event_us: float  # mean wait for events, or values that cross as data, of a task
    data_us: float  # mean wait for weights and cache, of a task
    busy_us: float  # mean work of a task
    critical_us: float  # of the step's critical path, in all its stages together
    stream_bytes: float  # from memory, in one stage


@dataclass
class Simulation:
    """One measured step. `records` begin with those of the warm-up, `first` is the measured step's first."""

    plan: Plan
    step: Step
    context: int
    cost: CostModel
    us: float
    weight_bytes: float
    kv_bytes: float
    stages: list[Stage]  # of all records, warm-up first
    warm: int  # how many of those are warm-up
    records: list[Ran]
    first: int
    last: int  # the record that ended the step
    streamed: dict[tuple[int, int], float] = field(default_factory=dict)  # (stage, group) -> bytes
    sm_bytes: list[float] = field(default_factory=list)

    @property
    def ms(self) -> float:
        """Milliseconds of the step: ms per token for decoding one sequence."""
        return self.us / 1e3

    @property
    def bytes(self) -> float:
        """Read from memory by one rank in one step."""
        return self.weight_bytes + self.kv_bytes

    @property
    def floor_ms(self) -> float:
        """The time to read those bytes at the streaming-read ceiling."""
        return self.bytes / self.cost.stream_gbps / 1e6

    @property
    def percent(self) -> float:
        """Percent of the ceiling."""
        return 100 * self.floor_ms / self.ms

    @property
    def tokens_per_second(self) -> float:
        return self.step.tokens * 1e3 / self.ms

    @cached_property
    def critical(self) -> dict[tuple[str, str], float]:
        """Microseconds of the critical path by (group, what): 'work', 'data' (stream behind), 'hop'. Sums to `us`."""
        found: dict[tuple[str, str], float] = {}
        at, end = self.last, self.us
        while at >= 0 and end > 0:
            ran = self.records[at]
            name = self.group_of(ran).name
            start = max(0.0, ran.start)
            data = min(ran.stalled, max(0.0, end - start))
            pieces = [("data", data), ("work", max(0.0, end - start) - data)]
            before = self.before(ran)
            pieces.append(("hop", max(0.0, start - max(0.0, before))))
            for what, us in pieces:
                if us > 0:
                    found[name, what] = found.get((name, what), 0.0) + us
            at, end = ran.after, before
        return found

    def before(self, ran: Ran) -> float:
        """When that was over which a task's start waited for; 0 for none."""
        if ran.after < 0:
            return 0.0
        cause = self.records[ran.after]
        alone = ran.by == "queue" and not self.cost.signaller
        return cause.done if ran.by == "event" or alone else cause.stored

    @cached_property
    def groups(self) -> list[GroupTime]:
        """Times of every group of every template, in the step's order."""
        sums: dict[tuple[int, int], list[float]] = {}
        bounds: dict[tuple[int, int], tuple[float, float]] = {}
        for ran in self.records[self.first :]:
            key = (self.stages[ran.stage].template, ran.group)
            total = sums.setdefault(key, [0, 0.0, 0.0, 0.0])
            total[0] += 1
            total[1] += ran.start - ran.free
            total[2] += ran.stalled
            total[3] += ran.stored - ran.start - ran.stalled
            lo, hi = bounds.get((ran.stage, ran.group), (ran.start, ran.done))
            bounds[ran.stage, ran.group] = (min(lo, ran.start), max(hi, ran.done))
        spans: dict[tuple[int, int], list[float]] = {}
        for (stage, group), (lo, hi) in bounds.items():
            spans.setdefault((self.stages[stage].template, group), []).append(hi - lo)
        return [self._group_time(t, g, sums[t, g], spans[t, g]) for t, g in sorted(sums, key=self._order_of)]

    def _order_of(self, key: tuple[int, int]) -> tuple[int, int]:
        return next(n for n, s in enumerate(self.step.stages) if s.template == key[0]), key[1]

    def _group_time(self, t: int, g: int, total: list[float], spans: list[float]) -> GroupTime:
        template = self.step.templates[t]
        name = template.groups[g].name
        count = int(total[0])
        critical = sum(us for (group, _), us in self.critical.items() if group == name)
        stage = next(n for n in range(self.warm, len(self.stages)) if self.stages[n].template == t)
        return GroupTime(
            template.name, name, len(spans), sum(spans) / len(spans), total[1] / count, total[2] / count,
            total[3] / count, critical, self.streamed.get((stage, g), 0.0),
        )  # fmt: skip

    @cached_property
    def utilisation(self) -> list[float]:
        """Of every SM, the part of the step in which its workers worked."""
        busy = [0.0] * self.plan.num_sms
        for ran in self.records[self.first :]:
            busy[ran.sm] += ran.stored - ran.start - ran.stalled
        return [b / self.us for b in busy]

    def group_of(self, ran: Ran):
        return self.step.templates[self.stages[ran.stage].template].groups[ran.group]


def simulate(plan: Plan, step: str = "decode", context: int | None = None, cost: CostModel | None = None) -> Simulation:
    """Simulates one step of `plan` with `context` positions in the cache (default: as many as it holds).

    Raises UserError for a step kind that the plan lacks, a context it cannot hold, and queues that cannot run.
    """
    if step not in plan.steps:
        raise UserError(f"this plan has no step '{step}'", did_you_mean(step, plan.steps, "steps"))
    context = plan.context if context is None else context
    if not 1 <= context <= plan.context:
        raise UserError(f"a context of {context} positions", f"this plan's cache holds 1 to {plan.context}")
    return _Machine(plan, plan.steps[step], context, cost or cost_model(plan.target)).run()


def predict(plan: Plan, step: str = "decode", context: int | None = None) -> Simulation:
    """`simulate` with the constants that were measured on this machine, where there are some."""
    return simulate(plan, step, context, cost_model(plan.target, read_calibration(plan.target)))


class _Machine:
    """All SMs while a step runs."""

    def __init__(self, plan: Plan, step: Step, context: int, cost: CostModel):
        self.plan, self.step, self.context, self.cost = plan, step, context, cost
        sms = plan.num_sms
        self.free = [0.0] * sms  # when the SM's workers are free
        self.behind = [-1] * sms  # index of the SM's latest record
        self.loaded_for = [(-1, -1)] * sms  # (stage, group) whose activations the SM holds
        self.arrival = [0.0] * sms  # when the stream's latest byte arrived
        self.position = [0.0] * sms  # bytes streamed
        self.consumed = [deque([(0.0, 0.0)]) for _ in range(sms)]  # (position, time) at which the stream was consumed
        self.records: list[Ran] = []
        self.fired: list[dict[str, tuple[float, int]]] = []  # per stage: event -> (time of its last signal, record)
        self.signals: list[dict[str, list[tuple[float, int]]]] = []  # likewise, all signals of partial events
        self.values: list[dict[tuple[int, int], int]] = []  # likewise, (group, task) -> its record
        self.ready: dict[tuple[int, int], ReadyStage] = {}  # by template and the one before it
        self.rates: list[float] = []

    def run(self) -> Simulation:
        all_stages = self.step.stages
        warm = len(all_stages) if len(all_stages) <= WARM_UP_STAGES else WARM_UP_STAGES
        stages = [*all_stages[-warm:], *all_stages]
        readies = [self._ready(stage, stages[at - 1]) for at, stage in enumerate(stages)]
        loads = self._loads(readies[warm:])
        self.rates = self._rates(loads)
        first = 0
        for number, ready in enumerate(readies):
            if number == warm:
                first = len(self.records)
            self.fired.append({})
            self.values.append({})
            self.signals.append({event: [] for event in ready.partial})
            self._run_stage(number, ready)
        ends = [self._end(0, first), self._end(first, len(self.records))]
        began = self.records[ends[0]].stored
        for ran in self.records:
            ran.free -= began
            ran.start -= began
            ran.ready -= began
            ran.consumed -= began
            ran.stored -= began
            ran.done -= began
        weights, kv, streamed = self._bytes(readies, warm)
        return Simulation(
            self.plan, self.step, self.context, self.cost, self.records[ends[1]].stored, weights, kv, stages, warm,
            self.records, first, ends[1], streamed, loads,
        )  # fmt: skip

    def _ready(self, stage: Stage, before: Stage) -> ReadyStage:
        key = stage.template, before.template
        if key not in self.ready:
            templates = (self.step.templates[number] for number in key)
            self.ready[key] = compile_stage(self.plan, self.step, next(templates), self.context, self.cost, *templates)
        return self.ready[key]

    def _end(self, lo: int, hi: int) -> int:
        """The record of the task that ended last."""
        return max(range(lo, hi), key=lambda n: self.records[n].stored)

    def _loads(self, readies: list[ReadyStage]) -> list[float]:
        """Bytes that each SM streams in the step; a pool's are shared evenly by those who claim from it."""
        per_stage: dict[int, list[float]] = {}
        total = [0.0] * self.plan.num_sms
        for ready in readies:
            if id(ready) not in per_stage:
                loads = per_stage[id(ready)] = [0.0] * self.plan.num_sms
                for entry in ready.order:
                    if isinstance(entry, Pool):
                        for sm in entry.sms:
                            loads[sm] += sum(t.cost.streamed for t in entry.tasks) / len(entry.sms)
                    else:
                        loads[entry[0]] += entry[1].cost.streamed
            total = [a + b for a, b in zip(total, per_stage[id(ready)], strict=True)]
        return total

    def _rates(self, loads: list[float]) -> list[float]:
        """Bytes per microsecond of each SM. One with more than its even part is served more, as the others wait."""
        even = sum(loads) / len(loads) or 1.0
        cost = self.cost
        return [
            cost.sm_gbps * 1e3
            * (1 + cost.spread * (0.5 if sm % 2 else -0.5))
            * min(cost.catch_up, max(1.0, load / even))
            for sm, load in enumerate(loads)
        ]  # fmt: skip

    def _bytes(self, readies: list[ReadyStage], warm: int) -> tuple[float, float, dict[tuple[int, int], float]]:
        """Weights and KV that the step reads, and all bytes by (stage, group)."""
        by_ready: dict[int, dict[int, tuple[float, float]]] = {}
        streamed: dict[tuple[int, int], float] = {}
        weights = kv = 0.0
        for number, ready in enumerate(readies[warm:], start=warm):
            if id(ready) not in by_ready:
                sums = by_ready[id(ready)] = {}
                for entry in ready.order:
                    for task in entry.tasks if isinstance(entry, Pool) else (entry[1],):
                        w, k = sums.get(task.group, (0.0, 0.0))
                        sums[task.group] = (w + task.cost.weight_bytes, k + task.cost.kv_bytes)
            for group, (w, k) in by_ready[id(ready)].items():
                weights, kv = weights + w, kv + k
                streamed[number, group] = w + k
        return weights, kv, streamed

    # running

    def _run_stage(self, number: int, ready: ReadyStage) -> None:
        seen: dict[tuple, tuple[float, int]] = {}  # tasks of a group mostly wait for the same
        for entry in ready.order:
            if isinstance(entry, Pool):
                self._run_pool(number, entry, seen)
            else:
                sm, task = entry
                self._run_task(
                    number, sm, task, self._events(number, task, seen), self._values(number, task, ready, seen)
                )

    def _run_pool(self, number: int, pool: Pool, seen: dict) -> None:
        """The SM that is free first claims the next task; a loader claims one task ahead of its workers."""
        claim = [(self.free[sm], sm) for sm in pool.sms]
        heapq.heapify(claim)
        for task in pool.tasks:
            event = when, whom = self._events(number, task, seen)
            if task.idle:  # skipped tasks signal too
                for event in task.signals:
                    self._signal(number, event, when, whom)
                continue
            claimed, sm = heapq.heappop(claim)
            known = max(claimed, when) if pool.routed else claimed  # which expert it is, the events say
            self._run_task(number, sm, task, event, NEVER, known)
            heapq.heappush(claim, (self.records[-1].ready, sm))

    def _events(self, number: int, task: ReadyTask, seen: dict) -> tuple[float, int]:
        """When the task's events have come (hops included), and the record of the signal that came last."""
        waits = task.waits
        if waits in seen:
            return seen[waits]
        when, whom, final = -1.0, -1, True
        for event, count, back, peers, made in waits:
            if number + back < 0 or made is not None:
                continue  # before the warm-up: long ago
            signals = self.signals[number + back].get(event)
            if signals is None:
                fired = self.fired[number + back].get(event, (-1.0, -1))
            else:
                fired = sorted(signals)[min(count, len(signals)) - 1]
                final = False
            at = fired[0] + (self.cost.peer_hop_us if peers else self.cost.hop_us)
            if fired[1] >= 0 and at > when:
                when, whom = at, fired[1]
        if final:
            seen[waits] = (when, whom)
        return when, whom

    def _values(self, number: int, task: ReadyTask, ready: ReadyStage, seen: dict) -> tuple[float, int]:
        """When all values that the task looks at are stored (peers': as if they were near), and whose came last."""
        when, whom = NEVER
        for _, _, back, peers, made in task.waits:
            if made is None or number + back < 0:
                continue
            if made not in seen:
                records = (self.values[number + back][maker] for maker in ready.makers[made])
                seen[made] = max(((self.records[n].stored, n) for n in records), default=NEVER)
            stored, record = seen[made]
            at = stored + (self.cost.peer_us if peers else 0.0)
            if record >= 0 and at > when:
                when, whom = at, record
        return when, whom

    def _signal(self, number: int, event: str, when: float, record: int) -> None:
        events = self.fired[number]
        if event not in events or when > events[event][0]:
            events[event] = (when, record)
        if event in self.signals[number]:
            self.signals[number][event].append((when, record))

    def _run_task(
        self, number: int, sm: int, task: ReadyTask, event: tuple[float, int], values: tuple[float, int],
        claimed: float | None = None,
    ) -> None:  # fmt: skip
        cost, free = task.cost, self.free[sm]
        start, after, by = (*event, "event") if event[0] > free else (free, self.behind[sm], "queue")
        if values[1] >= 0:
            if values[0] >= start:
                start, after, by = *values, "data"
            ready = start + cost.look_us
            start = ready if by == "data" else start
        else:
            ready = start + self.cost.start_us
            if self.loaded_for[sm] != (number, task.group):
                ready += cost.activation_us
        self.loaded_for[sm] = (number, task.group)
        consumed = ready + cost.compute_us
        if cost.streamed:
            consumed = self._stream(number, sm, task, ready, consumed, claimed)
        stored = consumed + cost.finish_us
        done = stored + cost.signal_us
        stalled = consumed - ready - cost.compute_us
        index = len(self.records)
        self.records.append(
            Ran(number, sm, task.group, task.index, free, start, ready, consumed, stored, done, stalled, after, by)
        )
        self.free[sm] = stored if self.cost.signaller else done
        self.behind[sm] = index
        self.values[number][task.group, task.index] = index
        for event in task.signals:
            self._signal(number, event, done, index)

    def _stream(self, number: int, sm: int, task: ReadyTask, ready: float, computed: float, claimed: float | None):
        """Advances the SM's stream over the task's bytes; returns when the workers have consumed them."""
        size, ring = task.cost.streamed, self.plan.ring_stages * self.plan.copy_bytes
        even = size / self.rates[sm]
        per_byte = (even + self.cost.chance_us * sqrt(even) * _chance(number, task)) / size
        lo = self.position[sm]
        hi = lo + size
        arrival = self.arrival[sm]
        if claimed is not None and claimed + self.cost.refill_us > arrival:
            arrival = claimed + self.cost.refill_us  # nobody knew of these bytes before
        arrival += size * per_byte
        points = self.consumed[sm]
        # the ring held back the bytes that lie `ring` behind a consumed one, until then
        while len(points) > 1 and points[1][0] + ring <= lo:
            points.popleft()
        before = points[0]
        for at, time in points:
            if at + ring > hi:
                if at > before[0]:  # consumed in between: evenly
                    time = before[1] + (time - before[1]) * (hi - ring - before[0]) / (at - before[0])
                    arrival = max(arrival, time + self.cost.refill_us)
                break
            if at + ring >= lo:
                arrival = max(arrival, time + self.cost.refill_us + (hi - ring - at) * per_byte)
            before = (at, time)
        compute = task.cost.compute_us
        if size > ring:  # and those behind this task's own first bytes
            arrival = max(arrival, ready + self.cost.refill_us + (size - ring) * max(per_byte, compute / size))
        last_chunk = compute * min(1.0, self.plan.chunk_bytes / size)
        consumed = max(computed, arrival + last_chunk)
        points.append((lo, ready))
        points.append((hi, consumed))
        self.position[sm], self.arrival[sm] = hi, arrival
        return consumed


def _chance(stage: int, task: ReadyTask) -> float:
    """A number in [-1, 1] that is the same in every run: SplitMix64's last steps (Steele et al. 2014). A hash that is
    linear in the task's index gives an SM whose tasks have the same one in all operators the same luck in all."""
    x = ((stage * 61 + task.group) * 4099 + task.index + 1) * 0x9E3779B97F4A7C15 % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return (x ^ x >> 31) / 2**63 - 1
