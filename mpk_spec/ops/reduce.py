"""Sums over ranks and over K splits, both in a fixed order."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from mpk_spec.ops.base import Axis, Op, Ref, TensorType, register


@register
class AllReduce(Op):
    """The sum of all ranks' parts, in rank order, so that every rank has the same bits.

    Derived where a partial value is needed whole; may also be written by hand. Each rank writes its part into every
    peer's inbox `[ranks, tokens, features]`; this op adds the inbox up.
    """

    op: ClassVar[str] = "all_reduce"
    role: ClassVar[str] = "row"
    task: ClassVar[str] = "all_reduce"
    cuda: ClassVar[bool] = True
    prologue_of: ClassVar[frozenset[str]] = frozenset({"linear", "row"})

    input: Ref = Field(alias="all_reduce")

    def operands(self):
        return (self.input,)

    def infer(self, inputs, weights, values):
        return TensorType(inputs[0].axes, dtype=inputs[0].dtype, routed=inputs[0].routed)

    def compute(self, inputs, weights, scope):
        parts = inputs[0]  # [ranks, tokens, features]
        total = parts[0]
        for rank in range(1, parts.shape[0]):
            total = total + parts[rank]
        return total


@register
class SplitKReduce(Op):
    """The sum of a linear's K splits, in split order. Made by the planner (`NAME.reduce`)."""

    op: ClassVar[str] = "split_k_reduce"
    task: ClassVar[str] = "split_k_reduce"

    input: Ref = Field(alias="split_k_reduce")
    splits: int
    features: int

    def operands(self):
        return (self.input,)

    def infer(self, inputs, weights, values):
        return TensorType((Axis(self.features),), partial=inputs[0].partial)

    def needs(self, span, output, inputs):
        return ((0, inputs[0].features),)

    def compute(self, inputs, weights, scope):
        parts = inputs[0].unflatten(-1, (self.splits, self.features))[..., slice(*scope.span)]
        total = parts[:, 0]
        for split in range(1, self.splits):
            total = total + parts[:, split]
        return total
