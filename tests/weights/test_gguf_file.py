from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch
from gguf_writer import TEMPLATE, Q, write_gguf
from tiny_models import KEYS, logits, tiny_model

from mpk_spec.errors import UserError
from mpk_spec.weights import StateDictCheckpoint, eos_ids, load_hf_model, load_tokenizer, open_checkpoint


def fails(source) -> str:
    with pytest.raises(UserError) as caught:
        open_checkpoint(source)
    return str(caught.value)


@pytest.mark.parametrize("kind", [Q.F32, Q.BF16])
@pytest.mark.parametrize("architecture", KEYS)
def test_equals_the_same_weights_from_safetensors(architecture, kind, tmp_path):
    model = tiny_model(architecture)
    converted = open_checkpoint(write_gguf(model, tmp_path / "m.gguf", kind))
    original = StateDictCheckpoint(model.state_dict(), architecture, KEYS[architecture])
    assert converted.architecture == architecture
    assert converted.names() == sorted(original.names())
    for name in original.names():
        read = converted.read(name)
        assert read.dtype == (torch.float32 if kind == Q.F32 else torch.bfloat16)
        assert torch.equal(read.float(), original.read(name)), name
    assert torch.equal(logits(load_hf_model(converted)), logits(model))


def test_llamas_with_biases(tmp_path):
    model = tiny_model("LlamaForCausalLM", attention_bias=True, mlp_bias=True)
    converted = open_checkpoint(write_gguf(model, tmp_path / "m.gguf"))
    assert converted.config["attention_bias"] and converted.config["mlp_bias"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(converted.read(name), tensor), name


def test_the_config_is_put_back(tmp_path):
    model = tiny_model("Qwen3MoeForCausalLM", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    path = write_gguf(model, tmp_path / "m.gguf", meta={"qwen3moe.rope.freq_base": 5e5})
    config, wanted = open_checkpoint(path).config, json.loads(model.config.to_json_string(use_diff=False))
    special = ("architectures", "dtype", "bos_token_id", "eos_token_id", "pad_token_id")
    differing = {k for k in config.keys() | wanted.keys() if config.get(k) != wanted.get(k)}
    assert differing <= {*special, "transformers_version", "_name_or_path"}
    assert config["rms_norm_eps"] == 1e-5  # GGUF holds 9.99999974737875e-06
    assert config["norm_topk_prob"] is True and config["moe_intermediate_size"] == 32


def test_blocks_are_unpacked_and_rounded_once(tmp_path):
    model = tiny_model("Qwen3ForCausalLM")
    converted = open_checkpoint(write_gguf(model, tmp_path / "m.gguf", Q.Q8_0))
    name = "model.layers.0.mlp.up_proj.weight"
    original = model.state_dict()[name].numpy()
    unpacked = gguf.dequantize(gguf.quantize(original, Q.Q8_0), Q.Q8_0)
    assert torch.equal(converted.read(name), torch.from_numpy(unpacked).bfloat16())
    assert not np.array_equal(unpacked, original)
    assert converted.config["dtype"] == "bfloat16"


def test_tokenizer_template_and_ends_of_answers(tmp_path):
    converted = open_checkpoint(write_gguf(tiny_model("LlamaForCausalLM"), tmp_path / "m.gguf"))
    tokenizer = load_tokenizer(converted)
    assert tokenizer.chat_template == TEMPLATE
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "é 1"}], return_dict=True)["input_ids"]
    assert ids[0] == 1 and ids[-1] == 2 and len(ids) == 2 + len("é".encode()) + 2
    assert tokenizer.decode(ids) == "<|im_start|>é 1<|im_end|>"
    # this kind of vocabulary never joins digits, although a merge for them is there
    assert len(tokenizer("12")["input_ids"]) == 2 and len(tokenizer("ab")["input_ids"]) == 1
    assert eos_ids(converted) == {0, 2}
    assert json.loads((converted.directory / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def llama3_factors(factor: float, theta: float, head_dim: int) -> np.ndarray:
    """As llama.cpp's converter writes them, computed by transformers' own rope function."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    config = tiny_model("LlamaForCausalLM", rope_parameters=rope, head_dim=head_dim).config
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    return (plain / scaled).numpy().astype(np.float32)


def test_llama3_rope_is_recognised_by_its_factors(tmp_path):
    model = tiny_model("LlamaForCausalLM", head_dim=64)
    factors = llama3_factors(32.0, 5e5, 64)
    (between,) = np.flatnonzero((factors > 1.01) & (factors < 31.9))[:1]
    meta = {"llama.rope.freq_base": 5e5}
    path = write_gguf(model, tmp_path / "m.gguf", tensors={"rope_freqs.weight": factors}, meta=meta)
    assert open_checkpoint(path).config["rope_parameters"] == {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    factors[between] *= 1.1
    path = write_gguf(model, tmp_path / "other.gguf", tensors={"rope_freqs.weight": factors}, meta=meta)
    assert fails(path) == f"{path} holds rotary factors (rope_freqs.weight) that are not Llama 3's"


def test_rope_scaling(tmp_path):
    model = tiny_model("Qwen3ForCausalLM")
    meta = {
        "qwen3.rope.scaling.type": "yarn",
        "qwen3.rope.scaling.factor": 4.0,
        "qwen3.rope.scaling.original_context_length": 64,
    }
    rope = open_checkpoint(write_gguf(model, tmp_path / "m.gguf", meta=meta)).config["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 64)
    path = write_gguf(model, tmp_path / "o.gguf", meta={**meta, "qwen3.rope.scaling.type": "longrope"})
    assert fails(path) == f"{path} scales its rotary embedding by 'longrope', which is not handled"


def test_gemma_scales_by_head_dim_and_has_two_ropes(tmp_path):
    model = tiny_model("Gemma3ForCausalLM")
    meta = {"gemma3.rope.freq_base": 1e6, "gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    config = open_checkpoint(write_gguf(model, tmp_path / "m.gguf", meta=meta)).config
    assert config["query_pre_attn_scalar"] == 16 and config["sliding_window"] == 32
    assert config["rope_parameters"] == {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }


def test_files_that_are_no_model(tmp_path, own_cache):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"hello, this is text")
    assert fails(path).startswith(f"{path} is no GGUF file, or is cut short: ")
    whole = write_gguf(tiny_model("LlamaForCausalLM"), path).read_bytes()
    for size in (2000, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:size])
        assert fails(path).startswith(f"{path} is no GGUF file, or is cut short: "), size
    assert not any((own_cache / "checkpoints").glob("[!.]*"))


def test_models_that_are_not_handled(tmp_path):
    model = tiny_model("LlamaForCausalLM")
    path = write_gguf(model, tmp_path / "m.gguf", arch="gpt2")
    assert fails(path) == (
        f"{path} is of the GGUF architecture 'gpt2', which is not handled\n"
        "  hint: known GGUF architectures: gemma3, llama, qwen2, qwen3, qwen3moe"
    )
    path = write_gguf(model, tmp_path / "n.gguf", tensors={"blk.0.attn_sinks.weight": np.zeros(4, np.float32)})
    assert fails(path) == f"{path} holds tensors that are not understood: blk.0.attn_sinks.weight"
    path = write_gguf(model, tmp_path / "o.gguf", meta={"split.count": 3})
    assert fails(path).startswith(f"{path} is one of 3 parts\n")


def test_a_lost_tensor(tmp_path, monkeypatch):
    import gguf_writer

    whole = gguf_writer._tensors
    monkeypatch.setattr(
        gguf_writer, "_tensors", lambda *a: {k: v for k, v in whole(*a).items() if k != "blk.1.attn_v.weight"}
    )
    path = write_gguf(tiny_model("LlamaForCausalLM"), tmp_path / "m.gguf")
    assert fails(path).startswith(
        f"{path} lacks the tensor blk.1.attn_v.weight (model.layers.1.self_attn.v_proj.weight)\n"
    )


def test_large_models_are_sharded(tmp_path, monkeypatch, own_cache):
    monkeypatch.setattr("mpk_spec.weights.gguf_file.SHARD_BYTES", 100_000)
    model = tiny_model("LlamaForCausalLM")
    converted = open_checkpoint(write_gguf(model, tmp_path / "m.gguf", Q.BF16))
    shards = sorted(p.name for p in converted.directory.glob("*.safetensors"))
    assert len(shards) > 1 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    for name, tensor in model.state_dict().items():
        assert torch.equal(converted.read(name).float(), tensor)
