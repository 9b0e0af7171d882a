"""What a checkpoint must hold: one message for each way in which it does not fit, and each rank gets its share."""

from __future__ import annotations

import pytest
import torch
from tiny_specs import child, model_of, planned, spec_of

from mpk_spec.errors import UserError
from mpk_spec.reference.state import load_ranks, unread_tensors
from mpk_spec.runtime.engine import Engine


class Tensors:
    """A checkpoint of the given tensors."""

    source = "tensors of a test"

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors

    def names(self):
        return list(self.tensors)

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def read(self, name, slices=None):
        return self.tensors[name] if slices is None else self.tensors[name][slices]


def tensors_of(name: str) -> dict[str, torch.Tensor]:
    checkpoint = model_of(spec_of(name))[1]
    return {n: checkpoint.read(n) for n in checkpoint.names()}


def refused(name: str, tensors: dict[str, torch.Tensor], **request) -> str:
    with pytest.raises(UserError) as caught:
        Engine(planned(spec_of(name), **request), Tensors(tensors))
    return str(caught.value)


def test_a_tensor_is_missing():
    tensors = tensors_of("qwen3")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    assert refused("qwen3", tensors) == (
        "tensors of a test: there is no tensor 'model.layers.0.mlp.up_proj.weight', "
        "which weight 'up_proj' of spec 'qwen3' is read from\n"
        "  hint: the checkpoint has 34 tensors, such as model.embed_tokens.weight, "
        "model.layers.0.input_layernorm.weight, model.layers.0.mlp.down_proj.weight"
    )


def test_a_tensor_of_a_later_layer_is_missing():
    tensors = tensors_of("qwen3")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    assert refused("qwen3", tensors).startswith(
        "tensors of a test: there is no tensor 'model.layers.2.mlp.up_proj.weight', which weight 'up_proj' "
    )


def test_an_expert_is_missing():
    tensors = tensors_of("qwen3_moe")
    del tensors["model.layers.1.mlp.experts.15.up_proj.weight"]
    assert "there is no tensor 'model.layers.1.mlp.experts.15.up_proj.weight'" in refused("qwen3_moe", tensors)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_tensor_of_another_shape(tp):
    tensors = tensors_of("qwen3")
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(96, 96)
    assert refused("qwen3", tensors, tp=tp) == (
        "tensors of a test: tensor 'model.layers.1.self_attn.k_proj.weight' is [96, 96], spec and config say [64, 96]"
    )


def test_a_tensor_that_nothing_reads():
    """Qwen2.5's biases show that Llama's spec would compute something else."""
    assert refused("llama3", tensors_of("qwen2_5") | tensors_of("llama3")) == (
        "tensors of a test: spec 'llama3' reads no weight from 9 tensors: model.layers.0.self_attn.k_proj.bias, "
        "model.layers.0.self_attn.q_proj.bias, model.layers.0.self_attn.v_proj.bias, ...\n"
        "  hint: another spec may fit; tensors that may stay unread belong in the spec's model.ignore"
    )


def test_tensors_that_may_stay_unread():
    """A published copy of a tied head; what `ignore` names, under any prefix."""
    tensors = tensors_of("qwen3")
    tied = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    assert unread_tensors(planned(spec_of("qwen3")), Tensors(tied)) == []
    gemma = tensors_of("gemma3")
    seeing = {f"language_model.{n}": t for n, t in gemma.items()} | {"vision_tower.a.weight": torch.zeros(1)}
    assert unread_tensors(planned(spec_of("gemma3")), Tensors(seeing)) == []
    assert unread_tensors(planned(spec_of("gemma3")), Tensors(seeing | {"towers": torch.zeros(1)})) == ["towers"]


def test_a_format_that_is_not_read_yet():
    spec = child(
        "qwen3", weights={"layer": {"prefix": "model.layers.{i}.", "up_proj": {"storage": {"format": "fp8_e4m3"}}}}
    )
    with pytest.raises(UserError) as caught:
        Engine(planned(spec), Tensors(tensors_of("qwen3")))
    assert str(caught.value) == (
        "weight 'up_proj' of spec 'child' is stored as fp8_e4m3, which the CPU reference cannot read yet"
    )


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_shares(tp):
    """Put side by side, the ranks' shares are the checkpoint's tensors; KV heads are held by several ranks."""
    tensors = tensors_of("qwen3")
    ranks = load_ranks(planned(spec_of("qwen3"), tp=tp), Tensors(tensors))
    parts = lambda name, layer=1: [r.weight(name, layer) for r in ranks]  # noqa: E731
    layer = "model.layers.1."
    assert torch.equal(torch.cat(parts("q_proj")), tensors[layer + "self_attn.q_proj.weight"])
    assert torch.equal(torch.cat(parts("down_proj"), 1), tensors[layer + "mlp.down_proj.weight"])
    whole = torch.cat(parts("lm_head", None))
    assert torch.equal(whole[:515], tensors["model.embed_tokens.weight"]) and not whole[515:].any()
    heads = torch.cat(parts("k_proj")[:: tp // 2])
    assert torch.equal(heads, tensors[layer + "self_attn.k_proj.weight"])
    assert all(torch.equal(p, parts("k_proj")[n // (tp // 2) * (tp // 2)]) for n, p in enumerate(parts("k_proj")))


def test_experts_are_stacked():
    tensors = tensors_of("qwen3_moe")
    ranks = load_ranks(planned(spec_of("qwen3_moe"), tp=2), Tensors(tensors))
    for rank in ranks:
        up = rank.weight("up_proj", 2)
        assert up.shape == (16, 64, 96)
        expert = tensors["model.layers.2.mlp.experts.7.up_proj.weight"]
        assert torch.equal(up[7], expert[rank.index * 64 : (rank.index + 1) * 64])


def test_ranks_of_padding_alone():
    """Nine rows over eight ranks: the last ranks have none."""
    spec = child("qwen3", {"vocab_size": 9, "tie_word_embeddings": False})
    checkpoint = model_of(spec)[1]
    ranks = load_ranks(planned(spec, tp=8), checkpoint)
    whole = torch.cat([r.weight("lm_head", None) for r in ranks])
    assert whole.shape == (16, 96) and torch.equal(whole[:9], checkpoint.read("lm_head.weight"))
    assert not whole[9:].any()


def test_progress_is_told():
    seen = []
    load_ranks(planned(spec_of("qwen3")), Tensors(tensors_of("qwen3")), lambda *a: seen.append(a))
    assert seen[-1] == ("loading weights", 36, 36) and [s[1] for s in seen] == list(range(1, 37))
