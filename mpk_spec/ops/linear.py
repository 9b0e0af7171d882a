"""Matrix products with weights, dense or by routed expert."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from mpk_spec.ops.base import Axis, Expr, Op, OpError, Ref, TensorType, WeightRef, register

ROW_TILE = 8
"""Rows of a weight that one tensor core instruction takes: a tile. A task's last tile may have less."""

INTERLEAVE = 2
"""Rows of a gate before those of what it gates, where they alternate; tasks do not divide them."""

K_BLOCK = 32
"""Columns of a weight that one warp multiplies at a time."""

WARPS_COLUMNS = 8 * K_BLOCK
"""Those that the eight warps of an SM multiply together, see cuda_templates/tasks/linear.cuh."""


@register
class Linear(Op):
    """`x @ weight.T (+ bias)`, summed in float32 in a fixed order of K.

    `heads` folds the result into `[heads, features / heads]`. With `experts`, `weight` is `[experts, out, in]` and only
    the slices of each token's chosen experts are used: the result has one row per (token, choice).
    """

    op: ClassVar[str] = "linear"
    role: ClassVar[str] = "linear"
    task: ClassVar[str] = "linear"
    cuda: ClassVar[bool] = True

    input: Ref = Field(alias="linear")
    weight: WeightRef
    bias: WeightRef | None = None
    heads: Expr = None
    experts: Ref | None = None

    def operands(self):
        return (self.input,) if self.experts is None else (self.input, self.experts)

    def infer(self, inputs, weights, values):
        x, w = inputs[0], weights["weight"]
        axes = w.axes[1:] if self.experts else w.axes
        if len(axes) != 2:
            want = "[experts, out, in]" if self.experts else "[out, in]"
            raise OpError(f"a linear weight is {want}, got {list(w.shape)}", "weight")
        rows, k = axes
        split_input = frozenset().union(*(a.split for a in x.axes)) if x.axes else frozenset()
        if bool(split_input) != bool(k.split):
            raise OpError(
                "the input is split over ranks and the weight's columns are not"
                if split_input
                else "the weight's columns are split over ranks and the input is not",
                "weight",
                "'shard' must split or replicate both",
            )
        if x.features != k.size:
            raise OpError(f"the input has {x.features} features, the weight takes {k.size}", "weight")
        if self.bias and weights["bias"].shape[-1:] != (rows.size,):
            raise OpError(f"the bias has shape {list(weights['bias'].shape)}, the result {[rows.size]}", "bias")
        out: tuple[Axis, ...] = (rows,)
        heads = values.get("heads")
        if heads is not None:
            if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
                raise OpError(f"'heads' must be a positive whole number, it is {heads!r}", "heads")
            if rows.size % heads:
                raise OpError(f"{rows.size} features do not fold into {heads} heads", "heads")
            out = (Axis(heads, rows.names, rows.split), Axis(rows.size // heads))
        if self.experts is None:
            return TensorType(out, partial=bool(k.split))
        if inputs[1].kind != "route":
            raise OpError(f"'{self.experts}' is no routing", "experts", "name the value of a 'top_k' operator")
        elsewhere = bool(w.axes[0].split)
        if x.elsewhere and not elsewhere:
            raise OpError("rows of other ranks' experts, and a weight that holds all experts", "weight")
        return TensorType(out, partial=bool(k.split), routed=inputs[1].axes[-1].size, elsewhere=elsewhere)

    def needs(self, span, output, inputs):
        return tuple((0, t.features) for t in inputs)

    def granule(self, output):
        return ROW_TILE
