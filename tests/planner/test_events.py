"""Events follow from regions: tasks wait for what they need, through few events that few tasks wait for."""

from __future__ import annotations

import pytest
from tiny_specs import child, spec_of

from mpk_spec.planner import plan
from mpk_spec.planner.events import MAX_SIGNALS
from mpk_spec.planner.plan import Plan


@pytest.fixture(scope="module")
def made() -> Plan:
    """By events alone: where values cross as data, `crossing` adds waits."""
    spec = child("qwen3", spec_of("qwen3").sizes["8b"].config, schedule=[{"set": {"*": {"crossing": "event"}}}])
    return plan(spec, size="tiny", tp=2, verified=False)


def test_few_waits_and_signals(made):
    for step in made.steps.values():
        for template in step.templates:
            for group in template.groups:
                assert max(len(t.waits) for t in group.tasks) <= 3
                assert max(len(t.signals) for t in group.tasks) <= MAX_SIGNALS
                for task in group.tasks:
                    producers = [w.event.split(".done")[0] for w in task.waits]
                    assert len(set(producers)) == len(producers)


def test_attention_waits_for_its_own_head(made):
    groups = {g.name: g for g in made.steps["decode"].templates[1].groups}
    tasks = groups["attend"].tasks
    events = {w.event for t in tasks for w in t.waits}
    assert len(events) == 4  # one of each KV head of this rank
    for task in tasks:
        (wait,) = task.waits
        assert wait.count < len(groups["qkv"].tasks)
        signallers = [t for t in groups["qkv"].tasks if wait.event in t.signals]
        assert len(signallers) == wait.count
        wanted = {(s.tensor, n) for s in task.reads if s.tensor.startswith("attention.") for n in range(s.lo, s.hi)}
        given = {(s.tensor, n) for t in signallers for s in t.writes for n in range(s.lo, s.hi)}
        assert wanted <= given


def test_a_sum_waits_for_all_ranks(made):
    template = made.steps["decode"].templates[1]
    groups = {g.name: g for g in template.groups}
    for task in groups["gate_up"].tasks:
        own = [w for w in task.waits if w.event.startswith("o_add.")]
        for wait in own:
            signallers = [t for t in groups["o_add"].tasks if wait.event in t.signals]
            assert wait.count == template.events[wait.event] == 2 * len(signallers) > 0
        assert own


def test_stages_follow_one_another(made):
    """The first tasks of a stage wait for the last group of the one before; a step's first for its own last."""
    step = made.steps["decode"]
    for template in step.templates:
        waits = {w for t in template.groups[0].tasks for w in t.waits}
        assert waits and all(w.stage == -1 for w in waits)
        events = {w.event for w in waits}
        assert events in ({"down_add.done"}, {"next_ids.done"})
