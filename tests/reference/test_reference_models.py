"""Every spec's tiny size computes what the Hugging Face model of its architecture computes."""

from __future__ import annotations

import pytest
from tiny_specs import SPECS, WIDE, child, exact_error, spec_of

TOLERANCE = 1e-4


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("name", SPECS)
def test_equals_transformers(name, tp):
    """A prompt of three chunks, then decode steps."""
    assert exact_error(spec_of(name), tp=tp, chunk=16) < TOLERANCE


@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "gemma3"])
def test_equals_transformers_as_planned_for_a_gpu(name, tp):
    assert exact_error(spec_of(name), tp=tp, target="h100") < TOLERANCE


def test_rope_types_of_real_checkpoints():
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
    assert exact_error(child("qwen3", {"rope_parameters": yarn}), count=100, prompt=90) < TOLERANCE
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    assert exact_error(child("smollm2", {"rope_parameters": linear})) < TOLERANCE


def test_more_sizes():
    assert exact_error(child("qwen3", WIDE), tp=2, target="h100") < TOLERANCE
    assert exact_error(child("qwen3", {"tie_word_embeddings": False}), tp=4) < TOLERANCE  # a head of its own, padded
    thirds = child("qwen3", {"num_attention_heads": 12, "num_key_value_heads": 3, "intermediate_size": 384})
    assert exact_error(thirds, tp=3) < TOLERANCE
    assert exact_error(thirds, tp=6) < TOLERANCE  # two ranks hold each KV head
