from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from tiny_models import KEYS, TINY, tiny_model

from mpk_spec.errors import UserError
from mpk_spec.weights import StateDictCheckpoint
from mpk_spec.weights.config import make_config


@pytest.mark.parametrize("architecture", KEYS)
def test_names_as_published_and_no_copies(architecture, tmp_path):
    model = tiny_model(architecture)
    checkpoint = StateDictCheckpoint(model.state_dict(), architecture, model.config)
    model.save_pretrained(tmp_path)
    memory = {p.data.untyped_storage().data_ptr() for p in model.parameters()}
    with safe_open(tmp_path / "model.safetensors", framework="pt") as saved:
        assert sorted(checkpoint.names()) == sorted(saved.keys())
        for name in checkpoint.names():
            tensor = checkpoint.read(name)
            assert torch.equal(tensor, saved.get_tensor(name)), name
            assert tuple(tensor.shape) == checkpoint.shape(name)
            assert tensor.untyped_storage().data_ptr() in memory
    assert checkpoint.directory is None and checkpoint.config["num_hidden_layers"] == 2


def test_names_in_memory_work_too():
    model = tiny_model("Qwen3MoeForCausalLM")
    checkpoint = StateDictCheckpoint(model.state_dict(), "Qwen3MoeForCausalLM", KEYS["Qwen3MoeForCausalLM"])
    fused = checkpoint.read("model.layers.0.mlp.experts.gate_up_proj")
    assert "model.layers.0.mlp.experts.gate_up_proj" not in checkpoint.names()
    part = checkpoint.read("model.layers.0.mlp.experts.3.up_proj.weight", (slice(4, 8), slice(0, 5)))
    assert torch.equal(part, fused[3, 36:40, :5]) and part.data_ptr() == fused[3, 36:].data_ptr()


def test_a_tied_head_is_not_listed_twice():
    checkpoint = StateDictCheckpoint(
        tiny_model("Gemma3ForCausalLM").state_dict(), "Gemma3ForCausalLM", KEYS["Gemma3ForCausalLM"]
    )
    assert "model.embed_tokens.weight" in checkpoint.names() and "lm_head.weight" not in checkpoint.names()
    assert checkpoint.shape("lm_head.weight") == (300, 64)


def test_names_of_a_multimodal_model():
    import transformers

    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    keys = {"text_config": {**TINY, "tie_word_embeddings": True}, "vision_config": vision}
    architecture = "Gemma3ForConditionalGeneration"
    model = transformers.Gemma3ForConditionalGeneration(make_config(architecture, keys))
    names = StateDictCheckpoint(model.state_dict(), architecture, keys).names()
    assert "language_model.model.layers.1.self_attn.q_norm.weight" in names
    assert {name.split(".")[0] for name in names} == {"language_model", "vision_tower", "multi_modal_projector"}


def test_unknown_names():
    checkpoint = StateDictCheckpoint(tiny_model("LlamaForCausalLM").state_dict(), "LlamaForCausalLM", TINY)
    with pytest.raises(UserError, match="tensors in memory has no tensor 'norm'"):
        checkpoint.read("norm")
