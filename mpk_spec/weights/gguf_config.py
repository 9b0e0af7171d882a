"""A GGUF file's metadata as Hugging Face config keys.

GGUF states a model in llama.cpp's words and leaves out what llama.cpp knows by architecture; both are put back here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mpk_spec.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import numpy as np

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}

_KEYS = {  # config key: GGUF key after "<arch>."
    "max_position_embeddings": "context_length",
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "moe_intermediate_size": "expert_feed_forward_length",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "sliding_window": "attention.sliding_window",
}
_REQUIRED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "rms_norm_eps", "max_position_embeddings")
# What every published Llama 3.1 to 3.3 states; a file holds only the factors that follow from it.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def config_keys(meta: Mapping[str, Any], tensors: Mapping[str, Any], path: object) -> tuple[str, dict]:
    """(architecture, config.json keys) from metadata and from what tensors there are.

    `meta`: GGUF key to value; `tensors`: GGUF tensor name to its reader entry. UserError for what is not understood.
    """
    arch = meta.get("general.architecture")
    if arch not in ARCHITECTURES:
        hint = did_you_mean(str(arch), ARCHITECTURES, "GGUF architectures")
        raise UserError(f"{path} is of the GGUF architecture '{arch}', which is not handled", hint)
    keys = {key: _decimal(meta[f"{arch}.{name}"]) for key, name in _KEYS.items() if f"{arch}.{name}" in meta}
    lost = [f"{arch}.{_KEYS[key]}" for key in _REQUIRED if key not in keys]
    if lost or "token_embd.weight" not in tensors:
        raise UserError(f"{path} is no complete model: it lacks {', '.join(lost or ['token_embd.weight'])}")
    heads = keys["num_attention_heads"]
    keys.setdefault("num_key_value_heads", heads)
    keys.setdefault("head_dim", meta.get(f"{arch}.rope.dimension_count", keys["hidden_size"] // heads))
    keys["vocab_size"] = int(tensors["token_embd.weight"].shape[1])
    keys["tie_word_embeddings"] = "output.weight" not in tensors
    if arch in ("llama", "qwen3", "qwen3moe"):
        keys["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if arch == "llama":
        keys["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    if arch == "qwen3moe":  # llama.cpp's graph always renormalises, and every layer has experts
        keys |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    rope = _rope(meta, arch, path)
    if "rope_freqs.weight" in tensors:
        rope = _llama3_rope(rope["rope_theta"], keys["head_dim"], tensors["rope_freqs.weight"].data, path)
    keys["rope_parameters"] = rope
    if arch == "gemma3":
        keys |= _gemma3(meta, keys)
    return ARCHITECTURES[arch], keys | _token_ids(meta)


def _decimal(value: Any) -> Any:
    """GGUF floats are 32 bits wide: 1e-5 is stored as 9.99999974737875e-06. The shortest decimal is what was meant."""
    import numpy as np

    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rope(meta: Mapping[str, Any], arch: str, path: object) -> dict:
    rope = {"rope_type": "default", "rope_theta": _decimal(meta.get(f"{arch}.rope.freq_base", 10000.0))}
    scaling = meta.get(f"{arch}.rope.scaling.type", "none")
    factor = _decimal(meta.get(f"{arch}.rope.scaling.factor", 1.0))
    if scaling == "none" or factor in (0.0, 1.0):
        return rope
    if scaling == "linear":
        return {**rope, "rope_type": "linear", "factor": factor}
    if scaling == "yarn":
        length = meta.get(f"{arch}.rope.scaling.original_context_length")
        return {**rope, "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
    raise UserError(f"{path} scales its rotary embedding by '{scaling}', which is not handled")


def _llama3_rope(theta: float, head_dim: int, stored: np.ndarray, path: object) -> dict:
    """Llama 3.1's rope_type "llama3", recognised by the factors that it gives each frequency."""
    factor = _decimal(float(stored.max()))
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    for i, seen in enumerate(stored.tolist()):
        turns = _LLAMA3["original_max_position_embeddings"] / (2 * math.pi * theta ** (2 * i / head_dim))
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        if abs(seen * ((1 - smooth) / factor + smooth) - 1) > 1e-3:
            raise UserError(f"{path} holds rotary factors (rope_freqs.weight) that are not Llama 3's")
    return {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **_LLAMA3}


def _gemma3(meta: Mapping[str, Any], keys: dict) -> dict:
    # llama.cpp scales scores by head_dim except in the 27B, which it knows by its 62 layers
    big = keys["num_hidden_layers"] == 62
    local = _decimal(meta.get("gemma3.rope.freq_base_swa", 10000.0))
    return {
        "query_pre_attn_scalar": keys["hidden_size"] // keys["num_attention_heads"] if big else keys["head_dim"],
        "rope_parameters": {
            "full_attention": keys["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


def _token_ids(meta: Mapping[str, Any]) -> dict:
    """Ids of special tokens; `eos_token_id` is a list where several end an answer (end of text, turn, message)."""
    read = {name: meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom", "padding")}
    ends = list(dict.fromkeys(i for i in (read["eos"], read["eot"], read["eom"]) if i is not None))
    return {
        "bos_token_id": read["bos"],
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": read["padding"],
    }
