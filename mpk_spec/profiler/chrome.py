"""A profile in Chrome's trace format, for ui.perfetto.dev: a process per rank, a thread per SM."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np

from mpk_spec.planner.plan import Plan, Step
from mpk_spec.profiler.clock import Times


def chrome_trace(plan: Plan, step: Step, ranks: Sequence[Times], clocks: str = "") -> str:
    """All recorded steps of all ranks, by one clock. A task `group[n]` holds its phases; before it its `wait group[n]`.

    `args`: step, stage, layer, the events waited for, and how long data was waited for. clocks: what it rests on that
    the ranks' times lie side by side; kept in the file.
    """
    events: list[dict] = []
    for rank, times in enumerate(ranks):
        name = f"{plan.name} ({plan.target})" if len(ranks) == 1 else f"rank {rank}, {plan.name} ({plan.target})"
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": name}})
        for sm in range(plan.num_sms):
            events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": sm, "args": {"name": f"SM {sm}"}})
        for number in range(times.asked.shape[0]):
            events += ({**event, "pid": rank} for event in _step(step, times, number))
    about = {"otherData": {"clocks": clocks}} if clocks else {}
    return json.dumps({"displayTimeUnit": "ns", **about, "traceEvents": events})


def _step(step: Step, times: Times, number: int) -> Iterator[dict]:
    for stage, made in enumerate(step.stages):
        template = step.templates[made.template]
        for sm, queue in enumerate(template.queues):
            for place, (group, index) in enumerate(queue):
                at = (number, sm, stage, place)
                if np.isfinite(times.signalled[at]):
                    task = template.groups[group].tasks[index]
                    arguments = {"step": number, "stage": stage, "waits": [w.event for w in task.waits]}
                    if made.layer is not None:
                        arguments["layer"] = made.layer
                    yield from _task(f"{template.groups[group].name}[{index}]", sm, times, at, arguments)


def _task(name: str, sm: int, times: Times, at: tuple, arguments: dict) -> Iterator[dict]:
    asked, ready, opened = (float(t[at]) for t in (times.asked, times.ready, times.opened))
    computed, stored, signalled = (float(t[at]) for t in (times.computed, times.stored, times.signalled))
    waited = round(float(times.waited[at]), 3)
    pieces = (
        (f"wait {name}", "wait", asked, ready, {}),
        (name, "task", ready, signalled, {**arguments, "data_wait_us": waited}),
        ("activations", "phase", ready, opened, {}),
        ("compute", "phase", opened, computed, {"data_wait_us": waited}),
        ("epilogue", "phase", computed, stored, {}),
        ("signal", "phase", stored, signalled, {}),
    )
    for what, category, start, end, extra in pieces:
        span = {"ts": round(start, 3), "dur": round(end - start, 3)}
        if span["dur"] > 0:
            yield {"ph": "X", "name": what, "cat": category, "tid": sm, **span, "args": extra}
