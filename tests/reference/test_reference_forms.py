"""Specs of unusual form: the same models written in other ways must compute the same, by proved plans."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import yaml
from tiny_specs import (
    WIDE,
    child,
    error,
    exact_error,
    executor_of,
    forced,
    model_of,
    planned,
    spec_of,
    tokens,
    truth,
)

from mpk_spec.ops.base import without_rounding
from mpk_spec.paths import specs_dir
from mpk_spec.reference.executor import Executor
from mpk_spec.runtime.engine import Engine
from mpk_spec.schema import Spec, load_spec

TOLERANCE = 1e-4


def right(spec: Spec, **request) -> bool:
    """Whether transformers' numbers come out, and the same bits in a random order of tasks."""
    made = planned(spec, chunk=16, **request)
    ids = tokens(20)
    straight, shuffled = (forced(executor_of(spec, made), ids, 18, shuffle=s) for s in (None, 3))
    return exact_error(spec, made) < TOLERANCE and torch.equal(straight, shuffled)


def written(base: str, **sections) -> Spec:
    """A spec that extends nothing, with the blocks' weights, dims and values of `base`."""
    parent = spec_of(base)
    whole = yaml.safe_load(parent.resolved_yaml())
    whole = {**whole, "schedule": [], "checks": {}, "fusions": {}, **sections}
    return load_spec(specs_dir() / "other.yaml", text=yaml.safe_dump(whole, sort_keys=False))


ATTENTION = {
    "h": {"rmsnorm": "x", "weight": "attn_norm", "eps": "eps"},
    "q": {"linear": "h", "weight": "q_proj", "heads": "heads"},
    "k": {"linear": "h", "weight": "k_proj", "heads": "kv_heads"},
    "v": {"linear": "h", "weight": "v_proj", "heads": "kv_heads"},
    "qr": {"rope": "q", "parameters": "rope"},
    "kr": {"rope": "k", "parameters": "rope"},
    "cache": {"kv_append": ["kr", "v"], "state": "kv"},
    "a": {"attention": "qr", "cache": "cache", "scale": "scale"},
    "o": {"linear": "a", "weight": "o_proj"},
}
MLP = {
    "g": {"rmsnorm": "mid", "weight": "mlp_norm", "eps": "eps"},
    "gate": {"linear": "g", "weight": "gate_proj"},
    "up": {"linear": "g", "weight": "up_proj"},
    "act": {"gated_act": ["gate", "up"], "fn": "silu"},
    "down": {"linear": "act", "weight": "down_proj"},
}
ONE_BLOCK = {**ATTENTION, "mid": {"add": ["x", "o"]}, **MLP, "out": {"add": ["mid", "down"]}}
LAYERS = {
    "x": {"embedding": "token_ids", "weight": "embed"},
    "y": {"repeat": "x", "over": "layers", "blocks": ["all"]},
    "h": {"rmsnorm": "y", "weight": "final_norm", "eps": "eps"},
    "scores": {"linear": "h", "weight": "lm_head"},
    "token": {"sample": "scores"},
}


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("target", ["cpu", "h100"])
def test_one_block(tp, target):
    """Attention and MLP in one block; logits and the sampled token have other names."""
    fusions = {"gate_up": {"of": ["all.g", "all.gate", "all.up", "all.act"]}, "last": {"of": ["all.down", "all.out"]}}
    spec = written(
        "llama3", blocks={"all": ONE_BLOCK}, layers=LAYERS, tensors={"scores": {"dtype": "f32"}}, fusions=fusions
    )
    made = planned(spec, tp=tp, target=target)
    assert made.feeds == {"token_ids": "token"}
    assert_same(spec, made)


def assert_same(spec: Spec, made) -> None:
    """As `right`, for logits of any name, through the backend."""
    ids = tokens(30)
    engine = Engine(replace(made, target="cpu"), model_of(spec)[1])
    with without_rounding():
        assert error(engine.logits(ids), truth(spec, ids)) < TOLERANCE
    rounded = engine.logits(ids)
    (said,) = engine.stream(ids, max_new_tokens=1)
    assert said == rounded[-1].argmax()


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("target", ["cpu", "h100"])
def test_no_repeat(tp, target):
    """One layer written out under `layers`."""
    config = {**spec_of("llama3").sizes["tiny"].config, "num_hidden_layers": 1}
    resolved = yaml.safe_load(spec_of("llama3").resolved_yaml())
    layer = dict(resolved["weights"].pop("layer"))
    prefix = layer.pop("prefix").replace("{i}", "0")
    weights = {**resolved["weights"], **{n: {**w, "from": prefix + w["from"]} for n, w in layer.items()}}
    body = {**ATTENTION, "mid": {"add": ["x", "o"]}, **MLP, "y": {"add": ["mid", "down"]}}
    rest = {k: v for k, v in LAYERS.items() if k not in ("x", "y", "h")}
    layers = {"x": LAYERS["x"], **body, "n": {"rmsnorm": "y", "weight": "final_norm", "eps": "eps"}, **rest}
    layers["scores"] = {"linear": "n", "weight": "lm_head"}
    spec = written(
        "llama3", blocks={}, layers=layers, weights=weights, sizes={"tiny": config},
        tensors={"scores": {"dtype": "f32"}},
        state={"kv": {"kind": "kv_cache", "shape": ["kv_heads", "head_dim"], "per": ["context"]}},
        fusions={"first": {"of": ["x", "h", "q", "k", "v"]}, "second": {"of": ["down", "y"]}},
    )  # fmt: skip
    assert_same(spec, planned(spec, tp=tp, target=target))


def biased(name: str, shape: list[str]) -> dict:
    return {"from": name, "shape": shape}


BIASES = {
    "weights": {
        "layer": {
            "prefix": "model.layers.{i}.",
            "bq": biased("self_attn.q_proj.bias", ["heads * head_dim"]),
            "bk": biased("self_attn.k_proj.bias", ["kv_heads * head_dim"]),
            "bv": biased("self_attn.v_proj.bias", ["kv_heads * head_dim"]),
            "bo": biased("self_attn.o_proj.bias", ["hidden"]),
            "bg": biased("mlp.gate_proj.bias", ["inter"]),
            "bu": biased("mlp.up_proj.bias", ["inter"]),
            "bd": biased("mlp.down_proj.bias", ["hidden"]),
        }
    },
    "blocks": {
        "attention": {"q": {"bias": "bq"}, "k": {"bias": "bk"}, "v": {"bias": "bv"}, "o": {"bias": "bo"}},
        "mlp": {"gate": {"bias": "bg"}, "up": {"bias": "bu"}, "down": {"bias": "bd"}},
    },
}


def test_biases_of_sums_are_added_once():
    """Of products split over ranks, over K, and over both."""
    size = {"attention_bias": True, "mlp_bias": True}
    split = [{"set": {"o_add": {"split_k": 2}, "down_add": {"split_k": 3}}}]
    assert right(child("llama3", size, **BIASES), tp=4)
    assert right(child("llama3", {**size, **WIDE}, **BIASES, schedule=split))
    wider = {**size, "head_dim": 256, "intermediate_size": 3072}
    assert right(child("llama3", wider, **BIASES, schedule=split), tp=2, target="h100")


@pytest.mark.parametrize("tp", [1, 2])
def test_a_sum_over_ranks_by_hand(tp):
    blocks = {"attention": {"s": {"all_reduce": "o"}, "out": {"add": ["x", "s"]}}}
    spec = child("llama3", blocks=blocks)
    assert right(spec, tp=tp)
    derived = planned(spec_of("llama3"), tp=tp).all_reduces
    assert planned(spec, tp=tp).all_reduces == derived == (6 if tp == 2 else 0)
    assert right(
        child("llama3", blocks=blocks, fusions={"o_add": {"of": [f"attention.{n}" for n in ("o", "s", "out")]}}), tp=tp
    )


def test_operators_and_weights_left_out():
    """One file for Qwen3 and Llama: the norms of queries and keys exist for one of them."""
    norms = 'config.model_type == "qwen3"'
    changes = {
        "weights": {"layer": {"q_norm": {"when": norms}, "k_norm": {"when": norms}}},
        "blocks": {"attention": {"qn": {"when": norms}, "kn": {"when": norms}}},
    }
    both = child("qwen3", **changes)
    assert right(both, tp=2)
    config = spec_of("llama3").sizes["tiny"].config
    text = yaml.safe_dump(
        {
            "spec": "v1", "extends": "qwen3.yaml", "name": "both", "sizes": {"tiny": config},
            "model": {"architectures": ["LlamaForCausalLM"]}, **changes,
        }
    )  # fmt: skip
    llama = load_spec(specs_dir() / "child.yaml", text=text)
    assert right(llama, tp=2, target="h100")
    assert "q_norm" not in planned(llama).weights and "q_norm" in planned(both).weights


def test_the_last_operator_of_a_layer_left_out():
    """Then what comes before it is the layer's result; nothing else is renamed."""
    spec = child(
        "llama3",
        blocks={"mlp": {"sum": {"add": ["x", "down"]}, "out": {"add": ["sum", "sum"], "when": "hidden < 0"}}},
        fusions={"down_add": {"of": ["mlp.down", "mlp.sum"]}},
    )
    assert right(spec, tp=2)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("layers", [3, 4])
@pytest.mark.parametrize(
    "rule", [{"inter": "replicate"}, {"heads": "replicate", "kv_heads": "replicate", "vocab": "replicate"}]
)
def test_one_sum_over_ranks_in_a_layer(rule, layers, tp):
    """Its inbox alternates: a fast rank must not write the next layer's part over one that is still read."""
    spec = child("qwen3", {"num_hidden_layers": layers}, shard={"tp": rule})
    assert right(spec, tp=tp)
    inboxes = [n for n, t in planned(spec, tp=tp).tensors.items() if t.inbox and n.startswith(("mlp", "attention"))]
    assert len(inboxes) == 3


def test_padded_shares():
    assert right(child("qwen3", {"intermediate_size": 250}, shard={"tp": {"inter": "split_padded"}}), tp=4)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("target", ["cpu", "h100"])
def test_a_group_that_reads_and_writes_the_residual(target, layers, tp):
    """One block whose products all read its input, as in parallel layers: the residual has two buffers in turn."""
    block = {
        **ATTENTION,
        "gate": {"linear": "h", "weight": "gate_proj"},
        "up": {"linear": "h", "weight": "up_proj"},
        "act": {"gated_act": ["gate", "up"], "fn": "silu"},
        "down": {"linear": "act", "weight": "down_proj"},
        "out": {"add": ["x", "o", "down"]},
    }
    norm = {"layer": {"prefix": "model.layers.{i}.", "mlp_norm": None}}
    changes = {
        "blocks": {"attention": None, "mlp": None, "all": block},
        "layers": {"y": {"blocks": ["all"]}},
        "weights": norm,
        "tensors": {"attention.o": None, "mlp.down": None},
        "fusions": {
            **dict.fromkeys(spec_of("llama3").fusions),
            "head": {"of": ["h", "logits"]},
            "last": {"of": ["all.down", "all.out"]},
        },
    }
    spec = child("llama3", {"num_hidden_layers": layers}, **changes)
    made = planned(spec, tp=tp, target=target)
    ids = tokens(12)
    tensors = {n: t for n, t in model_of(spec)[0].state_dict().items() if "post_attention" not in n}
    straight, shuffled = (Executor(made, StateDictLike(tensors)) for _ in range(2))
    with without_rounding():
        assert error(forced(straight, ids, 10), parallel(model_of(spec)[0], ids)) < TOLERANCE
        assert torch.equal(forced(shuffled, ids, 10, shuffle=5), forced(straight, ids, 10))


class StateDictLike:
    source = "tensors of a test"

    def __init__(self, tensors):
        self.tensors = tensors

    def names(self):
        return list(self.tensors)

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def read(self, name, slices=None):
        return self.tensors[name] if slices is None else self.tensors[name][slices]


def parallel(model, ids: list[int]) -> torch.Tensor:
    """Llama with attention and MLP side by side, of transformers' own modules."""
    inner = model.model
    with torch.no_grad():
        x = inner.embed_tokens(torch.tensor([ids]))
        turns = inner.rotary_emb(x, torch.arange(len(ids))[None])
        mask = torch.full((1, 1, len(ids), len(ids)), float("-inf")).triu(1)
        for layer in inner.layers:
            h = layer.input_layernorm(x)
            attended, *_ = layer.self_attn(h, position_embeddings=turns, attention_mask=mask)
            x = x + attended + layer.mlp(h)
        return model.lm_head(inner.norm(x))[0]
