"""The cost model's constants from a profile.

What a token takes is what the tasks on its critical path take, one after the other. These are the slowest of many, so
their hops and their work are what is fitted, and means of them, since it is their sum that is to come out: of several
models each in parts of its token. Constants of what lies off that path are medians over all tasks, so that a few late
ones change nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from mpk_spec.errors import UserError
from mpk_spec.files import make_folder, write_aside
from mpk_spec.planner.cost import (
    CostModel,
    beside_hop_us,
    calibration_file,
    ends_step,
    kv_blocks_us,
    kv_of,
    read_calibration,
)
from mpk_spec.planner.plan import Group, Task
from mpk_spec.planner.simulate import Ran, Simulation
from mpk_spec.planner.task_shape import looks, looks_of, loop_of
from mpk_spec.profiler.work import Sample, fitted

MANY_BLOCKS = 4  # KV blocks of a task that tells what one takes
FEW = 8  # samples below which a constant is left as it is
LEAST_US = 0.01
LEAST_PART, EXACT = 0.1, 0.002  # of what was recorded, that reading no clocks leaves; and how exactly it is found
HOPS = {"plain": "data_hop_us", "norm": "norm_hop_us", "merge": "merge_hop_us", "attend": "attend_hop_us"}


@dataclass(frozen=True)
class Fit:
    """One constant, and the middle half of what `samples` tasks say, each alone: between `low` and `high`."""

    name: str
    value: float
    low: float
    high: float
    samples: int


def fit(steps: list[Simulation]) -> list[Fit]:
    """`steps`: measured, of one model or of several; constants without enough tasks to tell are left out."""
    cost, path = steps[0].cost, [one for step in steps for one in _path(step)]
    every = [one for step in steps for one in _tasks(step, step.records[step.first :])]
    reduce = _mean("reduce_us", ((t.epilogue, t.step.us) for t in path if t.task.load_chunks))
    activation = _median(
        "activation_us", (t.loaded - cost.start_us for t in every if t.task.load_chunks and not t.looks)
    )
    after = (reduce or _same("reduce_us", cost)).value
    before = cost.start_us + (activation or _same("activation_us", cost)).value
    found = [
        _median("hop_us", (t.came for t in every if t.ran.by == "event" and t.ran.after >= 0)),
        *(_mean(name, ((t.hop, t.step.us) for t in own)) for name, own in _hops(path)),
        activation,
        reduce,
        _median("signal_us", (t.ran.done - t.ran.stored for t in every)),
        _median("row_op_us", _row_ops((t for t in every if not ends_step(t.group)), before, after)),
        _median("sample_us", _row_ops((t for t in every if ends_step(t.group)), before, after)),
        *_work(("pair_us", "turn_us", "block_us", "kept_us"), _linears(path), cost),
        *_attentions(path, before, after),
    ]
    return [one for one in found if one is not None]


def without_clocks(fits: list[Fit], predicted_us: Callable[[dict[str, float]], float], us: float) -> float:
    """The part of what was recorded that makes a token take `us`, as it does where no clocks are read; at most 1.

    Each of the constants holds the reading of a clock or two, so each counts with this part. predicted_us: of constants
    by name. Raises UserError where even `LEAST_PART` of them takes longer.
    """

    def apart(part: float) -> float:
        return predicted_us({one.name: one.value * part for one in fits}) - us

    lo, hi = LEAST_PART, 1.0
    if apart(hi) <= 0:
        return hi
    if (over := apart(lo)) > 0:
        raise UserError(
            f"a token takes {us:.0f} us; with next to nothing but memory {us + over:.0f} are predicted",
            "another ceiling of memory: --stream-gbps; or more --tokens",
        )
    while hi - lo > EXACT:
        middle = (lo + hi) / 2
        lo, hi = (lo, middle) if apart(middle) > 0 else (middle, hi)
    return hi


def save(target: str, fits: Iterable[Fit], **given: float) -> Path:
    """Adds the constants to the GPU's calibration file, which all predictions read; returns its path.

    Raises UserError where it cannot be written.
    """
    path = calibration_file(target)
    known = read_calibration(target) or {}
    known |= {one.name: round(one.value, 4) for one in fits} | given
    make_folder(path.parent)
    write_aside(path, json.dumps(known, indent=2, sort_keys=True) + "\n")
    return path


@dataclass(frozen=True)
class _Timed:
    """One task that ran. `blocks` of the KV cache, None for what is no attention."""

    step: Simulation
    ran: Ran
    group: Group
    task: Task
    looks: bool
    blocks: int | None

    @property
    def came(self) -> float:
        """From the signal or the values that its start waited for, or its SM's task before, to its start."""
        return self.ran.start - self.step.before(self.ran)

    @property
    def loaded(self) -> float:
        return self.ran.ready - self.ran.start

    @property
    def hop(self) -> float:
        """What `CostModel.hop_of` says."""
        step = self.step
        beside = beside_hop_us(step.plan, self.group, self.task, step.cost, step.context)
        return self.ran.ready - step.before(self.ran) - beside

    @property
    def work(self) -> float:
        """From inputs to weights (or the cache) used up, without waits for them."""
        return self.ran.consumed - self.ran.ready - self.ran.stalled

    @property
    def epilogue(self) -> float:
        return self.ran.stored - self.ran.consumed


def _path(step: Simulation) -> Iterator[_Timed]:
    """The tasks that a token took."""
    found, at = [], step.last
    while at >= 0:
        found.append(step.records[at])
        at = step.records[at].after
    return _tasks(step, (ran for ran in found if ran.after >= 0))


def _tasks(step: Simulation, records: Iterable[Ran]) -> Iterator[_Timed]:
    for ran in records:
        group = step.group_of(ran)
        task = group.tasks[ran.task]
        attention = next((n for n in group.nodes if n.op == "attention"), None)
        blocks = None
        if attention is not None:
            blocks = kv_of(step.plan, step.step, task, attention.values.get("window"), step.context)[0]
        yield _Timed(step, ran, group, task, looks(step.step, task), blocks)


def _hops(path: list[_Timed]) -> Iterator[tuple[str, list[_Timed]]]:
    for kind, name in HOPS.items():
        yield name, [t for t in path if t.looks and looks_of(t.group) == kind]


def _row_ops(tasks: Iterable[_Timed], before: float, after: float) -> Iterator[float]:
    """Arithmetic of tasks that stream nothing, without what lies `before` (unless they look) and `after` it."""
    for t in tasks:
        if not t.task.load_chunks and t.blocks is None:
            yield t.ran.stored - after - (t.ran.ready if t.looks else t.ran.start + before)


def _linears(path: list[_Timed]) -> dict[tuple, list[Sample]]:
    """By operator: turns through the inner loop, and the time beside the reading of the bytes."""
    found: dict[tuple, list[Sample]] = {}
    for t in path:
        if t.task.load_chunks:
            us = t.work - t.task.load_bytes / (t.step.cost.consume_gbps * 1e3)
            counts = astuple(loop_of(t.step.plan, t.group, t.task))
            found.setdefault((t.step.plan.name, t.group.name), []).append(Sample(counts, us))
    return found


def _attentions(path: list[_Timed], before: float, after: float) -> list[Fit | None]:
    """What a block of the cache takes is left as it is where no task has many: all else would count as theirs."""
    own = [t for t in path if t.blocks]
    us = [t.ran.stored - after - t.ran.stalled - (t.ran.ready if t.looks else t.ran.start + before) for t in own]
    if max((t.blocks or 0 for t in own), default=0) < MANY_BLOCKS:
        rest = [one - kv_blocks_us(t.blocks, t.step.cost) for t, one in zip(own, us, strict=True)]
        return [_mean("attend_us", ((one, t.step.us) for t, one in zip(own, rest, strict=True)))]
    found: dict[tuple, list[Sample]] = {}
    for t, one in zip(own, us, strict=True):
        found.setdefault((t.step.plan.name, t.group.name, t.blocks), []).append(
            Sample((1, t.blocks // 2), one - t.blocks % 2 * t.step.cost.kv_block_us)
        )
    return _work(("attend_us", "kv_pair_us"), found, own[0].step.cost)


def _work(names: tuple[str, ...], samples: dict[tuple, list[Sample]], cost: CostModel) -> list[Fit]:
    """Constants that the times of `samples` are sums of; one that none of them has is left out."""
    known = [getattr(cost, name) for name in names]
    values = fitted(list(samples.values()), known)
    flat = np.array([(*one.counts, one.us) for group in samples.values() for one in group]).reshape(-1, len(names) + 1)
    found = []
    for n, name in enumerate(names):
        own = flat[flat[:, n] > 0]
        if len(own) < FEW:
            continue
        alone = values[n] + (own[:, -1] - own[:, :-1] @ values) / own[:, n]
        low, high = (float(v) for v in np.percentile(alone, (25, 75)))
        found.append(Fit(name, float(values[n]), low, high, len(own)))
    return found


def _same(name: str, cost: CostModel) -> Fit:
    value = getattr(cost, name)
    return Fit(name, value, value, value, 0)


def _median(name: str, samples: Iterable[float]) -> Fit | None:
    values = np.array(list(samples))
    if len(values) < FEW:
        return None
    low, middle, high = (float(v) for v in np.percentile(values, (25, 50, 75)))
    return Fit(name, max(LEAST_US, middle), low, high, len(values))


def _mean(name: str, samples: Iterable[tuple[float, float]]) -> Fit | None:
    """Of (microseconds, those of the token)."""
    values = np.array(list(samples)).reshape(-1, 2)
    found = _median(name, values[:, 0])
    if found is None:
        return None
    return Fit(
        name,
        max(LEAST_US, float(np.average(values[:, 0], weights=1 / values[:, 1]))),
        found.low,
        found.high,
        found.samples,
    )
