"""A checkpoint's weights into one block of GPU memory, packed as the kernel reads them, one tensor at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mpk_spec.emit.layout import INTERLEAVE, Layout, Packed, RopeTable
from mpk_spec.planner.plan import Plan

if TYPE_CHECKING:
    import torch


def load_weights(
    plan: Plan, layout: Layout, checkpoint: Any, device: torch.device, progress=None, rank: int = 0
) -> torch.Tensor:
    """A rank's weights, uint8 `[layout.weight_bytes]` on `device`. UserError where the checkpoint does not fit."""
    import torch

    from mpk_spec.reference.state import find_prefix, read_share
    from mpk_spec.weights import on_device

    checkpoint = on_device(checkpoint, device)
    prefix = find_prefix(plan, set(checkpoint.names()), checkpoint)
    arena = torch.zeros(layout.weight_bytes, dtype=torch.uint8, device=device)

    def read(name: str, layer: int | None) -> torch.Tensor:
        weight = plan.weights[name]
        if weight.once and rank > 0:
            return torch.zeros(weight.shape, device=device, dtype=torch.bfloat16)
        return read_share(checkpoint, prefix, weight, layer, rank).to(device=device, dtype=torch.bfloat16)

    jobs = [(p, layer) for p in layout.packed.values() for layer in _layers(layout, p.layer_stride)]
    jobs += [(f, layer) for f in layout.flat.values() for layer in _layers(layout, f.layer_stride)]
    for done, (part, layer) in enumerate(jobs):
        offset = part.offset + part.layer_stride * (layer or 0)
        if isinstance(part, Packed):
            rows = join_rows(part, [read(name, layer) for name in part.weights])
            to = arena[offset : offset + part.rows * part.k * 2].view(torch.bfloat16)
            pack(part, rows, to)
        else:
            to = arena[offset : offset + part.elements * 2].view(torch.bfloat16)
            to.copy_(read(part.name, layer).flatten())
        if progress is not None:
            progress("packing weights", done + 1, len(jobs))
    return arena


def weights_lie_alike(a: Layout, b: Layout) -> bool:
    """Whether what was packed for one is packed for the other, whatever the groups are called that read it."""

    def places(layout: Layout) -> tuple:
        return [replace(p, group="") for p in layout.packed.values()], layout.flat, layout.weight_bytes, layout.layers

    return places(a) == places(b)


def _layers(layout: Layout, stride: int):
    return range(layout.layers) if stride else [None]


def join_rows(part: Packed, weights: list[torch.Tensor]) -> torch.Tensor:
    """The weights of a fusion as one matrix `[part.rows, K]`; rows beyond the last are zero."""
    import torch

    if part.layout == "interleave":
        rows = torch.stack([w.unflatten(0, (-1, INTERLEAVE)) for w in weights], 1).flatten(0, 2)
    else:
        rows = torch.cat([w.unflatten(0, (part.groups, -1)) for w in weights], 1).flatten(0, 1)
    missing = part.rows - rows.shape[0]
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows


def pack(part: Packed, rows: torch.Tensor, to: torch.Tensor) -> None:
    """Writes `[rows, K]` as tiles of chunks of 8 x 8 blocks (see emit/layout.py) to the flat `to`."""
    tiles = rows.unflatten(0, (-1, part.tile_rows // 8, 8))  # [tile, sub-tile, row, K]
    out = to.view(len(tiles), part.tile_rows * part.k)
    for lo in range(0, part.k, part.tile_k):
        hi = min(lo + part.tile_k, part.k)
        blocks = tiles[..., lo:hi].unflatten(-1, (-1, 8)).transpose(2, 3)  # [tile, sub-tile, K block, row, 8]
        out[:, part.tile_rows * lo : part.tile_rows * hi].copy_(blocks.reshape(len(tiles), -1))


def rope_tables(plan: Plan, layout: Layout) -> torch.Tensor:
    """(cos, sin) float32 `[pairs, 2]` of all tables, on the CPU."""
    import torch

    out = torch.empty(max(1, layout.rope_pairs), 2)
    for table in layout.ropes.values():
        cos, sin = _rope(plan, table)
        half = table.dims // 2
        to = out[table.offset : table.offset + plan.context * half].view(plan.context, half, 2)
        to[..., 0], to[..., 1] = cos[:, :half], sin[:, :half]
    return out


def _rope(plan: Plan, table: RopeTable) -> tuple[torch.Tensor, torch.Tensor]:
    from mpk_spec.ops.rope import rope_table

    nodes = [n for t in plan.steps["decode"].templates for g in t.groups for n in g.nodes if n.op == "rope"]
    values = next(n.values for n in nodes if repr(n.values["parameters"]) == table.parameters)
    return rope_table(values["parameters"], values["head_dim"], plan.config, plan.context)
