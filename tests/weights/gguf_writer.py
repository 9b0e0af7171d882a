"""Writes a transformers model as llama.cpp would: names, permutation, norm offsets, stacked experts, tokenizer."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np

ARCH = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe",
    "Gemma3ForCausalLM": "gemma3",
}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
Q = gguf.GGMLQuantizationType


def write_gguf(model, path: Path, kind=Q.F32, tensors=None, meta=None, arch=None) -> Path:
    """`kind`: how matrices are stored (vectors always F32, as llama.cpp does). `tensors`: more of them."""
    config = model.config
    arch = arch or ARCH[type(model).__name__]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if arch == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if arch == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    for key, value in (meta or {}).items():
        {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)](key, value)
    _add_tokenizer(writer, config.vocab_size)
    for name, values in {**_tensors(model, arch), **(tensors or {})}.items():
        stored = kind if values.ndim > 1 else Q.F32
        writer.add_tensor(name, gguf.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(model, arch: str) -> dict[str, np.ndarray]:
    number = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
    table = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    out = {}
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if name.endswith("experts.gate_up_proj"):
            gate, up = np.split(values, 2, axis=1)
            layer = re.search(r"layers\.(\d+)", name)[1]
            out[f"blk.{layer}.ffn_gate_exps.weight"] = np.ascontiguousarray(gate)
            out[f"blk.{layer}.ffn_up_exps.weight"] = np.ascontiguousarray(up)
            continue
        stem, _, suffix = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "weight")
        if arch == "llama" and (found := re.search(r"\.([qk])_proj$", stem)):
            heads = model.config.num_attention_heads if found[1] == "q" else model.config.num_key_value_heads
            split = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
            values = np.ascontiguousarray(split.swapaxes(1, 2)).reshape(values.shape)
        if arch == "gemma3" and stem.endswith("norm"):
            values = values + 1
        out[f"{table.get_name(stem)}.{suffix}"] = values
    return out


def _add_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    """Byte-level BPE: three special tokens, every byte, two merges, and fillers."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = special + list(bytes_to_unicode().values()) + ["12", "ab"]
    tokens += [f"filler{i}" for i in range(size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(special) + [1] * (size - len(special)))
    writer.add_token_scores([-float(i) for i in range(size)])
    writer.add_token_merges(["1 2", "a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
