"""The KV cache and attention over it, one split of the positions at a time.

The order of a row's sum is fixed by its position alone. A token of a decode step sums all positions that it sees in
the split at once; in prefill steps they are summed block by block (`State.kv_block` at absolute positions), with a
running maximum, since tokens of one chunk see different numbers of them.
"""

from __future__ import annotations

from typing import Any

import torch

from mpk_spec.ops.base import elementwise, round_to
from mpk_spec.planner.plan import State
from mpk_spec.reference.state import Cache, Rank

Split = tuple[int, int]  # (number, of how many)


def append(rank: Rank, state: State, layer, heads: range, split: Split, keys, values, step) -> None:
    """Stores this step's keys and values `[tokens, heads * head_dim]` whose blocks belong to the split."""
    cache = rank.caches[state.name]
    for store, new in ((cache.keys, keys), (cache.values, values)):
        rows = round_to(new, cache.dtype).unflatten(-1, (len(heads), state.head_dim))
        held = store[layer or 0]
        if step.decode:  # a copy costs far less than indexing by tensors
            for n, (slot, position) in enumerate(step.places):
                if position // state.kv_block % split[1] == split[0]:
                    held[slot, heads.start : heads.stop, position] = rows[n]
            continue
        slots, positions = step.slots, step.positions
        if split[1] > 1:
            mine = (positions // state.kv_block) % split[1] == split[0]
            slots, positions, rows = slots[mine], positions[mine], rows[mine]
        held[slots, heads.start : heads.stop, positions] = rows


def attend(rank: Rank, state: State, layer, heads: range, split: Split, queries, values: dict[str, Any], step):
    """Attention of `queries [tokens, heads * group * head_dim]` over the split.

    Returns `[tokens, heads * group * head_dim]` if there is one split, else the unnormalised sums with maximum and
    weight, `[tokens, heads * group * (head_dim + 2)]`.
    """
    cache = rank.caches[state.name]
    q = queries.unflatten(-1, (len(heads), -1, state.head_dim))  # [tokens, kv heads, group, head_dim]
    if step.decode:
        each = [
            _one_token(cache, state, layer, heads, split, q[n], position, slot, values)
            for n, (slot, position) in enumerate(step.places)
        ]
        sums, peaks, totals = (p[0][None] if len(each) == 1 else torch.stack(p) for p in zip(*each, strict=True))
    else:
        sums, peaks, totals = torch.empty_like(q), *(torch.empty(*q.shape[:-1], 1) for _ in range(2))
        for slot, rows in step.parts:
            part = _one_sequence(cache, state, layer, heads, split, q[rows], step.positions[rows], slot, values)
            sums[rows], peaks[rows], totals[rows] = part
    out = sums / totals if split[1] == 1 else torch.cat((sums, peaks, totals), -1)
    return out.flatten(1)


Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Unnormalised sum, maximum and weight: `[..., head_dim]`, `[..., 1]` and `[..., 1]`."""


def _one_token(cache: Cache, state: State, layer, heads, split: Split, q, position: int, slot: int, values) -> Part:
    """`q [heads, group, head_dim]` of one token. All heads are computed: BLAS has other bits for few of them."""
    window, softcap, scale = values.get("window"), values.get("softcap"), float(values["scale"])
    mine = slice(heads.start, heads.stop)
    if len(heads) < state.kv_heads:
        q, of_some = q.new_zeros(state.kv_heads, *q.shape[1:]), q
        q[mine] = of_some
    first = 0 if window is None else max(0, position - window + 1)
    seen = _pieces(state.kv_block, split, first, position + 1)
    if not seen:
        shape = (len(heads), q.shape[1], 1)
        return torch.zeros(*shape[:2], state.head_dim), torch.full(shape, float("-inf")), torch.zeros(shape)
    held = (cache.keys[layer or 0, slot], cache.values[layer or 0, slot])
    keys, seen_values = (
        s[:, slice(*seen[0])] if len(seen) == 1 else torch.cat([s[:, slice(*p)] for p in seen], 1) for s in held
    )
    scores = torch.bmm(q, keys.transpose(1, 2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    peak = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - peak)
    part = torch.bmm(weights, seen_values), peak, weights.sum(-1, keepdim=True)
    return part if len(heads) == state.kv_heads else tuple(p[mine] for p in part)


def _pieces(block: int, split: Split, first: int, end: int) -> list[tuple[int, int]]:
    """The parts of positions [first, end) whose blocks belong to the split."""
    if split[1] == 1:
        return [(first, end)]
    mine = (b for b in range(first // block, -(-end // block)) if b % split[1] == split[0])
    return [(max(first, b * block), min(end, (b + 1) * block)) for b in mine]


def _one_sequence(cache: Cache, state: State, layer, heads, split: Split, q, positions, slot: int, values) -> Part:
    """Tokens of one sequence, `q [tokens, kv heads, group, head_dim]`; the result `[tokens, kv heads, group, ...]`."""
    window, softcap, scale = values.get("window"), values.get("softcap"), float(values["scale"])
    tokens, count, group = q.shape[:3]
    extra = -tokens % 16
    rows = torch.nn.functional.pad(q, (0, 0, 0, 0, 0, 0, 0, extra)) if extra else q
    rows = rows.permute(1, 0, 2, 3).flatten(1, 2)  # [kv heads, tokens * group, head_dim]
    at = torch.nn.functional.pad(positions, (0, extra)).repeat_interleave(group)[:, None]
    peak = torch.full((count, rows.shape[1], 1), float("-inf"))
    total, summed = torch.zeros_like(peak), torch.zeros_like(rows)
    last, first = int(positions.max()), 0
    if window is not None:
        first = max(0, int(positions.min()) - window + 1) // state.kv_block
    for block in range(first, last // state.kv_block + 1):
        if block % split[1] != split[0]:
            continue
        lo, hi = block * state.kv_block, min((block + 1) * state.kv_block, last + 1)
        # blocks of one size, so that a sum does not depend on where the chunk ends
        missing = (0, 0, 0, lo + state.kv_block - hi)
        keys, seen_values = (
            torch.nn.functional.pad(s[layer or 0, slot, heads.start : heads.stop, lo:hi], missing)
            for s in (cache.keys, cache.values)
        )
        scores = rows @ keys.transpose(1, 2) * scale
        if softcap is not None:
            scores = softcap * elementwise(torch.tanh, scores / softcap)
        where = torch.arange(lo, lo + state.kv_block)
        hidden = where > at if window is None else (where > at) | (where <= at - window)
        scores = scores.masked_fill(hidden, float("-inf"))
        new_peak = torch.maximum(peak, scores.amax(-1, keepdim=True))
        # a token that has seen nothing of this split yet has no maximum to subtract
        safe = new_peak.masked_fill(new_peak.isinf(), 0.0)
        weights, kept = elementwise(torch.exp, scores - safe), elementwise(torch.exp, peak - safe)
        total = total * kept + weights.sum(-1, keepdim=True)
        summed = summed * kept + weights @ seen_values
        peak = new_peak
    return tuple(t.unflatten(1, (-1, group)).permute(1, 0, 2, 3)[:tokens] for t in (summed, peak, total))
