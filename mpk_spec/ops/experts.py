"""Mixture of experts: choosing them, and adding up what they return."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from mpk_spec.ops.base import Axis, Expr, Op, OpError, Ref, TensorType, register


@register
class TopK(Op):
    """The `k` experts with the highest scores and their weights; ties go to the lower expert id.

    `softmax`: over all experts before the choice; `renormalize` then divides by the sum over the chosen ones
    (transformers' Qwen3MoeTopKRouter). The value has two fields: ids `[tokens, k]` and weights `[tokens, k]`, stored
    as float32 `[tokens, 2 * k]`.
    """

    op: ClassVar[str] = "top_k"
    task: ClassVar[str] = "top_k"
    epilogue_of: ClassVar[frozenset[str]] = frozenset()

    input: Ref = Field(alias="top_k")
    k: Expr
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: Expr = True

    def operands(self):
        return (self.input,)

    def infer(self, inputs, weights, values):
        experts, k = inputs[0].features, values["k"]
        if any(a.split for a in inputs[0].axes):
            raise OpError(
                "the scores of all experts are needed, and tensor parallelism splits them",
                "top_k",
                "give the router's weight 'shard: replicate'",
            )
        if not isinstance(k, int) or not 1 <= k <= experts:
            raise OpError(f"k must be between 1 and the {experts} experts, got {k}", "k")
        return TensorType((Axis(2), Axis(k)), dtype="f32", kind="route")

    def granule(self, output):
        return output.features

    def needs(self, span, output, inputs):
        return ((0, inputs[0].features),)

    def compute(self, inputs, weights, scope):
        import torch

        scores = inputs[0].softmax(-1) if self.score == "softmax" else inputs[0].sigmoid()
        chosen, ids = torch.sort(scores, dim=-1, descending=True, stable=True)
        k = int(scope.values["k"])
        chosen, ids = chosen[:, :k], ids[:, :k]
        if scope.values["renormalize"]:
            chosen = chosen / chosen.sum(-1, keepdim=True)
        return torch.cat((ids.float(), chosen), dim=-1)


@register
class Combine(Op):
    """The sum of the chosen experts' rows times their weights, in the order of choice, in float32."""

    op: ClassVar[str] = "combine"
    task: ClassVar[str] = "combine"
    epilogue_of: ClassVar[frozenset[str]] = frozenset({"linear"})

    input: Ref = Field(alias="combine")
    route: Ref

    def operands(self):
        return (self.input, self.route)

    def infer(self, inputs, weights, values):
        rows, route = inputs
        if route.kind != "route":
            raise OpError(f"'{self.route}' is no routing", "route", "name the value of a 'top_k' operator")
        if not rows.routed:
            raise OpError(f"'{self.input}' has no row per chosen expert", "combine", "its linear needs 'experts: ...'")
        return TensorType(rows.axes, partial=rows.partial or rows.elsewhere)

    def needs(self, span, output, inputs):
        return (span, (0, inputs[1].features))

    def compute(self, inputs, weights, scope):
        rows, route = inputs  # [tokens, k, features], [tokens, 2 * k]
        chosen = route[:, route.shape[-1] // 2 :]
        total = rows[:, 0] * chosen[:, 0:1]
        for choice in range(1, rows.shape[1]):
            total = total + rows[:, choice] * chosen[:, choice : choice + 1]
        return total
