"""The conformance check finds every kind of departure in logs that would otherwise pass. No GPU."""

from __future__ import annotations

import numpy as np
import pytest

from mpk_spec.emit.source import emit
from mpk_spec.planner import plan
from mpk_spec.runtime.cuda_probe import LOG, SIGNAL, START, WAIT
from mpk_spec.schema import load_spec
from mpk_spec.testing.conform import conform

FIRST, STEPS = 2**32 - 2, 4  # counters and steps wrap on the way


@pytest.fixture(scope="module")
def emitted():
    return emit(plan(load_spec("qwen3"), size="tiny", target="h100", context=128, verified=False))


def logs_of(emitted, first_step=FIRST, steps=STEPS):
    """What a kernel that runs its tasks stage by stage, group by group would leave: per SM (waits, works) as lists."""
    step = emitted.step
    events = {name: n for n, name in enumerate(emitted.programs.events)}
    totals = [emitted.programs.event_total[s.template] for s in step.stages]
    counters = [[(first_step * t) % 2**32 for t in row] for row in totals]
    logs = [([], []) for _ in range(emitted.plan.num_sms)]
    clock = 2**32 - 1000
    for number in range(first_step, first_step + steps):
        for stage, made in enumerate(step.stages):
            template = step.templates[made.template]
            sm_of = {task: sm for sm, queue in enumerate(template.queues) for task in queue}
            for g, group in enumerate(template.groups):
                for task in group.tasks:
                    waits, works = logs[sm_of[g, task.index]]
                    head = (number % 2**32, stage, g, task.index)
                    for wait in task.waits:
                        at, of = stage + wait.stage, number
                        if at < 0:
                            at, of = at + len(step.stages), number - 1
                        event = events[wait.event]
                        wanted = (of * totals[at][event] + wait.count) % 2**32
                        clock += 1
                        waits.append(
                            [WAIT, *head, at * len(events) + event, counters[at][event], wanted, clock % 2**32]
                        )
                    clock += 1
                    works.append([START, *head, 0, 0, 0, clock % 2**32])
                    for name in task.signals:
                        clock += 1
                        event = events[name]
                        found, counters[stage][event] = counters[stage][event], (counters[stage][event] + 1) % 2**32
                        works.append([SIGNAL, *head, stage * len(events) + event, found, 0, clock % 2**32])
    return logs


def check(emitted, logs):
    arrays = [tuple(np.array([tuple(e) for e in part], LOG) for part in pair) for pair in logs]
    return conform(emitted, arrays, FIRST, STEPS)


def waits_of(logs):
    return next(waits for waits, _ in logs if len(waits) > 4)


def works_of(logs):
    return next(works for _, works in logs if len(works) > 4)


def test_a_faithful_run_conforms(emitted):
    assert check(emitted, logs_of(emitted)) == []


def early(logs):
    waits_of(logs)[2][6] -= 1


def threshold(logs):
    waits_of(logs)[2][7] -= 1


def other_event(logs):
    waits_of(logs)[2][5] += 1


def no_wait(logs):
    del waits_of(logs)[2]


def start_before_wait(logs):
    waits, works = next(pair for pair in logs if pair[0] and pair[1])
    works[0][8] = waits[0][8] - 1


def lost_signal(logs):
    del works_of(logs)[1]


def signal_twice(logs):
    works = works_of(logs)
    works.insert(2, list(works[1]))


def torn_counter(logs):
    works_of(logs)[1][6] += 7


def other_order(logs):
    _, works = next(pair for pair in logs if len({e[3] for e in pair[1] if e[0] == START}) > 1)
    works[:4] = works[2:4] + works[:2]


def more_than_planned(logs):
    works_of(logs).append(list(works_of(logs)[0]))


def sm_that_slept(logs):
    logs[0] = ([], [])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (early, "saw "),
        (threshold, "waits until "),
        (other_event, "the scheduler did not wait for "),
        (no_wait, "the scheduler did not wait for "),
        (start_before_wait, "started before its waits were over"),
        (lost_signal, "did not signal "),
        (signal_twice, "the workers did not start it, but signalled"),
        (torn_counter, " signals that found "),
        (other_order, "the workers did not start it, but started"),
        (more_than_planned, "its workers did more than the plan"),
        (sm_that_slept, "but the log ends"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_departures_are_found(emitted, change, says):
    logs = logs_of(emitted)
    change(logs)
    problems = check(emitted, logs)
    assert problems and any(says in problem for problem in problems), problems


def test_the_report_is_short(emitted):
    problems = check(emitted, [([], []) for _ in range(emitted.plan.num_sms)])
    assert len(problems) == 21 and problems[-1] == "and more"
