"""The cost model's constants from a profile: medians over tasks, so that a few late ones change nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpk_spec.planner.cost import CostModel, calibration_file, kv_of, read_calibration
from mpk_spec.planner.simulate import Simulation
from mpk_spec.profiler.clock import Times

FEW = 8  # samples below which a constant is left as it is
LEAST_US = 0.01
MANY_BLOCKS = 4  # KV blocks of a task that tells what one takes
PATIENT = 0.05  # part of its time that a task may wait for weights and still tell how fast it consumes them


@dataclass(frozen=True)
class Fit:
    """One constant: its median over `samples` tasks, the middle half of which lies between `low` and `high`."""

    name: str
    value: float
    low: float
    high: float
    samples: int


def fit(times: Times, steps: list[Simulation]) -> list[Fit]:
    """`times` and the measured steps made from them; constants without enough tasks to tell are left out."""
    cost, tasks = steps[0].cost, _tasks(times, steps[0])
    streamed = [t for t in tasks if t.chunks]
    activation = _median("activation_us", (t.open - cost.start_us for t in streamed if not t.looks))
    reduce = _median("reduce_us", (t.epilogue for t in streamed))
    # of a task without weights, whose results come out of one piece of work
    after = (reduce or _same("reduce_us", cost)).value
    before = cost.start_us + (activation or _same("activation_us", cost)).value
    rate = _median("consume_gbps", _rates(streamed, cost))
    found = [
        _median("hop_us", _hops(steps)),
        _median("data_hop_us", _data_hops(steps)),
        activation,
        reduce,
        _median("signal_us", (t.signal for t in tasks)),
        rate,
        _median("row_op_us", _row_ops(tasks, before, after)),
        _median("kv_block_us", _kv_blocks(tasks, before, after, (rate or _same("consume_gbps", cost)).value)),
    ]
    return [one for one in found if one is not None]


def save(target: str, fits: Iterable[Fit], **given: float) -> Path:
    """Adds the constants to the GPU's calibration file, which `plan` and `profile` read; returns its path."""
    path = calibration_file(target)
    known = read_calibration(target) or {}
    known |= {one.name: round(one.value, 4) for one in fits} | given
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".json.new")
    aside.write_text(json.dumps(known, indent=2, sort_keys=True), encoding="utf-8")
    aside.replace(path)
    return path


@dataclass(frozen=True)
class _Timed:
    """One task's phases in microseconds. `looks`: at values that cross as data. `blocks`: of the KV cache, None for
    what is no attention."""

    looks: bool
    open: float  # from its events to its first weights
    work: float  # from its events to its results, without waits for weights; where it looks, from its inputs on
    consume: float  # from its first weights to its last, likewise
    waited: float
    epilogue: float
    signal: float
    bytes: int
    chunks: int
    blocks: int | None
    kv_bytes: float


def _tasks(times: Times, measured: Simulation) -> list[_Timed]:
    plan, step, found = measured.plan, measured.step, []
    for stage, made in enumerate(step.stages):
        template = step.templates[made.template]
        for sm, queue in enumerate(template.queues):
            for place, (g, index) in enumerate(queue):
                group, task = template.groups[g], template.groups[g].tasks[index]
                attention = next((n for n in group.nodes if n.op == "attention"), None)
                blocks, kv_bytes = None, 0.0
                if attention is not None:
                    blocks, kv_bytes = kv_of(plan, step, task, attention.values.get("window"), measured.context)
                for number in range(1, times.asked.shape[0]):
                    at = (number, sm, stage, place)
                    if np.isfinite(times.signalled[at]):
                        found.append(_timed(times, at, task, blocks, kv_bytes))
    return found


def _timed(times: Times, at: tuple, task, blocks: int | None, kv_bytes: float) -> _Timed:
    ready, seen, opened = (float(t[at]) for t in (times.ready, times.seen, times.opened))
    computed, stored = float(times.computed[at]), float(times.stored[at])
    waited, looks = float(times.waited[at]), any(w.data for w in task.waits)
    return _Timed(
        looks, opened - ready, stored - (seen if looks else ready) - waited, computed - opened - waited, waited,
        stored - computed, float(times.signalled[at]) - stored, task.load_bytes, task.load_chunks, blocks, kv_bytes,
    )  # fmt: skip


def _hops(steps: list[Simulation]) -> Iterable[float]:
    """From the last signal to its being seen, of tasks that had nothing else to wait for."""
    for step in steps:
        for ran in step.records:
            if ran.by == "event" and ran.after >= 0:
                yield ran.start - step.before(ran)


def _data_hops(steps: list[Simulation]) -> Iterable[float]:
    """From the last values to all of them seen and prepared, of tasks that looked before they were there."""
    for step in steps:
        for ran in step.records:
            if ran.by == "data" and step.before(ran) > ran.free:
                yield ran.start - step.before(ran)


def _rates(tasks: list[_Timed], cost: CostModel) -> Iterable[float]:
    """GB/s at which weights that lay in the ring were consumed."""
    for task in tasks:
        own = task.consume - task.chunks * cost.chunk_us
        if own > 0 and task.waited <= PATIENT * task.consume:
            yield task.bytes / own / 1e3


def _row_ops(tasks: list[_Timed], before: float, after: float) -> Iterable[float]:
    """Arithmetic of tasks that stream nothing, without what lies `before` (unless they look) and `after` it."""
    for task in tasks:
        if not task.chunks and task.blocks is None:
            yield task.work - after - (0.0 if task.looks else before)


def _kv_blocks(tasks: list[_Timed], before: float, after: float, gbps: float) -> Iterable[float]:
    """What a block of the cache takes beside the reading of its bytes, where there are enough to share all else."""
    for task in tasks:
        if task.blocks is not None and task.blocks >= MANY_BLOCKS:
            around = after + (0.0 if task.looks else before)
            yield (task.work - around - task.kv_bytes / (gbps * 1e3)) / task.blocks


def _same(name: str, cost: CostModel) -> Fit:
    value = getattr(cost, name)
    return Fit(name, value, value, value, 0)


def _median(name: str, samples: Iterable[float]) -> Fit | None:
    values = np.array(list(samples))
    if len(values) < FEW:
        return None
    low, middle, high = (float(v) for v in np.percentile(values, (25, 50, 75)))
    return Fit(name, max(LEAST_US, middle), low, high, len(values))
