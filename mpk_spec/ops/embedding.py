"""Token ids to rows of the embedding table."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from mpk_spec.ops.base import Expr, Op, OpError, Ref, TensorType, WeightRef, number, register


@register
class Embedding(Op):
    """`table[token]`, times `scale` where the model has one (Gemma: sqrt(hidden), rounded to bf16). float32 out."""

    op: ClassVar[str] = "embedding"
    role: ClassVar[str] = "gather"
    task: ClassVar[str] = "embedding"
    cuda: ClassVar[bool] = True
    prologue_of: ClassVar[frozenset[str]] = frozenset({"linear", "row"})

    input: Ref = Field(alias="embedding")
    weight: WeightRef
    scale: Expr = 1

    def operands(self):
        return (self.input,)

    def infer(self, inputs, weights, values):
        table = weights["weight"]
        number(values, "scale")
        if len(table.axes) != 2:
            raise OpError(f"an embedding table is [vocab, hidden], got {list(table.shape)}", "weight")
        if table.axes[0].split or table.axes[1].split:
            raise OpError("the embedding table must be on every rank", "weight", "give the weight 'shard: replicate'")
        return TensorType((table.axes[1],), dtype="f32")

    def needs(self, span, output, inputs):
        return ((0, 1),)

    def compute(self, inputs, weights, scope):
        import torch

        ids = inputs[0].to(torch.int64).flatten()
        lo, hi = scope.span
        return weights["weight"][ids, lo:hi].float() * float(scope.values["scale"])
