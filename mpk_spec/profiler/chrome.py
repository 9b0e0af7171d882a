"""A profile in Chrome's trace format, for ui.perfetto.dev: for each rank a process for what its SMs work at and one
for what they signal meanwhile, in both a thread per SM."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np

from mpk_spec.planner.plan import Plan, Step
from mpk_spec.profiler.clock import Times

WORK, SIGNALS = 0, 1  # processes of a rank


def chrome_trace(plan: Plan, step: Step, ranks: Sequence[Times], clocks: str = "") -> str:
    """All recorded steps of all ranks, by one clock. A task `group[n]` holds its phases; before it its `wait group[n]`.

    `args`: step, stage, layer, the events waited for, the values looked for, and how long data was waited for. clocks:
    what it rests on that the ranks' times lie side by side; kept in the file.
    """
    events: list[dict] = []
    for rank, times in enumerate(ranks):
        which = f"rank {rank}, " if len(ranks) > 1 else ""
        for kind, name in ((WORK, f"{which}{plan.name} ({plan.target})"), (SIGNALS, f"{which}signals")):
            pid = process(rank, kind)
            events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}})
            for sm in range(plan.num_sms):
                events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": sm, "args": {"name": f"SM {sm}"}})
        signalled = np.full(plan.num_sms, -np.inf)
        for number in range(times.asked.shape[0]):
            events += ({**e, "pid": process(rank, e["pid"])} for e in _step(step, times, number, signalled))
    about = {"otherData": {"clocks": clocks}} if clocks else {}
    return json.dumps({"displayTimeUnit": "ns", **about, "traceEvents": events})


def process(rank: int, kind: int) -> int:
    """The number of a rank's process for its `WORK` or its `SIGNALS`."""
    return 2 * rank + kind


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
