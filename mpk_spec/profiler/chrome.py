"""A profile in Chrome's trace format, for ui.perfetto.dev: for each rank a process for what its SMs work at and one
for what they signal meanwhile, in both a thread per SM."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mpk_spec.errors import UserError
from mpk_spec.files import write_aside
from mpk_spec.planner.plan import Plan, Step
from mpk_spec.profiler.clock import Times
from mpk_spec.profiler.stream import BIN_US, rate_of

WORK, SIGNALS = 0, 1  # processes of a rank
BEFORE_US, AFTER_US = 3.0, 4.0  # of what is around a layer, kept with it


def chrome_trace(plan: Plan, step: Step, ranks: Sequence[Times], clocks: str = "", layer: int | None = None) -> str:
    """All recorded steps of all ranks, by one clock, and what each rank asks of its memory meanwhile. A task `group[n]`
    holds its phases; before it its `wait group[n]`.

    `args`: step, stage, layer, the events waited for, the values looked for, and how long data was waited for. clocks:
    what it rests on that the ranks' times lie side by side; kept in the file. layer: only what `cut` leaves of the
    middle step. Raises UserError where the model has no such layer.
    """
    events: list[dict] = []
    for rank, times in enumerate(ranks):
        which = f"rank {rank}, " if len(ranks) > 1 else ""
        for kind, name in ((WORK, f"{which}{plan.name} ({plan.target})"), (SIGNALS, f"{which}signals")):
            pid = process(rank, kind)
            events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}})
            for sm in range(plan.num_sms):
                events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": sm, "args": {"name": f"SM {sm}"}})
        events += _memory(times, process(rank, WORK))
        signalled = np.full(plan.num_sms, -np.inf)
        for number in range(times.asked.shape[0]):
            events += ({**e, "pid": process(rank, e["pid"])} for e in _step(step, times, number, signalled))
    about = {"clocks": clocks} if clocks else {}
    if layer is not None:
        check_layer(plan, layer)
        number = ranks[0].asked.shape[0] // 2
        events = cut(events, layer, number)
        around = f"from {BEFORE_US:g} us before its first task to {AFTER_US:g} us after its last"
        about["cut"] = f"layer {layer} of step {number} of {plan.name} at tp {len(ranks)}, {around}"
    other = {"otherData": about} if about else {}
    return json.dumps({"displayTimeUnit": "ns", **other, "traceEvents": events})


def cut(events: list[dict], layer: int, number: int) -> list[dict]:
    """One layer of step `number` on all ranks, and of what is around it the slices that begin and end there.

    Times count from `BEFORE_US` before the layer's first task. All processes and threads keep their names.
    """
    wanted = (number, layer)
    tasks = [e for e in events if e.get("cat") == "task" and (e["args"]["step"], e["args"].get("layer")) == wanted]
    begin = min(e["ts"] for e in tasks) - BEFORE_US
    end = max(e["ts"] + e["dur"] for e in tasks) + AFTER_US
    return [
        e if e["ph"] == "M" else {**e, "ts": round(e["ts"] - begin, 3)}
        for e in events
        if e["ph"] == "M" or (begin <= e["ts"] and e["ts"] + e.get("dur", 0) <= end)
    ]


def check_layer(plan: Plan, layer: int) -> None:
    """Raises UserError where the model has no such layer."""
    layers = {stage.layer for stage in plan.steps["decode"].stages} - {None}
    if layer not in layers:
        raise UserError(f"{plan.name} has no layer {layer}", f"its layers are {min(layers)} to {max(layers)}")


def write_trace(path: Path, trace: str) -> None:
    """Compressed if the name ends in .gz. Raises UserError where it cannot be written."""
    write_aside(path, gzip.compress(trace.encode(), mtime=0) if path.suffix == ".gz" else trace)


def process(rank: int, kind: int) -> int:
    """The number of a rank's process for its `WORK` or its `SIGNALS`."""
    return 2 * rank + kind


def _memory(times: Times, pid: int) -> Iterator[dict]:
    """A counter: what the loaders ask memory for in each microsecond, if that was recorded."""
    if times.copies is None:
        return
    begin, end = float(np.nanmin(times.asked)), float(np.nanmax(times.stored))
    for n, gbps in enumerate(rate_of(times, begin, end)):
        at = {"ts": round(begin + n * BIN_US, 3), "args": {"GB/s": round(float(gbps))}}
        yield {"ph": "C", "name": "asked of memory", "pid": pid, **at}


def _step(step: Step, times: Times, number: int, signalled: np.ndarray) -> Iterator[dict]:
    """`signalled`: of each SM, when it had sent its latest signal."""
    for stage, made in enumerate(step.stages):
        template = step.templates[made.template]
        for sm, queue in enumerate(template.queues):
            for place, (group, index) in enumerate(queue):
                at = (number, sm, stage, place)
                if np.isfinite(times.signalled[at]):
                    task = template.groups[group].tasks[index]
                    arguments = {
                        "step": number, "stage": stage, "waits": [w.event for w in task.waits if not w.data],
                        "looks_for": [w.event for w in task.waits if w.data],
                    }  # fmt: skip
                    if made.layer is not None:
                        arguments["layer"] = made.layer
                    task_name = f"{template.groups[group].name}[{index}]"
                    yield from _task(task_name, sm, times, at, arguments)
                    begun = max(signalled[sm], float(times.stored[at]))  # one at a time
                    signalled[sm] = float(times.signalled[at])
                    yield from _slice(task_name, "signal", SIGNALS, sm, begun, signalled[sm], {})


def _task(name: str, sm: int, times: Times, at: tuple, arguments: dict) -> Iterator[dict]:
    asked, ready, seen = (float(t[at]) for t in (times.asked, times.ready, times.seen))
    computed, stored = float(times.computed[at]), float(times.stored[at])
    waited = round(float(times.waited[at]), 3)
    prologue = "looks for values" if arguments["looks_for"] else "activations"
    pieces = (
        (f"wait {name}", "wait", asked, ready, {}),
        (name, "task", ready, stored, {**arguments, "data_wait_us": waited}),
        (prologue, "phase", ready, seen, {}),
        ("compute", "phase", seen, computed, {"data_wait_us": waited}),
        ("epilogue", "phase", computed, stored, {}),
    )
    for what, category, start, end, extra in pieces:
        yield from _slice(what, category, WORK, sm, start, end, extra)


def _slice(name: str, category: str, kind: int, sm: int, start: float, end: float, arguments: dict) -> Iterator[dict]:
    span = {"ts": round(start, 3), "dur": round(end - start, 3)}
    if span["dur"] > 0:
        yield {"ph": "X", "name": name, "cat": category, "pid": kind, "tid": sm, **span, "args": arguments}
