"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), the half-rotation form of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mpk_spec.errors import UserError, did_you_mean
from mpk_spec.ops.base import Expr, Op, OpError, Ref, TensorType, register

if TYPE_CHECKING:
    import torch


@register
class Rope(Op):
    """Rotates each head by its token's position, in float32.

    The cos and sin tables are made by transformers' own rope functions from `parameters` (the config's
    `rope_parameters`), so every `rope_type` it knows works, partial rotation included. Types whose frequencies depend
    on the length (`dynamic`, `longrope`) are evaluated at the plan's context length.
    """

    op: ClassVar[str] = "rope"
    task: ClassVar[str] = "rope"
    cuda: ClassVar[bool] = True
    prologue_of: ClassVar[frozenset[str]] = frozenset({"attention"})

    input: Ref = Field(alias="rope")
    parameters: Expr

    def operands(self):
        return (self.input,)

    def infer(self, inputs, weights, values):
        x = inputs[0]
        if not isinstance(values["parameters"], dict):
            raise OpError(
                f"rope parameters are a map with 'rope_type' and 'rope_theta', got {values['parameters']!r}",
                "parameters",
            )
        if len(x.axes) != 2:
            raise OpError(f"rope needs a value with heads, got {list(x.shape)}", "rope", "give its linear 'heads: ...'")
        if x.axes[-1].size % 2:
            raise OpError(f"rope needs an even head size, got {x.axes[-1].size}", "rope")
        return TensorType(x.axes)

    def granule(self, output):
        return output.axes[-1].size

    def compute(self, inputs, weights, scope):
        import torch

        cos, sin = scope.extras["rope_rows"]  # [tokens, 1, rotated dims] each
        head_dim = scope.extras["head_dim"]
        x = inputs[0].unflatten(-1, (-1, head_dim))
        rotated, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        first, second = rotated.chunk(2, dim=-1)
        turned = rotated * cos + torch.cat((-second, first), dim=-1) * sin
        return (torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned).flatten(-2)


def rope_table(parameters: dict, head_dim: int, config: dict, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 `[context, rotated dims]`, from transformers' `ROPE_INIT_FUNCTIONS`.

    `config`: the model's text config; its lengths and sizes are what some rope types ask for. Raises UserError for a
    rope type that the installed transformers does not know.
    """
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = parameters.get("rope_type", "default")
    if kind == "default":  # a linear scaling by 1, which unlike the models' own default knows partial rotation
        kind, parameters = "linear", {**parameters, "rope_type": "linear", "factor": 1.0}
    if kind not in ROPE_INIT_FUNCTIONS:
        raise UserError(
            f"transformers has no rope type '{kind}'", did_you_mean(kind, ROPE_INIT_FUNCTIONS, "rope types")
        )
    carrier = LlamaConfig(
        hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        head_dim=head_dim,
        max_position_embeddings=config["max_position_embeddings"],
        rope_parameters=parameters,
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](carrier, torch.device("cpu"), seq_len=context)
    angles = torch.arange(context).float()[:, None] * frequencies.float()
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * factor, angles.sin() * factor
