"""What one rank holds: its share of the weights, the activation buffers, the KV cache. All values are float32."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from mpk_spec.errors import UserError
from mpk_spec.ops.base import round_to
from mpk_spec.planner.plan import Plan, Span, Weight

POISON = float("nan")
FULL_COPY_LIMIT = 6 << 30  # weights up to this size (as float32) are widened once, larger ones at each use


@dataclass
class Cache:
    """One state, float32 `[layers, sequences, kv_heads, context, head_dim]`, rounded to its dtype."""

    keys: torch.Tensor
    values: torch.Tensor
    dtype: str


@dataclass
class Rank:
    """One rank of a plan. `rows` selects the tokens of the step that are still wanted (None: all)."""

    plan: Plan
    index: int
    weights: dict[tuple[str, int | None], torch.Tensor]
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    caches: dict[str, Cache] = field(default_factory=dict)
    peers: list[Rank] = field(default_factory=list)
    rope: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    rows: torch.Tensor | None = None

    def weight(self, name: str, layer: int | None) -> torch.Tensor:
        return self.weights[name, layer if self.plan.weights[name].per_layer else None]

    def allocate(self, tokens: int, poison: bool = True) -> None:
        """Fresh buffers for a step of `tokens`; poisoned, whatever nobody wrote is NaN (or -1 for ids)."""
        self.buffers = {n: empty(self.plan, n, tokens) for n in self.plan.tensors}
        for buffer in self.buffers.values() if poison else ():
            buffer.fill_(-1 if buffer.dtype == torch.int32 else POISON)

    def read(self, span: Span) -> torch.Tensor:
        """`[tokens, features]`; `[ranks, tokens, features]` of slots, `[tokens, k, features]` of routed rows."""
        buffer = self.buffers[span.tensor]
        if self.rows is not None:
            tensor = self.plan.tensors.get(span.tensor)
            buffer = buffer.index_select(1 if tensor is not None and tensor.slots else 0, self.rows)
        return buffer if span.hi - span.lo == buffer.shape[-1] else buffer[..., span.lo : span.hi]

    def write(self, span: Span, value: torch.Tensor) -> None:
        """Stores `value`, rounded to the tensor's dtype; an inbox gets it on every rank, or on those whose share it is.

        A whole buffer is replaced.
        """
        tensor = self.plan.tensors[span.tensor]
        value = value if value.dtype == torch.int32 else round_to(value, tensor.dtype)
        if not tensor.inbox and self.rows is None and value.shape == self.buffers[span.tensor].shape:
            self.buffers[span.tensor] = value
            return
        for holder in self.peers if tensor.inbox else [self]:
            lo, hi = span.lo, span.hi
            if tensor.shares == "scattered":
                first, end = holder.share_of(span.tensor)
                lo, hi = max(lo, first), min(hi, end)
            buffer = holder.buffers[span.tensor]
            buffer = buffer[self.index] if tensor.slots else buffer
            if lo < hi and self.rows is None:
                buffer[..., lo:hi] = value[..., lo - span.lo : hi - span.lo]
            elif lo < hi:
                buffer[self.rows, ..., lo:hi] = value[..., lo - span.lo : hi - span.lo]

    def share_of(self, tensor: str) -> tuple[int, int]:
        """The features of a sum in two shots that this rank adds up."""
        share = self.plan.tensors[tensor].extent // self.plan.tp
        return self.index * share, (self.index + 1) * share


def empty(plan: Plan, name: str, tokens: int) -> torch.Tensor:
    """A buffer for a tensor of the plan, with whatever lies there."""
    tensor = plan.tensors[name]
    shape = (tokens, tensor.shape[0], prod(tensor.shape[1:])) if tensor.routed else (tokens, prod(tensor.shape))
    shape = (plan.tp, *shape) if tensor.slots else shape
    return torch.empty(shape, dtype=torch.int32 if tensor.dtype == "i32" else torch.float32)


def load_ranks(plan: Plan, checkpoint: Any, progress=None) -> list[Rank]:
    """All ranks of the plan with their shares of the checkpoint. Raises UserError for what does not fit."""
    prefix = find_prefix(plan, set(checkpoint.names()), checkpoint)
    _check_storage(plan)
    ranks = [Rank(plan, r, {}) for r in range(plan.tp)]
    for rank in ranks:
        rank.peers = ranks
    layers = layer_count(plan)
    total = sum(layers if w.per_layer else 1 for w in plan.weights.values())
    done, shared = 0, {}
    widen = 4 * sum(prod(w.shape) * (layers if w.per_layer else 1) for w in plan.weights.values()) <= FULL_COPY_LIMIT
    for weight in plan.weights.values():
        for layer in range(layers) if weight.per_layer else [None]:
            for rank in ranks:
                empty = weight.once and rank.index > 0
                key = (weight.source, layer, weight.shape, weight.split, share_of(weight, rank.index), empty)
                if key not in shared:
                    part = read_share(checkpoint, prefix, weight, layer, rank.index)
                    shared[key] = part.float() if widen else part
                    if empty:
                        shared[key] = torch.zeros_like(shared[key])
                rank.weights[weight.name, layer] = shared[key]
            done += 1
            if progress is not None:
                progress("loading weights", done, total)
    return ranks


def _check_storage(plan: Plan) -> None:
    for weight in plan.weights.values():
        if weight.storage.get("format", "bf16") != "bf16":
            raise UserError(
                f"weight '{weight.name}' of spec '{plan.spec}' is stored as {weight.storage['format']}, "
                "which the CPU reference cannot read yet"
            )


def layer_count(plan: Plan) -> int:
    """How many layers a plan has."""
    return 1 + max((s.layer for step in plan.steps.values() for s in step.stages if s.layer is not None), default=-1)


def find_prefix(plan: Plan, names: set[str], checkpoint: Any) -> str:
    """The plan's prefix under which the checkpoint has the weights. UserError for the first one that is missing."""
    layers = layer_count(plan)
    wanted = [(w, layer) for w in plan.weights.values() for layer in (range(layers) if w.per_layer else [None])]

    def missing(prefix: str) -> list[tuple[Weight, str]]:
        return [(w, n) for w, layer in wanted for n in source_names(w, layer, prefix) if n not in names]

    prefix = min(plan.prefixes, key=lambda p: len(missing(p)))
    for weight, name in missing(prefix):
        raise UserError(
            f"{checkpoint.source}: there is no tensor '{name}', "
            f"which weight '{weight.name}' of spec '{plan.spec}' is read from",
            f"the checkpoint has {len(names)} tensors, such as {', '.join(sorted(names)[:3])}",
        )
    return prefix


def source_names(weight: Weight, layer: int | None, prefix: str) -> list[str]:
    """The checkpoint's tensors that make up a weight: one, or one per expert."""
    name = prefix + weight.source.replace("{i}", str(layer))
    if weight.stack is None:
        return [name]
    return [name.replace("{" + weight.stack + "}", str(e)) for e in range(weight.full_shape[0])]


def share_of(weight: Weight, rank: int) -> int:
    return rank // weight.ranks_per_part if weight.split is not None else 0


def read_share(checkpoint: Any, prefix: str, weight: Weight, layer: int | None, rank: int) -> torch.Tensor:
    """A rank's part of a weight, in the checkpoint's dtype, padded rows zero."""
    stacked, split = weight.stack is not None, weight.split
    names = source_names(weight, layer, prefix)
    full = weight.full_shape[1:] if stacked else weight.full_shape
    for name in names:
        found = tuple(checkpoint.shape(name))
        if found != tuple(full):
            raise UserError(f"{checkpoint.source}: tensor '{name}' is {list(found)}, spec and config say {list(full)}")
    if split is None:
        parts = [checkpoint.read(name) for name in names]
        return torch.stack(parts) if stacked else parts[0]
    lo = share_of(weight, rank) * weight.shape[split]
    hi = min(lo + weight.shape[split], weight.full_shape[split])
    if lo >= hi:  # all padding
        return torch.zeros(weight.shape)
    slices = None
    if stacked and split == 0:
        names = names[lo:hi]
    else:
        slices = tuple(slice(lo, hi) if a == split - stacked else slice(0, n) for a, n in enumerate(full))
    parts = [checkpoint.read(name, slices) for name in names]
    tensor = torch.stack(parts) if stacked else parts[0]
    missing = weight.shape[split] - (hi - lo)
    if missing:
        filler = list(tensor.shape)
        filler[split] = missing
        tensor = torch.cat((tensor, tensor.new_zeros(filler)), split)
    return tensor


def unread_tensors(plan: Plan, checkpoint: Any) -> list[str]:
    """Tensors of the checkpoint that no weight reads and the spec does not ignore: it computes something else."""
    from fnmatch import fnmatchcase

    names = set(checkpoint.names())
    prefix = find_prefix(plan, names, checkpoint)
    layers = layer_count(plan)
    read = {
        name
        for weight in plan.weights.values()
        for layer in (range(layers) if weight.per_layer else [None])
        for name in source_names(weight, layer, prefix)
    }
    patterns = [p for prefix in plan.prefixes for p in (prefix + i for i in plan.ignore)] + list(plan.ignore)
    return sorted(n for n in names - read if not any(fnmatchcase(n, p) for p in patterns))
