"""Does a run on the GPU conform to the plan: every wait, every task, every signal, in the plan's order and numbers.

The kernel built with CONFORM leaves two logs per SM (`cuda_probe`): which counter value each wait saw, and when the
workers started a task and what each of its signals found. Counters only grow, so their values order what happened on
different SMs: a wait that saw n came after the signals that found 0 to n - 1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from mpk_spec.emit.source import Emitted
from mpk_spec.planner.crossing import layers_of, write_before
from mpk_spec.runtime.cuda_probe import SIGNAL, START, WAIT

WORD = 1 << 32
MOST = 20  # problems that are reported


def conform(
    emitted: Emitted, log: list[tuple[np.ndarray, np.ndarray]], first_step: int, tokens: Sequence[int]
) -> list[str]:
    """What differs from the plan, in words; empty where nothing does.

    log: as `Probe.log` returns it. tokens: of each step, which decides how long waits for data wait.
    """
    found: list[str] = []
    signals: dict[tuple[int, int], list[int]] = defaultdict(list)  # (step, event) -> what its signals found
    for problem in _problems(emitted, log, first_step, tokens, signals):
        found.append(problem)
        if len(found) == MOST:
            return [*found, "and more"]
    return found


def _problems(emitted: Emitted, log, first_step: int, tokens: Sequence[int], signals) -> Iterator[str]:
    alone = {first_step + n for n, count in enumerate(tokens) if count == 1}
    for sm, (waits, works) in enumerate(log):
        plan = list(_tasks(emitted, sm, first_step, len(tokens)))
        yield from _check_sm(emitted, sm, plan, alone, waits.tolist(), works.tolist(), signals)
    yield from _check_counters(emitted, first_step, len(tokens), signals)


def _tasks(emitted: Emitted, sm: int, first_step: int, steps: int) -> Iterator[tuple[int, int, int, int]]:
    """(step, stage, group, task) in the order in which the SM must run them."""
    for step in range(first_step, first_step + steps):
        for number, stage in enumerate(emitted.step.stages):
            for group, task in emitted.step.templates[stage.template].queues[sm]:
                yield step, number, group, task


def _check_sm(
    emitted: Emitted, sm: int, plan: list, alone: set[int], waits: list, works: list, signals
) -> Iterator[str]:
    """alone: the steps of one token, where waits for data are for the write before."""
    layers, stages = layers_of(emitted.step), len(emitted.step.stages)
    events = {name: n for n, name in enumerate(emitted.programs.events)}
    next_wait, next_work = iter(waits), iter(works)
    for step, stage, group, task in plan:
        made = emitted.step.templates[emitted.step.stages[stage].template].groups[group]
        where = f"SM {sm}, step {step}, stage {stage}, {made.name}[{task}]"
        head = (step % WORD, stage, group, task)
        ready = None
        for wait in made.tasks[task].waits:
            entry = next(next_wait, None)
            named = stage + wait.stage
            at = write_before(named, layers, stages) if wait.data and step in alone else named
            event, base, most = _counter(emitted, step, stage, wait.event, at - stage, events)
            count = wait.count if most else 0  # of a stage that lacks the event there is nothing to wait for
            expected = (WAIT, *head, event)
            if entry is None or tuple(entry[:6]) != expected:
                yield f"{where}: the scheduler did not wait for {wait.event}, but {_words(entry)}"
                return
            seen, wanted, clock = entry[6:]
            if wanted != (base + count) % WORD:
                yield f"{where}: waits until {wait.event} is {wanted}, not {(base + count) % WORD}"
            # the event of the step before may have signals of this one already
            highest = base + most * (1 + (at == named - stages))
            if _less(seen, wanted) or _less(highest, seen):
                yield f"{where}: saw {wait.event} at {seen}, outside of {wanted} to {highest % WORD}"
            ready = clock if ready is None or _less(ready, clock) else ready
        entry = next(next_work, None)
        if entry is None or tuple(entry[:5]) != (START, *head):
            yield f"{where}: the workers did not start it, but {_words(entry)}"
            return
        started = entry[8]
        if ready is not None and _less(started, ready):
            yield f"{where}: started before its waits were over"
        for name in made.tasks[task].signals:
            entry = next(next_work, None)
            event, _, _ = _counter(emitted, step, stage, name, 0, events)
            if entry is None or tuple(entry[:6]) != (SIGNAL, *head, event):
                yield f"{where}: did not signal {name}, but {_words(entry)}"
                return
            signals[step, event].append(entry[6])
            if _less(entry[8], started):
                yield f"{where}: signalled before it started"
    for role, rest in (("scheduler", next_wait), ("workers", next_work)):
        entry = next(rest, None)
        if entry is not None:
            yield f"SM {sm}: its {role} did more than the plan: {_words(entry)}"


def _counter(emitted: Emitted, step: int, stage: int, name: str, back: int, events) -> tuple[int, int, int]:
    """(number of the counter, where it stood before the step it belongs to, signals of one step)."""
    stages = emitted.step.stages
    at, of = stage + back, step
    if at < 0:
        at, of = at + len(stages), step - 1
    total = emitted.programs.event_total[stages[at].template][events[name]]
    return at * len(events) + events[name], of * total, total


def _check_counters(emitted: Emitted, first_step: int, steps: int, signals) -> Iterator[str]:
    """Every event got each of its signals once in every step: what they found are successive numbers."""
    names = emitted.programs.events
    for step in range(first_step, first_step + steps):
        for stage, made in enumerate(emitted.step.stages):
            for number, total in enumerate(emitted.programs.event_total[made.template]):
                base = step * total
                found = sorted((value - base) % WORD for value in signals[step, stage * len(names) + number])
                if found != list(range(total)):
                    what = f"{len(found)} signals that found {found[:4]}..., not 0 to {total - 1}"
                    yield f"step {step}, stage {stage}: {names[number]} got {what}"


def _less(a: int, b: int) -> bool:
    """Whether counter (or clock) `a` stands before `b`; both wrap at 2^32."""
    return (a - b) % WORD >= WORD // 2


def _words(entry) -> str:
    if entry is None:
        return "the log ends"
    kind = {WAIT: "waited", START: "started", SIGNAL: "signalled"}.get(entry[0], "did something unknown")
    return f"{kind} in step {entry[1]}, stage {entry[2]}, group {entry[3]}, task {entry[4]}, event {entry[5]}"
