"""From logits to the next token. Greedy: argmax in two stages."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

from pydantic import Field

from mpk_spec.ops.base import Axis, Op, OpError, Ref, TensorType, register


@register
class Sample(Op):
    """The token with the highest logit, the lowest id among equals. The planner lowers it to the two ops below.

    Fused with the linear that makes the logits, the first of them is done by that linear's tasks.
    """

    op: ClassVar[str] = "sample"
    role: ClassVar[str] = "reduce"
    task: ClassVar[str] = "argmax_reduce"
    epilogue_of: ClassVar[frozenset[str]] = frozenset({"linear"})
    cuda: ClassVar[bool] = True

    input: Ref = Field(alias="sample")

    def operands(self):
        return (self.input,)

    def infer(self, inputs, weights, values):
        if len(inputs[0].axes) != 1:
            raise OpError(f"logits are [vocab], got {list(inputs[0].shape)}", "sample")
        return TensorType((Axis(1),), dtype="i32")


@register
class ArgmaxPartial(Op):
    """For each slice of the logits its maximum and the id of that: `[tokens, slices, 2]` as float32 and int32 bits.

    The `vocab` logits come in units of `unit` neighbours, which the slices share out as tasks share out rows. A rank's
    ids start at `rank * rank_stride` (0 where every rank has all of the vocabulary); from `valid` on they are padding.
    """

    op: ClassVar[str] = "argmax_partial"
    role: ClassVar[str] = "row"
    task: ClassVar[str] = "argmax_partial"
    keeps_input: ClassVar[bool] = True
    cuda: ClassVar[bool] = True

    input: Ref = Field(alias="argmax_partial")
    slices: int
    unit: int
    vocab: int
    valid: int
    rank_stride: int

    def operands(self):
        return (self.input,)

    def infer(self, inputs, weights, values):
        return TensorType((Axis(self.slices), Axis(2)), dtype="f32")

    def granule(self, output):
        return 2

    def edge(self, slice_: int) -> int:
        """The first logit of a slice."""
        units = -(-self.vocab // self.unit)
        return min(slice_ * units // self.slices * self.unit, self.vocab)

    def needs(self, span, output, inputs):
        return ((self.edge(span[0] // 2), self.edge(span[1] // 2)),)

    def compute(self, inputs, weights, scope):
        import torch

        slices = []
        first, end = (edge // 2 for edge in scope.span)
        base, rank = self.edge(first), scope.extras["rank"]
        for lo, hi in pairwise(self.edge(n) for n in range(first, end + 1)):
            part = inputs[0][:, lo - base : hi - base].contiguous()
            ids = torch.arange(lo, hi) + rank * self.rank_stride
            part = part.masked_fill(ids >= self.valid, float("-inf"))
            best = part.argmax(-1)  # the first of equals
            slices.append(torch.stack((part.gather(-1, best[:, None])[:, 0], ids[best].int().view(torch.float32)), -1))
        return torch.stack(slices, 1).flatten(1)


@register
class ArgmaxReduce(Op):
    """The id of the highest of all slices (of all ranks); int32 `[tokens, 1]`."""

    op: ClassVar[str] = "argmax_reduce"
    role: ClassVar[str] = "reduce"
    task: ClassVar[str] = "argmax_reduce"
    cuda: ClassVar[bool] = True

    input: Ref = Field(alias="argmax_reduce")
    slices: int

    def operands(self):
        return (self.input,)

    def infer(self, inputs, weights, values):
        return TensorType((Axis(1),), dtype="i32")

    def needs(self, span, output, inputs):
        return ((0, inputs[0].features),)

    def compute(self, inputs, weights, scope):
        import torch

        pairs = inputs[0]
        if pairs.dim() == 3:  # [ranks, tokens, 2 * slices]: ranks are neighbours in the vocabulary
            pairs = pairs.transpose(0, 1).flatten(1)
        pairs = pairs.unflatten(-1, (-1, 2)).contiguous()
        best = pairs[..., 0].argmax(-1)
        return pairs[..., 1].contiguous().view(torch.int32).gather(-1, best[:, None])
