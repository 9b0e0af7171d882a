"""What of a task its time depends on beside its bytes: its turns through a linear's inner loop, how its values come."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

from mpk_spec.planner.plan import DTYPE_BYTES, Group, Plan, Step, Task
from mpk_spec.planner.tile import ROW_TILE

TILES_PER_BLOCK = 8  # whose sums a linear's task keeps at once: see cuda_templates/tasks/linear.cuh
TILES_IN_REGISTERS = 2  # where no task of a group has more, sums stay in registers from chunk to chunk of K
Looks = Literal["plain", "norm", "merge", "attend"]


@dataclass(frozen=True)
class Loop:
    """A linear's task: pairs of chunks (of two tiles, the last of a block alone if they are odd) that its inner loop
    takes one after the other; how often it turns to another chunk of K; blocks of tiles after the first. kept: the
    pairs of a group whose sums stay in registers; it has none of the others."""

    pairs: int
    turns: int
    blocks: int
    kept: int


def loop_of(plan: Plan, group: Group, task: Task) -> Loop:
    """The `Loop` of a task that streams weights; nothing of one that streams none."""
    if not task.load_chunks:
        return Loop(0, 0, 0, 0)
    deep = min(task.load_chunks, _chunks_of_a_tile(plan, group))
    tiles = task.load_chunks // deep
    if max(t.load_chunks for t in group.tasks) <= TILES_IN_REGISTERS * deep:
        return Loop(0, 0, 0, deep)
    whole, rest = divmod(tiles, TILES_PER_BLOCK)
    blocks = whole + (rest > 0)
    return Loop(deep * (whole * TILES_PER_BLOCK // 2 + (rest + 1) // 2), blocks * (deep - 1), blocks - 1, 0)


def _chunks_of_a_tile(plan: Plan, group: Group) -> int:
    """Into how many chunks K is cut."""
    name = next(n for node in group.nodes if node.op == "linear" for n in node.weights.values())
    weight = plan.weights[name]
    row = weight.shape[-1] * DTYPE_BYTES[weight.storage.get("format", weight.dtype)]
    return max(1, ceil(ROW_TILE * row / plan.weight_chunk_bytes))


def looks(step: Step, task: Task) -> bool:
    """Whether the task looks at values that cross as data; steps of several tokens wait for their events."""
    return step.tokens == 1 and any(w.data for w in task.waits)


def looks_of(group: Group) -> Looks:
    """What a task of the group makes of the values that it looks at before it computes: takes them as they are,
    normalises the row, merges the parts of a split attention, or turns queries and keys and loads its cache."""
    if group.task == "attention":
        return "attend"
    before = [node.op for node in group.nodes] if group.task == "linear" else []
    before = before[: before.index("linear")] if before else []
    return "merge" if "attention_merge" in before else "norm" if "rmsnorm" in before else "plain"
