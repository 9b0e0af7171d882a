"""Root-mean-square norm over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from mpk_spec.ops.base import Expr, Op, OpError, Ref, TensorType, WeightRef, number, register, round_to


@register
class RMSNorm(Op):
    """`x / sqrt(mean(x^2) + eps) * gain` over the last axis: the row, or each head of a value with heads.

    Rounding as in transformers' modeling files: Llama and Qwen round the normalised value to bf16 before the gain;
    with `weight_offset` (Gemma: gain = 1 + w) everything stays in float32 until the result.
    """

    op: ClassVar[str] = "rmsnorm"
    task: ClassVar[str] = "rmsnorm"
    cuda: ClassVar[bool] = True
    prologue_of: ClassVar[frozenset[str]] = frozenset({"linear", "attention", "row"})

    input: Ref = Field(alias="rmsnorm")
    weight: WeightRef
    eps: Expr
    weight_offset: Expr = 0

    def operands(self):
        return (self.input,)

    def infer(self, inputs, weights, values):
        x, gain = inputs[0], weights["weight"]
        number(values, "eps")
        number(values, "weight_offset")
        if any(a.split for a in gain.axes):
            raise OpError(
                "a norm needs the whole row, and tensor parallelism splits the gain", "weight", "do not split its dim"
            )
        if not x.axes or gain.shape != (x.axes[-1].size,):
            raise OpError(
                f"the gain has shape {list(gain.shape)}, the rows that it scales {list(x.shape[-1:])}", "weight"
            )
        if x.axes[-1].split:
            raise OpError("a norm over a row that tensor parallelism splits", "rmsnorm")
        return TensorType(x.axes)

    def granule(self, output):
        return output.axes[-1].size

    def compute(self, inputs, weights, scope):
        gain = weights["weight"].float()
        x = inputs[0].unflatten(-1, (-1, gain.shape[0]))
        # a fixed tree of sums: the same bits for one token and for many
        rows = x * (x.square().mean(-1, keepdim=True) + float(scope.values["eps"])).rsqrt()
        offset = float(scope.values["weight_offset"])
        out = rows * (gain + offset) if offset else round_to(rows, "bf16") * gain
        return out.flatten(-2)
