"""What each rank's kernel finds in its packed weights is what the reference's rank multiplies by."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from mpk_spec.emit.layout import lay_out
from mpk_spec.ops.linear import INTERLEAVE
from mpk_spec.planner import plan
from mpk_spec.reference.state import load_ranks
from mpk_spec.runtime.cuda_weights import load_weights
from mpk_spec.runtime.random_model import random_checkpoint
from mpk_spec.schema import load_spec


def unpacked(part, arena: torch.Tensor, layer: int | None) -> torch.Tensor:
    """`[rows, K]`, read as the kernel does."""
    offset = part.offset + part.layer_stride * (layer or 0)
    flat = arena[offset : offset + part.rows * part.k * 2].view(torch.bfloat16)
    out = torch.empty(part.rows, part.k)
    tiles = [(row, min(row + 8, hi)) for lo, hi in pairwise(part.cuts) for row in range(lo, hi, 8)]
    for begin, end in tiles:
        for lo in range(0, part.k, part.tile_k):
            width = min(part.tile_k, part.k - lo)
            at = begin * part.k + lo * (end - begin)
            chunk = flat[at : at + (end - begin) * width].view(end - begin, width // 8, 8)
            for row in range(begin, end):
                places = torch.arange(width // 8) ^ (row - begin & part.mix)
                out[row, lo : lo + width] = chunk[row - begin, places].flatten()
    return out


def rows_of(part, weights: list[torch.Tensor]) -> torch.Tensor:
    if part.layout == "interleave":
        return torch.stack([w.view(-1, INTERLEAVE, part.k) for w in weights], 1).reshape(-1, part.k)
    return torch.cat([w.view(part.groups, -1, part.k) for w in weights], 1).reshape(-1, part.k)


@pytest.mark.parametrize(("spec", "tp"), [("qwen3", 2), ("qwen3", 8), ("qwen2_5", 2)])
def test_packed_shares(spec, tp):
    loaded = load_spec(spec)
    made = plan(loaded, size="tiny", target="h100", context=128, tp=tp)
    checkpoint, layout = random_checkpoint(loaded, "tiny", 3), lay_out(made)
    for rank in load_ranks(made, checkpoint):
        arena = load_weights(made, layout, checkpoint, torch.device("cpu"), rank=rank.index)
        for part in layout.packed.values():
            layer = 1 if part.layer_stride else None
            wanted = rows_of(part, [rank.weight(name, layer).float() for name in part.weights])
            found = unpacked(part, arena, layer)
            assert torch.equal(found, wanted), (part.group, rank.index)
        for flat in layout.flat.values():
            layer = 1 if flat.layer_stride else None
            offset = flat.offset + flat.layer_stride * (layer or 0)
            found = arena[offset : offset + flat.elements * 2].view(torch.bfloat16).float()
            assert torch.equal(found, rank.weight(flat.name, layer).float().flatten()), (flat.name, rank.index)
