"""The KV cache and attention over it, one split of the positions at a time.

Positions are summed block by block (`State.kv_block` at absolute positions), with a running maximum: the order of a
row's sum is fixed by its position alone.
"""

from __future__ import annotations

from typing import Any

import torch

from mpk_spec.ops.base import elementwise, round_to
from mpk_spec.planner.plan import State
from mpk_spec.reference.state import Rank

Split = tuple[int, int]  # (number, of how many)


def append(rank: Rank, state: State, layer, heads: range, split: Split, keys, values, step) -> None:
    """Stores this step's keys and values `[tokens, heads * head_dim]` whose blocks belong to the split."""
    cache = rank.caches[state.name]
    slots, positions = step.slots, step.positions
    if split[1] > 1:
        mine = (positions // state.kv_block) % split[1] == split[0]
        slots, positions, keys, values = slots[mine], positions[mine], keys[mine], values[mine]
    for store, new in ((cache.keys, keys), (cache.values, values)):
        rows = round_to(new, cache.dtype).unflatten(-1, (len(heads), state.head_dim))
        store[layer or 0, slots, heads.start : heads.stop, positions] = rows


def attend(rank: Rank, state: State, layer, heads: range, split: Split, queries, values: dict[str, Any], step):
    """Attention of `queries [tokens, heads * group * head_dim]` over the split.

    Returns `[tokens, heads * group * head_dim]` if there is one split, else the unnormalised sums with maximum and
    weight, `[tokens, heads * group * (head_dim + 2)]`.
    """
    q = queries.unflatten(-1, (len(heads), -1, state.head_dim))  # [tokens, kv heads, group, head_dim]
    out = torch.empty(*q.shape[:-1], state.head_dim + 2)
    for slot, rows in step.parts:
        part = _one_sequence(rank, state, layer, heads, split, q[rows], step.positions[rows], slot, values, step.decode)
        out[rows] = part
    if split[1] == 1:
        out = out[..., :-2] / out[..., -1:]
    return out.flatten(1)


def _one_sequence(
    rank: Rank, state: State, layer, heads, split, q, positions, slot: int, values: dict[str, Any], decode
):
    """Tokens of one sequence: `[tokens, kv heads, group, head_dim + 2]`."""
    cache = rank.caches[state.name]
    window, softcap, scale = values.get("window"), values.get("softcap"), float(values["scale"])
    tokens, count = len(positions), len(heads)
    extra = 0 if decode else -tokens % 16
    rows = torch.nn.functional.pad(q, (0, 0, 0, 0, 0, 0, 0, extra)) if extra else q
    rows = rows.permute(1, 0, 2, 3).flatten(1, 2)  # [kv heads, tokens * group, head_dim]
    at = torch.nn.functional.pad(positions, (0, extra)).repeat_interleave(q.shape[2])[:, None]
    peak = torch.full((count, rows.shape[1], 1), float("-inf"))
    total, summed = torch.zeros_like(peak), torch.zeros_like(rows)
    covered = decode and window is None and split[1] == 1  # every position of every block is seen
    last, first = int(positions.max()), 0
    if window is not None:
        first = max(0, int(positions.min()) - window + 1) // state.kv_block
    for block in range(first, last // state.kv_block + 1):
        if block % split[1] != split[0]:
            continue
        lo, hi = block * state.kv_block, min((block + 1) * state.kv_block, last + 1)
        keys = cache.keys[layer or 0, slot, heads.start : heads.stop, lo:hi]
        seen_values = cache.values[layer or 0, slot, heads.start : heads.stop, lo:hi]
        if not decode:  # blocks of one size, so that a sum does not depend on where the chunk ends
            missing = (0, 0, 0, lo + state.kv_block - hi)
            keys, seen_values = torch.nn.functional.pad(keys, missing), torch.nn.functional.pad(seen_values, missing)
        scores = rows @ keys.transpose(1, 2) * scale
        if softcap is not None:
            scores = softcap * elementwise(torch.tanh, scores / softcap)
        if not covered:
            where = torch.arange(lo, lo + keys.shape[1])
            hidden = where > at if window is None else (where > at) | (where <= at - window)
            scores = scores.masked_fill(hidden, float("-inf"))
        new_peak = torch.maximum(peak, scores.amax(-1, keepdim=True))
        # a token that has seen nothing of this split yet has no maximum to subtract
        safe = new_peak if covered else new_peak.masked_fill(new_peak.isinf(), 0.0)
        weights, kept = elementwise(torch.exp, scores - safe), elementwise(torch.exp, peak - safe)
        total = total * kept + weights.sum(-1, keepdim=True)
        summed = summed * kept + weights @ seen_values
        peak = new_peak
    done = torch.cat((summed, peak, total), -1).unflatten(1, (-1, q.shape[2])).permute(1, 0, 2, 3)
    return done[:tokens]
