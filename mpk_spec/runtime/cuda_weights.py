"""A checkpoint's weights into one block of GPU memory, packed as the kernel reads them, one tensor at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mpk_spec.emit.layout import Layout, Packed, RopeTable
from mpk_spec.ops.linear import INTERLEAVE
from mpk_spec.planner.plan import Plan

if TYPE_CHECKING:
    import torch

PIECE = 8  # bf16 in the 16 bytes that ldmatrix takes of a row
ROWS_AT_ONCE = 8192  # that are packed: their places take 8 bytes for each of those


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
    """The weights of a fusion as one matrix `[part.rows, K]`."""
    import torch

    if part.layout == "interleave":
        return torch.stack([w.unflatten(0, (-1, INTERLEAVE)) for w in weights], 1).flatten(0, 2)
    return torch.cat([w.unflatten(0, (part.groups, -1)) for w in weights], 1).flatten(0, 1)


def pack(part: Packed, rows: torch.Tensor, to: torch.Tensor) -> None:
    """Writes `[rows, K]` to the flat `to` as the kernel reads it (see emit/layout.py)."""
    import torch

    out, pieces = to.view(-1, PIECE), rows.unflatten(1, (-1, PIECE))
    piece = torch.arange(part.k // PIECE, device=rows.device)
    first = piece * PIECE // part.tile_k * (part.tile_k // PIECE)  # of the chunk
    width = torch.clamp(part.k // PIECE - first, max=part.tile_k // PIECE)
    for lo in range(0, part.rows, ROWS_AT_ONCE):
        row = torch.arange(lo, min(lo + ROWS_AT_ONCE, part.rows), device=rows.device)[:, None]
        begin, height = tiles_of_rows(part, row)
        place = piece - first ^ row - begin & part.mix
        out[begin * len(piece) + first * height + (row - begin) * width + place] = pieces[row[:, 0]]


def tiles_of_rows(part: Packed, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(first row, rows) of the tiles that rows are in."""
    import torch

    cuts = torch.tensor(part.cuts, device=row.device)
    task = torch.searchsorted(cuts, row, right=True) - 1
    begin = cuts[task] + (row - cuts[task]) // part.tile_rows * part.tile_rows
    return begin, torch.clamp(cuts[task + 1] - begin, max=part.tile_rows)


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
