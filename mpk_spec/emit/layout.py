"""Where weights lie in the GPU's memory: packed products, small vectors, the embedding table; rope tables; the cache.

Packed rows: the linears of a fusion lie one after the other in each of `groups` groups (concat), or alternate by
`INTERLEAVE` (interleave). Each task's rows are cut into tiles of `tile_rows`, the last of which may have less, and
tiles along K into chunks of `tile_k`. A chunk is `[rows of the tile][tile_k]` bf16, what one bulk copy fetches. Of a
tile's row r the 16 bytes number p lie in place `p ^ (r & mix)`, so that the eight rows of which `ldmatrix` reads one
piece each are in different banks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from mpk_spec.errors import UserError
from mpk_spec.ops.linear import K_BLOCK
from mpk_spec.planner.plan import Group, Plan, Task

ALIGN = 256


@dataclass(frozen=True)
class Packed:
    """The weight of one group. Offsets and strides in bytes. cuts: the first row of each task, and the end."""

    group: str
    weights: tuple[str, ...]
    layout: str
    groups: int
    rows: int
    cuts: tuple[int, ...]
    k: int
    tile_rows: int
    tile_k: int
    offset: int
    layer_stride: int  # 0: not per layer

    @property
    def row_bytes(self) -> int:
        return self.k * 2

    @property
    def chunk_row_bytes(self) -> int:
        return self.tile_k * 2

    @property
    def chunk_bytes(self) -> int:
        """At most."""
        return self.tile_rows * self.tile_k * 2

    @property
    def mix(self) -> int:
        """`Tiles::mix` of the kernel."""
        return 7 if self.k % 64 == 0 and self.tile_k % 64 == 0 else 3

    @property
    def chunks_per_tile(self) -> int:
        return -(-self.k // self.tile_k)


@dataclass(frozen=True)
class Flat:
    """A weight as the checkpoint has it: a gain, a bias, the embedding table."""

    name: str
    elements: int
    offset: int
    layer_stride: int


@dataclass(frozen=True)
class RopeTable:
    """(cos, sin) float32 `[context][dims / 2]` at `offset` pairs."""

    parameters: str  # repr, as plans compare them
    dims: int
    offset: int


@dataclass(frozen=True)
class Cache:
    """Where a state's pages lie, and how its attention reads them: `CachePages` of the kernel. `row_bytes`: of one
    position's key of one KV head; `group`: query heads of each KV head."""

    state: str
    offset: int
    kv_heads: int
    block: int
    row_bytes: int
    splits: int
    group: int

    @property
    def chunk_bytes(self) -> int:
        return self.block * self.row_bytes


@dataclass(frozen=True)
class Layout:
    packed: dict[str, Packed]
    flat: dict[str, Flat]
    ropes: dict[str, RopeTable]
    weight_bytes: int
    rope_pairs: int
    caches: dict[str, Cache]
    cache_bytes: int
    layers: int


def lay_out(plan: Plan) -> Layout:
    layers = max((s.layer + 1 for s in plan.steps["decode"].stages if s.layer is not None), default=1)
    cursor = _Cursor(layers)
    groups = {g.name: g for t in plan.steps["decode"].templates for g in t.groups}
    packed = {p.group: _packed(plan, p, groups[p.group], cursor) for p in plan.packings}
    in_tiles = {name for p in packed.values() for name in p.weights}
    flat = {}
    for weight in plan.weights.values():
        if weight.name in in_tiles:
            continue
        elements = 1
        for size in weight.shape:
            elements *= size
        offset, stride = cursor.take(elements * 2, weight.per_layer)
        flat[weight.name] = Flat(weight.name, elements, offset, stride)
    ropes, pairs = _ropes(plan)
    caches, cache_bytes = {}, 0
    for state in plan.states.values():
        caches[state.name] = _cache(plan, state, cache_bytes)
        cache_bytes += state.layers * pages(state) * state.kv_heads * page_bytes(state)
    return Layout(packed, flat, ropes, cursor.at, pairs, caches, cache_bytes, layers)


def pages(state) -> int:
    return -(-state.context // state.page) * state.batch


def _cache(plan: Plan, state, offset: int) -> Cache:
    nodes = (n for t in plan.steps["decode"].templates for g in t.groups for n in g.nodes if n.op == "attention")
    heads = next((n.values["heads"] for n in nodes if n.values["state"] == state.name), state.kv_heads)
    splits = max(1, state.extent // state.kv_heads)
    return Cache(state.name, offset, state.kv_heads, state.kv_block, state.row_bytes, splits, heads // state.kv_heads)


def page_bytes(state) -> int:
    """Of one KV head: K and V."""
    return 2 * state.page * state.row_bytes


class _Cursor:
    def __init__(self, layers: int):
        self.at, self.layers = 0, layers

    def take(self, size: int, per_layer: bool) -> tuple[int, int]:
        """(offset, layer stride) of a new region."""
        stride = -(-size // ALIGN) * ALIGN
        offset = self.at
        self.at += stride * (self.layers if per_layer else 1)
        return offset, stride if per_layer else 0


def rows_of(task: Task, packing) -> tuple[int, int]:
    """The packed rows of a linear's task."""
    per_feature = len(packing.weights) if packing.layout == "interleave" else 1
    lo, hi = task.out
    return lo * per_feature, hi * per_feature


def _cuts(group: Group, packing, rows: int) -> tuple[int, ...]:
    found = sorted({rows_of(task, packing) for task in group.tasks})
    if found[0][0] != 0 or found[-1][1] != rows or any(a[1] != b[0] for a, b in pairwise(found)):
        raise UserError(f"the tasks of '{group.name}' do not divide its {rows} rows")
    return (*(lo for lo, _ in found), rows)


def _packed(plan: Plan, packing, group: Group, cursor: _Cursor) -> Packed:
    weights = [plan.weights[n] for n in packing.weights]
    for weight in weights:
        if weight.storage or weight.dtype != "bf16":
            raise UserError(f"the CUDA kernel reads bf16 weights, '{weight.name}' is {weight.storage or weight.dtype}")
    k, rows = weights[0].shape[-1], sum(w.shape[-2] for w in weights)
    if k % K_BLOCK:
        raise UserError(
            f"the CUDA kernel multiplies in blocks of {K_BLOCK} columns, the weights of '{packing.group}' have {k}"
        )
    offset, stride = cursor.take(rows * k * 2, weights[0].per_layer)
    return Packed(
        packing.group, packing.weights, packing.layout, packing.groups, rows, _cuts(group, packing, rows), k,
        packing.tile_rows, packing.tile_k, offset, stride,
    )  # fmt: skip


def _ropes(plan: Plan) -> tuple[dict[str, RopeTable], int]:
    found: dict[str, RopeTable] = {}
    at = 0
    for template in plan.steps["decode"].templates:
        for node in (n for g in template.groups for n in g.nodes if n.op == "rope"):
            key = repr(node.values["parameters"])
            if key not in found:
                dims = rotary_dims(node.values["parameters"], node.values["head_dim"])
                found[key] = RopeTable(key, dims, at)
                at += plan.context * dims // 2
    return found, at


def rotary_dims(parameters: dict, head_dim: int) -> int:
    return int(head_dim * float(parameters.get("partial_rotary_factor") or 1.0))
