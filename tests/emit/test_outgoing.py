"""What the kernel puts on peers through NVSHMEM is what the plan says that a task writes: tasks/inbox.cuh."""

from __future__ import annotations

import pytest

from mpk_spec.emit.program import bounds
from mpk_spec.emit.source import emit
from mpk_spec.planner import plan
from mpk_spec.schema import load_spec


def outgoing(emitted, group, task) -> tuple[int, int]:
    """Features that `ForPeers` and `outgoing_pairs` make of the task's entry."""
    lo, hi = bounds(group, task, emitted.layout)
    if group.task == "argmax_partial":
        return lo * 2, hi * 2
    assert group.task == "linear"
    if group.nodes[-1].op == "argmax_partial":  # the pair of the task
        return task.index * 2, task.index * 2 + 2
    return lo, hi


@pytest.mark.parametrize(("spec", "size", "tp"), [("qwen3", "tiny", 2), ("qwen3", "8b", 4), ("smollm2", "135m", 3)])
def test_every_part_goes_out_once(spec, size, tp):
    emitted = emit(plan(load_spec(spec), size=size, target="h100", context=256, tp=tp, verified=False))
    inboxes = {t.name: t for t in emitted.plan.tensors.values() if t.inbox}
    seen = set()
    for template in emitted.step.templates:
        for group in template.groups:
            written = [(s, t) for t in group.tasks for s in t.writes if s.tensor in inboxes]
            if not written:
                continue
            assert len({s.tensor for s, _ in written}) == 1 and len(written) == len(group.tasks)
            for span, task in written:
                assert outgoing(emitted, group, task) == (span.lo, span.hi), f"{group.name}, task {task.index}"
            covered = sum(s.hi - s.lo for s, _ in written)
            assert covered == inboxes[written[0][0].tensor].extent
            seen.add(written[0][0].tensor)
    assert seen == inboxes.keys()
