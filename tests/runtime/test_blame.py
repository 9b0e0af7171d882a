"""What the host says of a kernel that stood still, from the reports that its SMs leave. No GPU."""

from __future__ import annotations

import numpy as np
import pytest

from mpk_spec.emit.source import emit
from mpk_spec.planner import plan
from mpk_spec.runtime.cuda_launch import NO_MORE, REPORT, blame, place_of
from mpk_spec.schema import load_spec

FIRST = 7


@pytest.fixture(scope="module")
def emitted():
    return emit(plan(load_spec("qwen3"), size="tiny", target="h100", context=128, verified=False))


@pytest.fixture(scope="module")
def pooled():
    from tiny_specs import child

    spec = child("qwen3", schedule=[{"set": {"gate_up": {"launch": "dynamic"}}}])
    return emit(plan(spec, size="tiny", target="h100", context=128, verified=False))


def sequence(emitted, sm: int) -> list[tuple[int, int, int]]:
    """(stage, group, task) that an SM runs in a step."""
    templates = [emitted.step.templates[s.template] for s in emitted.step.stages]
    return [(n, *entry) for n, template in enumerate(templates) for entry in template.queues[sm]]


def reports(emitted, **of: dict) -> np.ndarray:
    """All SMs wait for the descriptor of step FIRST + 2, but those named, as in sm5={...}."""
    made = np.zeros(emitted.plan.num_sms, REPORT)
    for sm, report in enumerate(made):
        done = 2 * (1 + len(sequence(emitted, sm)))
        idle = {"given": done, "taken": done, "step": FIRST + 2, "stage": len(emitted.step.stages)}
        for name, value in {"set": 1, **idle, **of.get(f"sm{sm}", {})}.items():
            report[name] = value
    return made


def test_hand_overs_are_a_descriptor_and_then_the_queues(emitted):
    tasks = sequence(emitted, 0)
    assert place_of(emitted, 0, 0, FIRST) == (FIRST, -1, 0, 0)
    assert [place_of(emitted, 0, 1 + n, FIRST)[1:] for n in range(len(tasks))] == tasks
    assert place_of(emitted, 0, 1 + len(tasks), FIRST) == (FIRST + 1, -1, 0, 0)
    assert place_of(emitted, 0, 2 + len(tasks), 2**32 - 1) == (0, *tasks[0])


def test_an_event_that_does_not_come_is_named(emitted):
    events = emitted.programs.events
    stage, group, task = next(entry for entry in sequence(emitted, 3) if entry[0] == 1)
    name = emitted.step.templates[emitted.step.stages[stage].template].groups[group].name
    at = stage * len(events) + events.index("gate_up.done")
    waiting = {"given": 9, "taken": 9, "step": FIRST, "stage": stage, "group": group, "task": task, "event": at,
               "seen": 11, "wanted": 12}  # fmt: skip
    said = blame(emitted, reports(emitted, sm3=waiting), FIRST)
    assert said.startswith(f"SM 3 in step {FIRST}, stage 1 (") and f"task {task} of '{name}'" in said
    assert said.endswith("event 'gate_up.done' of stage 1 stands at 11, wanted 12")


def test_workers_that_look_in_vain_are_placed_by_what_they_took(emitted):
    gate_up = 3
    every = [(sm, n, e) for sm in range(emitted.plan.num_sms) for n, e in enumerate(sequence(emitted, sm))]
    sm, number, (_, _, task) = next(found for found in every if found[2][:2] == (1, gate_up))
    stale = {"given": number + 4, "taken": number + 1, "step": FIRST, "stage": 0, "group": 0, "task": 0}
    said = blame(emitted, reports(emitted, **{f"sm{sm}": stale}), FIRST)
    assert said.startswith(f"SM {sm} in step {FIRST}, stage 1 (y.1, layer 1), task {task} of 'gate_up': ")
    assert said.endswith("its workers do not move, or look for values of 'o_add' that do not come")


def test_the_furthest_behind_is_blamed(emitted):
    ahead = {"given": 12, "taken": 11, "step": FIRST, "stage": 0, "group": 0}
    behind = {"given": 3, "taken": 2, "step": FIRST, "stage": 0, "group": 0}
    said = blame(emitted, reports(emitted, sm1=ahead, sm2=behind), FIRST)
    stage, group, task = sequence(emitted, 2)[1]
    name = emitted.step.templates[emitted.step.stages[stage].template].groups[group].name
    assert said.startswith(f"SM 2 in step {FIRST}, stage {stage} (") and f"task {task} of '{name}'" in said


def test_all_wait_for_a_step_or_nobody_says_anything(emitted):
    assert blame(emitted, reports(emitted), FIRST) == f"SM 0 in step {FIRST + 2} waits for the next step's descriptor"
    nothing = np.zeros(emitted.plan.num_sms, REPORT)
    assert blame(emitted, nothing, FIRST) == "no SM left a report"


def test_with_claim_pools_reports_say_what_workers_are_at(pooled):
    """What an SM has claimed the host does not know."""
    working = {"given": 9, "taken": 8, "step": FIRST, "stage": 1, "group": 3, "task": 17}
    said = blame(pooled, reports(pooled, sm4=working), FIRST)
    assert said == f"SM 4 in step {FIRST}, stage 1 (y.1, layer 1), task 17 of 'gate_up': its workers do not move"
    at = len(pooled.programs.events) + pooled.programs.events.index("o_add.done")
    waiting = {**working, "taken": 9, "event": at, "seen": 3, "wanted": 4}
    said = blame(pooled, reports(pooled, sm4=waiting), FIRST)
    assert said.endswith("task 17 of 'gate_up': event 'o_add.done' of stage 1 stands at 3, wanted 4")


def test_an_sm_that_gets_no_claim_is_said_to(pooled):
    waiting = {"given": 9, "taken": 9, "step": FIRST, "stage": 1, "group": 3, "task": NO_MORE}
    where = f"SM 4 in step {FIRST}, stage 1 (y.1, layer 1)"
    said = blame(pooled, reports(pooled, sm4=waiting), FIRST)
    assert said == f"{where}: its workers wait for their loader to claim from the pool of 'gate_up'"
    said = blame(pooled, reports(pooled, sm4={**waiting, "taken": 8}), FIRST)
    assert said == f"{where}: its workers do not leave the pool of 'gate_up'"
