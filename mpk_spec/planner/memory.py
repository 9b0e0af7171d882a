"""Activation memory by lifetime: two tensors share bytes only if the events put all uses of one before the other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import prod

from mpk_spec.planner.events import StageOrder
from mpk_spec.planner.plan import DTYPE_BYTES, Tensor

ALIGN = 256


def place(tensors: dict[str, Tensor], stages: Iterable[StageOrder], kept: frozenset[str], tokens: int, tp: int):
    """Offsets for every tensor. `kept`: those that outlive their stage. Returns (tensors, arena bytes by placement)."""
    conflicts = _conflicts(tensors, list(stages), kept)
    placed: dict[str, Tensor] = {}
    for tensor in sorted(tensors.values(), key=lambda t: (-bytes_of(t, tokens, tp), t.name)):
        size = bytes_of(tensor, tokens, tp)
        taken = sorted(
            (o.offset, o.offset + -(-o.bytes // ALIGN) * ALIGN)
            for o in placed.values()
            if o.placement == tensor.placement and o.name in conflicts[tensor.name]
        )
        offset = 0
        for lo, hi in taken:
            if offset + size <= lo:
                break
            offset = max(offset, hi)
        placed[tensor.name] = replace(tensor, offset=offset, bytes=size)
    arenas: dict[str, int] = {}
    for tensor in placed.values():
        end = -(-(tensor.offset + tensor.bytes) // ALIGN) * ALIGN
        arenas[tensor.placement] = max(arenas.get(tensor.placement, 0), end)
    return {name: placed[name] for name in tensors}, arenas


def bytes_of(tensor: Tensor, tokens: int, tp: int = 1) -> int:
    """Of one copy."""
    return tokens * prod(tensor.shape) * DTYPE_BYTES[tensor.dtype] * (tp if tensor.slots else 1)


def _conflicts(tensors: dict[str, Tensor], stages: list[StageOrder], kept: frozenset[str]) -> dict[str, set[str]]:
    """Pairs that must not share bytes: alive at once in some stage, or kept across stages."""
    found: dict[str, set[str]] = {name: set() for name in tensors}
    for name in kept & tensors.keys():
        found[name] = set(tensors) - {name}
        for other in found[name]:
            found[other].add(name)
    for stage in stages:
        uses, writers_behind = _uses(stage)
        names = [n for n in uses if n in tensors]
        for a in names:
            for b in names:
                if a < b and uses[a] & ~writers_behind.get(b, 0) and uses[b] & ~writers_behind.get(a, 0):
                    found[a].add(b)
                    found[b].add(a)
    return found


def _uses(stage: StageOrder) -> tuple[dict[str, int], dict[str, int]]:
    """Per tensor the tasks that touch it, and the tasks that every one of its writers is behind."""
    uses: dict[str, int] = {}
    behind: dict[str, int] = {}
    at = 0
    for group in stage.groups:
        for task in group.tasks:
            bit = 1 << at
            for span in (*task.reads, *task.writes):
                uses[span.tensor] = uses.get(span.tensor, 0) | bit
            for span in task.writes:
                behind[span.tensor] = behind.get(span.tensor, -1) & stage.before[at]
            at += 1
    return uses, behind
