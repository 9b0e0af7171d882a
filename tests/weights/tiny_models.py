"""Tiny models of every architecture that a spec covers."""

from __future__ import annotations

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
KEYS = {
    "LlamaForCausalLM": TINY,
    "Qwen2ForCausalLM": TINY,
    "Qwen3ForCausalLM": TINY,
    "Qwen3MoeForCausalLM": {
        **TINY,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "Gemma3ForCausalLM": {**TINY, "query_pre_attn_scalar": 16, "sliding_window": 32, "tie_word_embeddings": True},
}


def tiny_model(architecture: str, **changes):
    """A random transformers model in float32 whose every weight is a bf16 number, gains and biases included."""
    import torch
    import transformers

    from mpk_spec.weights.config import make_config

    torch.manual_seed(0)
    model = getattr(transformers, architecture)(make_config(architecture, {**KEYS[architecture], **changes})).eval()
    for parameter in model.parameters():
        parameter.data = (torch.randn_like(parameter) * 0.2).bfloat16().float()
    return model


def logits(model):
    import torch

    with torch.no_grad():
        return model(torch.arange(1, 40)[None]).logits
