"""The conformance check finds every kind of departure in logs that would otherwise pass. No GPU."""

from __future__ import annotations

import numpy as np
import pytest

from mpk_spec.emit.source import emit
from mpk_spec.planner import plan
from mpk_spec.runtime.cuda_probe import LOG, SIGNAL, START, WAIT
from mpk_spec.schema import load_spec
from mpk_spec.testing.conform import conform

FIRST = 2**32 - 2  # counters and steps wrap on the way
SEVERAL, ONE, MIXED = [16] * 4, [1] * 4, [16, 1, 1, 16]


@pytest.fixture(scope="module")
def emitted():
    return emit(plan(load_spec("qwen3"), size="tiny", target="h100", context=128, verified=False))


@pytest.fixture(params=[SEVERAL, ONE, MIXED], ids=["several", "one", "mixed"])
def tokens(request):
    """Of each step."""
    return request.param


def logs_of(emitted, tokens, first_step=FIRST):
    """What a kernel that runs its tasks stage by stage, group by group would leave: per SM (waits, works) as lists.

    In a step of one token a wait for data is for the event of the layer before (of what comes after the layers: of the
    step before), or for nothing where that lacks it.
    """
    step = emitted.step
    events = {name: n for n, name in enumerate(emitted.programs.events)}
    totals = [emitted.programs.event_total[s.template] for s in step.stages]
    layers = sum(s.layer is not None for s in step.stages)
    counters = [[(first_step * t) % 2**32 for t in row] for row in totals]
    logs = [([], []) for _ in range(emitted.plan.num_sms)]
    clock = 2**32 - 1000
    for number, count in enumerate(tokens, start=first_step):
        for stage, made in enumerate(step.stages):
            template = step.templates[made.template]
            sm_of = {task: sm for sm, queue in enumerate(template.queues) for task in queue}
            for g, group in enumerate(template.groups):
                for task in group.tasks:
                    waits, works = logs[sm_of[g, task.index]]
                    head = (number % 2**32, stage, g, task.index)
                    for wait in task.waits:
                        at, of = stage + wait.stage, number
                        if wait.data and count == 1:
                            at -= len(step.stages) if at >= layers else 1 if at else len(step.stages) - layers + 1
                        if at < 0:
                            at, of = at + len(step.stages), number - 1
                        event = events[wait.event]
                        wanted = (of * totals[at][event] + min(wait.count, totals[at][event])) % 2**32
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


def check(emitted, logs, tokens):
    arrays = [tuple(np.array([tuple(e) for e in part], LOG) for part in pair) for pair in logs]
    return conform(emitted, arrays, FIRST, tokens)


def waits_of(logs):
    return next(waits for waits, _ in logs if len(waits) > 4)


def works_of(logs):
    return next(works for _, works in logs if len(works) > 4)


def test_a_faithful_run_conforms(emitted, tokens):
    assert check(emitted, logs_of(emitted, tokens), tokens) == []


def test_data_is_waited_for_by_the_write_before(emitted):
    """In the layer before, of the first layer in the last one of the step before; after them in that step."""
    events = list(emitted.programs.events)
    of_one = [w for waits, _ in logs_of(emitted, ONE) for w in waits if w[1] == FIRST % 2**32]
    looks = [w for w in of_one if events[w[5] % len(events)] == "down_add.done" and w[2] == 2]
    assert looks and {w[5] // len(events) for w in looks} == {0}
    first = [w for w in of_one if events[w[5] % len(events)] == "o_add.done" and w[2] == 0]
    last = len(emitted.step.stages) - 2
    count = emitted.programs.event_total[-2][events.index("o_add.done")]
    assert first and {(w[5] // len(events), w[7]) for w in first} == {(last, FIRST * count % 2**32)}
    pairs = [w for w in of_one if events[w[5] % len(events)] == "head.done"]
    count = emitted.programs.event_total[-1][events.index("head.done")]
    assert {(w[2], w[5] // len(events), w[7]) for w in pairs} == {(last + 1, last + 1, FIRST * count % 2**32)}


@pytest.mark.parametrize(("ran", "said"), [(SEVERAL, ONE), (ONE, SEVERAL), (MIXED, ONE)])
def test_a_wait_for_data_that_is_for_another_write_is_found(emitted, ran, said):
    problems = check(emitted, logs_of(emitted, ran), said)
    assert problems and all("the scheduler did not wait for " in problem for problem in problems[:3]), problems


def early(logs):
    next(wait for wait in waits_of(logs) if wait[6])[6] -= 1


def threshold(logs):
    next(wait for wait in waits_of(logs) if wait[7])[7] -= 1


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
def test_departures_are_found(emitted, tokens, change, says):
    logs = logs_of(emitted, tokens)
    change(logs)
    problems = check(emitted, logs, tokens)
    assert problems and any(says in problem for problem in problems), problems


def test_the_report_is_short(emitted):
    problems = check(emitted, [([], []) for _ in range(emitted.plan.num_sms)], ONE)
    assert len(problems) == 21 and problems[-1] == "and more"
