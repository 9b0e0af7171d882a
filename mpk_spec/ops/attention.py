"""The KV cache and causal attention over it, in splits that are merged in a fixed order (FlashDecoding)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from mpk_spec.ops.base import (
    Axis,
    Expr,
    FeatureSpan,
    Op,
    OpError,
    Ref,
    Refs,
    StateRef,
    TensorType,
    elementwise,
    number,
    register,
)


@register
class KVAppend(Op):
    """Writes this step's keys and values `[tokens, kv_heads, head_dim]` into the cache, rounded to its dtype.

    With `window` the cache may forget positions older than that.
    """

    op: ClassVar[str] = "kv_append"
    role: ClassVar[str] = "append"
    task: ClassVar[str] = "kv_append"
    cuda: ClassVar[bool] = True
    prologue_of: ClassVar[frozenset[str]] = frozenset({"attention"})

    inputs: Refs = Field(alias="kv_append", min_length=2, max_length=2)
    state: StateRef
    window: Expr = None

    def operands(self):
        return tuple(self.inputs)

    def infer(self, inputs, weights, values):
        keys, new_values = inputs
        if len(keys.axes) != 2 or keys.shape != new_values.shape:
            shapes = f"{list(keys.shape)} and {list(new_values.shape)}"
            raise OpError(f"keys and values must be [kv_heads, head_dim] alike, got {shapes}", "kv_append")
        return TensorType(keys.axes, kind="cache")

    def granule(self, output):
        return output.axes[-1].size


@register
class Attention(Op):
    """`softmax(q k^T * scale) v` over the positions up to each token's own, in float32; grouped queries.

    `window`: only the last `window` positions. `softcap`: logits become `softcap * tanh(logits / softcap)` (Gemma 2).
    Probabilities and partial sums stay in float32; positions are summed in blocks of `State.kv_block` at absolute
    positions, so a row's result depends neither on the chunk it came in nor on its neighbours.
    """

    op: ClassVar[str] = "attention"
    role: ClassVar[str] = "attention"
    task: ClassVar[str] = "attention"
    cuda: ClassVar[bool] = True

    input: Ref = Field(alias="attention")
    cache: Ref
    scale: Expr
    window: Expr = None
    softcap: Expr = None

    def operands(self):
        return (self.input, self.cache)

    def infer(self, inputs, weights, values):
        q, cache = inputs
        number(values, "scale")
        window = values.get("window")
        if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
            raise OpError(f"'window' must be a positive whole number or none, it is {window!r}", "window")
        number(values, "softcap", optional=True)
        if cache.kind != "cache":
            raise OpError(f"'{self.cache}' is no cache", "cache", "name the value of a 'kv_append' operator")
        if len(q.axes) != 2 or q.axes[1].size != cache.axes[1].size:
            raise OpError(f"queries are {list(q.shape)}, keys {list(cache.shape)}", "attention")
        heads, kv_heads = q.axes[0].size, cache.axes[0].size
        if heads % kv_heads:
            raise OpError(f"{heads} query heads do not divide over {kv_heads} KV heads", "attention")
        return TensorType(q.axes)

    def granule(self, output):
        return output.axes[-1].size


@register
class AttentionMerge(Op):
    """Adds up the splits of an attention in split order. Made by the planner (`attention.a.merge`).

    Partial results are `[tokens, kv_splits, heads, head_dim + 2]`: the unnormalised sum, the maximum and the sum of
    weights. A split that saw no position has maximum -inf and counts for nothing.
    """

    op: ClassVar[str] = "attention_merge"
    task: ClassVar[str] = "attention_merge"
    cuda: ClassVar[bool] = True
    prologue_of: ClassVar[frozenset[str]] = frozenset({"linear"})

    input: Ref = Field(alias="attention_merge")
    kv_splits: int
    heads: int
    head_dim: int

    def operands(self):
        return (self.input,)

    def infer(self, inputs, weights, values):
        return TensorType((Axis(self.heads), Axis(self.head_dim)))

    def needs(self, span, output, inputs):
        return ((0, inputs[0].features),)

    def granule(self, output):
        return output.axes[-1].size

    def rows(self, span: FeatureSpan) -> tuple[FeatureSpan, ...]:
        """Of the partial results what the features `span` of the result, whole heads, are computed from: by split."""
        row = self.head_dim + 2
        lo, hi = (edge // self.head_dim * row for edge in span)
        return tuple((lo + split * self.heads * row, hi + split * self.heads * row) for split in range(self.kv_splits))

    def compute(self, inputs, weights, scope):
        """Of the heads in `scope.span`; the input is their rows alone, those of one split behind those of another."""
        import torch

        parts = inputs[0].unflatten(-1, (self.kv_splits, -1, self.head_dim + 2))
        sums, peaks, totals = parts[..., :-2], parts[..., -2:-1], parts[..., -1:]
        peak = peaks.amax(1, keepdim=True)
        factors = elementwise(torch.exp, peaks - peak)
        top = (sums * factors)[:, 0]
        bottom = (totals * factors)[:, 0]
        for split in range(1, self.kv_splits):
            top = top + sums[:, split] * factors[:, split]
            bottom = bottom + totals[:, split] * factors[:, split]
        return (top / bottom).flatten(-2)
