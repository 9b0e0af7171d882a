"""Every rope type of transformers, partial rotation included."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

from mpk_spec.errors import UserError
from mpk_spec.ops import all_ops
from mpk_spec.ops.base import Scope
from mpk_spec.ops.rope import rope_table

CONTEXT = 96
CONFIG = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 48}
EXTRA = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "factor": 3.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0 + n / 8 for n in range(8)],
        "long_factor": [2.0 + n for n in range(8)],
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}


def test_all_types_are_tested():
    assert EXTRA.keys() == {"default", *ROPE_INIT_FUNCTIONS}


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    scope = Scope(extras={"rope_rows": (cos[:, None], sin[:, None]), "head_dim": 16})
    made = all_ops()["rope"].model_construct(input="a")
    return made.compute([x.flatten(-2)], {}, scope).unflatten(-1, (-1, 16))


@pytest.mark.parametrize("kind", EXTRA)
def test_as_transformers(kind):
    parameters = {"rope_type": kind, "rope_theta": 10000.0, **EXTRA[kind]}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**CONFIG, rope_parameters=dict(parameters)))
    x = torch.randn(1, 4, CONTEXT, 16)
    cos, sin = theirs(x, torch.arange(CONTEXT)[None])
    ours = rope_table(parameters, 16, CONFIG, CONTEXT)
    assert torch.allclose(ours[0], cos[0], atol=1e-6) and torch.allclose(ours[1], sin[0], atol=1e-6)
    want, _ = apply_rotary_pos_emb(x, x, cos, sin)
    assert torch.allclose(rotate(x[0].transpose(0, 1), *ours), want[0].transpose(0, 1), atol=1e-5)


@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_partial_rotation(kind):
    """The first quarter of each head turns, the rest stays."""
    parameters = {"rope_type": kind, "rope_theta": 10000.0, "partial_rotary_factor": 0.25, **EXTRA[kind]}
    cos, sin = rope_table(parameters, 16, CONFIG, CONTEXT)
    assert cos.shape == (CONTEXT, 4)
    x = torch.randn(CONTEXT, 3, 16)
    ours = rotate(x, cos, sin)
    assert torch.equal(ours[..., 4:], x[..., 4:]) and not torch.allclose(ours[1:, :, :4], x[1:, :, :4])
    want, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos[None], sin[None])
    assert torch.allclose(ours, want[0].transpose(0, 1), atol=1e-6)


def test_unknown_type():
    with pytest.raises(UserError) as caught:
        rope_table({"rope_type": "yarm", "rope_theta": 1e4}, 16, CONFIG, 8)
    assert str(caught.value) == "transformers has no rope type 'yarm'\n  hint: did you mean 'yarn'?"
