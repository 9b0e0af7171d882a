"""Operators that work feature by feature: sums and gated activations."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from mpk_spec.ops.base import Op, OpError, Refs, TensorType, elementwise, register, same_features


@register
class Add(Op):
    """The sum of its operands in float32, in order. float32 out: the residual stream is not rounded."""

    op: ClassVar[str] = "add"
    task: ClassVar[str] = "add"
    cuda: ClassVar[bool] = True
    epilogue_of: ClassVar[frozenset[str]] = frozenset({"linear", "row"})
    prologue_of: ClassVar[frozenset[str]] = frozenset({"linear", "row"})

    inputs: Refs = Field(alias="add", min_length=2)

    def operands(self):
        return tuple(self.inputs)

    def infer(self, inputs, weights, values):
        same_features("add", inputs)
        if any(t.routed for t in inputs):
            raise OpError("a sum of routed rows", "add", "put 'combine' before it")
        return TensorType(inputs[0].axes, dtype="f32")

    def compute(self, inputs, weights, scope):
        total = inputs[0]
        for x in inputs[1:]:
            total = total + x
        return total


@register
class GatedAct(Op):
    """`fn(gate) * up` (Shazeer 2020, arXiv:2002.05202), in float32."""

    op: ClassVar[str] = "gated_act"
    task: ClassVar[str] = "gated_act"
    cuda: ClassVar[bool] = True
    epilogue_of: ClassVar[frozenset[str]] = frozenset({"linear", "row"})

    inputs: Refs = Field(alias="gated_act", min_length=2, max_length=2)
    fn: Literal["silu", "gelu", "gelu_tanh", "relu"]

    def operands(self):
        return tuple(self.inputs)

    def infer(self, inputs, weights, values):
        same_features("gated_act", inputs)
        return TensorType(inputs[0].axes, routed=inputs[0].routed, elsewhere=inputs[0].elsewhere)

    def compute(self, inputs, weights, scope):
        from functools import partial

        import torch.nn.functional as F

        gate, up = inputs
        if self.fn == "gelu_tanh":
            return elementwise(partial(F.gelu, approximate="tanh"), gate) * up
        return elementwise(getattr(F, self.fn), gate) * up
