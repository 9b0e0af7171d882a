from __future__ import annotations

import pytest
import torch
from tiny_models import KEYS, logits, tiny_model

from mpk_spec.errors import UserError
from mpk_spec.runtime.random_model import random_checkpoint
from mpk_spec.schema import load_spec
from mpk_spec.weights import (
    RandomCheckpoint,
    TensorSpec,
    eos_ids,
    load_hf_model,
    load_tokenizer,
    on_device,
    stream_hf_model,
)

RECORDED = [-0.05168456956744194, -0.02040252648293972, 0.04427795484662056, -0.07024993747472763]


def one(kind, shape=(400, 300), offset=0.0, seed=1, config=None, dtype="f32"):
    spec = TensorSpec("w", shape, kind, offset)
    return RandomCheckpoint(seed, "LlamaForCausalLM", config or KEYS["LlamaForCausalLM"], [spec], dtype)


def specs_of(model, tensors=None):
    kinds = {"embed_tokens": "embedding", "q_norm": "qk_gain", "k_norm": "qk_gain", "norm": "gain"}
    for name, tensor in (tensors or model.state_dict()).items():
        yield TensorSpec(name, tuple(tensor.shape), next((k for part, k in kinds.items() if part in name), "linear"))


def test_values_never_change():
    """Recorded: a run on another day or machine must draw the same model."""
    values = one("linear").read("w").flatten()[:4]
    assert values.tolist() == RECORDED


def test_slices_are_parts_of_the_whole():
    checkpoint = RandomCheckpoint(5, "LlamaForCausalLM", {}, [TensorSpec("s", (7, 300, 50), "linear")])
    whole = checkpoint.read("s")
    assert whole.dtype == torch.bfloat16 and whole.shape == (7, 300, 50) == checkpoint.shape("s")
    assert torch.equal(checkpoint.read("s", (slice(2, 5),)), whole[2:5])
    assert torch.equal(checkpoint.read("s", (slice(6, 7), slice(10, 290), slice(3, 44))), whole[6:7, 10:290, 3:44])


def test_values_do_not_depend_on_chunks(monkeypatch):
    whole = one("linear").read("w")
    monkeypatch.setattr("mpk_spec.weights.random_weights._CHUNK", {"cpu": 1000})
    assert torch.equal(one("linear").read("w"), whole)


def test_seed_and_name_decide():
    tensors = [TensorSpec(name, (40, 30), "linear") for name in "ab"]
    first, second = (RandomCheckpoint(seed, "LlamaForCausalLM", {}, tensors) for seed in (1, 2))
    assert not torch.equal(first.read("a"), first.read("b"))
    assert not torch.equal(first.read("a"), second.read("a"))
    swapped = RandomCheckpoint(1, "LlamaForCausalLM", {}, reversed(tensors))
    swapped.read("b")
    assert torch.equal(swapped.read("a"), first.read("a"))


@pytest.mark.parametrize(("kind", "std"), [("linear", 300**-0.5), ("qk_linear", 1.8 * 300**-0.5), ("embedding", 1.0)])
def test_spread_of_matrices(kind, std):
    values = one(kind).read("w")
    assert values.std().item() == pytest.approx(std, rel=0.02)
    assert abs(values.mean().item()) < 0.02 * std
    # neighbours, in a row or in a column, say nothing about one another
    for a, b in ((values[:, 1:], values[:, :-1]), (values[1:], values[:-1])):
        assert abs((a * b).mean().item()) < 0.02 * std**2


def test_gains_spread_and_are_never_zero():
    gain, qk = one("gain", (5000,)).read("w"), one("qk_gain", (5000,)).read("w")
    assert gain.min() >= 0.5 and gain.max() <= 1.5 and gain.std().item() == pytest.approx(0.29, rel=0.05)
    assert torch.allclose(qk, gain * 1.8)
    assert torch.allclose(one("gain", (5000,), offset=1.0).read("w"), gain - 1)


def test_biases_are_not_zero():
    assert one("bias", (5000,)).read("w").std().item() == pytest.approx(0.5, rel=0.05)


def test_a_tied_table_gives_a_head_of_moderate_logits():
    config = {**KEYS["LlamaForCausalLM"], "tie_word_embeddings": True}
    assert one("embedding", (500, 64), config=config).read("w").std().item() == pytest.approx(0.5, rel=0.03)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"])
def test_as_a_transformers_model(architecture):
    from mpk_spec.weights import StateDictCheckpoint

    published = StateDictCheckpoint(tiny_model(architecture).state_dict(), architecture, KEYS[architecture])
    tensors = {name: published.read(name) for name in published.names()}
    checkpoint = RandomCheckpoint(3, architecture, KEYS[architecture], specs_of(None, tensors))
    model = load_hf_model(checkpoint)
    assert not model.training and next(model.parameters()).dtype == torch.float32
    name = "model.layers.1.self_attn.o_proj.weight"
    assert torch.equal(model.state_dict()[name], checkpoint.read(name).float())
    answer = logits(model)
    assert answer.isfinite().all() and 0.3 < answer.std().item() < 10
    if architecture == "Qwen3MoeForCausalLM":
        fused = model.state_dict()["model.layers.0.mlp.experts.gate_up_proj"]
        part = checkpoint.read("model.layers.0.mlp.experts.2.up_proj.weight").float()
        assert torch.equal(fused[2, 32:], part)


def test_missing_weights_are_an_error():
    specs = [s for s in specs_of(tiny_model("LlamaForCausalLM")) if "layers.1.mlp" not in s.name]
    with pytest.raises(UserError) as caught:
        load_hf_model(RandomCheckpoint(0, "LlamaForCausalLM", KEYS["LlamaForCausalLM"], specs))
    assert str(caught.value) == (
        "random:0 lacks 3 weights of LlamaForCausalLM: model.layers.1.mlp.down_proj.weight, "
        "model.layers.1.mlp.gate_proj.weight, model.layers.1.mlp.up_proj.weight"
    )


def test_weights_of_another_shape_are_an_error():
    specs = {s.name: s for s in specs_of(tiny_model("LlamaForCausalLM"))}
    specs["model.norm.weight"] = TensorSpec("model.norm.weight", (9,), "gain")
    with pytest.raises(UserError) as caught:
        load_hf_model(RandomCheckpoint(0, "LlamaForCausalLM", KEYS["LlamaForCausalLM"], specs.values()))
    assert str(caught.value) == "random:0 does not fit its config: model.norm.weight is [9], not [64]"


def test_no_text_without_a_tokenizer():
    checkpoint = one("linear")
    assert checkpoint.directory is None and checkpoint.source == "random:1"
    assert eos_ids(checkpoint) == {checkpoint.config["eos_token_id"]}
    with pytest.raises(UserError, match="random:1 has no tokenizer"):
        load_tokenizer(checkpoint)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_draws_the_same_bits():
    for kind in ("linear", "qk_gain", "bias", "embedding"):
        for dtype in ("f32", "bf16"):
            spec = [TensorSpec("w", (700, 300), kind, 1.0 if kind == "qk_gain" else 0.0)]
            here = RandomCheckpoint(1, "LlamaForCausalLM", {}, spec, dtype).read("w")
            there = RandomCheckpoint(1, "LlamaForCausalLM", {}, spec, dtype, device="cuda").read("w")
            assert torch.equal(here, there.cpu())


@pytest.mark.parametrize("name", ["qwen3", "llama3", "qwen2_5", "gemma3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_streamed_from_its_checkpoint_computes_the_same(name, dtype):
    checkpoint = random_checkpoint(load_spec(name), "tiny", 0)
    read = []
    original = checkpoint.read
    checkpoint.read = lambda tensor: (read.append(tensor), original(tensor))[1]
    ids = torch.tensor([[5, 3, 500, 7], [9, 9, 1, 0]])
    whole = load_hf_model(checkpoint, dtype)
    read.clear()
    streamed = stream_hf_model(checkpoint, dtype, "cpu")
    assert not read
    with torch.inference_mode():
        assert torch.equal(streamed(input_ids=ids).logits, whole(input_ids=ids).logits)
    assert set(read) == set(checkpoint.names())
    assert all(parameter.device.type == "meta" for parameter in streamed.parameters())


def test_stacked_experts_cannot_be_streamed():
    checkpoint = random_checkpoint(load_spec("qwen3_moe"), "tiny", 0)
    with pytest.raises(UserError, match="Qwen3MoeForCausalLM cannot be run layer by layer: transformers keeps"):
        stream_hf_model(checkpoint, "float32", "cpu")


def test_drawing_elsewhere_leaves_the_checkpoint_as_it_was():
    checkpoint = one("linear")
    there = on_device(checkpoint, "meta")
    assert there.read("w").device.type == "meta"
    assert checkpoint.read("w").device.type == "cpu"
    assert there.source == checkpoint.source and there.names() == checkpoint.names()
