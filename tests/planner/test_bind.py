"""Specs bound to a config and a degree: sums over ranks, values per layer, names, shares."""

from __future__ import annotations

import pytest
from tiny_specs import SPECS, child, planned, spec_of

from mpk_spec.errors import SpecError
from mpk_spec.planner import size_config
from mpk_spec.planner.bind import bind
from mpk_spec.planner.model import Model


def bound(spec, tp: int = 1, **request) -> Model:
    return bind(spec, size_config(spec, "tiny"), **{"tp": tp, "batch": 2, "context": 128, **request})


@pytest.mark.parametrize("name", SPECS)
def test_sums_over_ranks(name):
    """Two in each layer, none on one rank; they come right before the value is needed whole."""
    spec = spec_of(name)
    layers = spec.sizes["tiny"].config["num_hidden_layers"]
    assert bound(spec).all_reduces == 0 and not bound(spec).notes
    model = bound(spec, tp=2)
    assert model.all_reduces == 2 * layers
    ops = next(s.ops for s in model.sections if s.layers)
    sums = [o for o in ops if o.op.op == "all_reduce"]
    assert [o.inputs[0] for o in sums] == ["attention.o", "mlp.mix" if name == "qwen3_moe" else "mlp.down"]
    for op in sums:
        assert model.types[op.inputs[0]].partial and not model.types[op.output].partial


def test_shares():
    model = bound(spec_of("qwen3"), tp=4)
    assert {n: model.dims[n] for n in ("heads", "kv_heads", "inter", "vocab", "hidden")} == {
        "heads": 2, "kv_heads": 1, "inter": 64, "vocab": 129, "hidden": 96,
    }  # fmt: skip
    k = model.weights["k_proj"]
    assert (k.shape, k.full_shape, k.split, k.parts, k.ranks_per_part) == ((32, 96), (64, 96), 0, 2, 2)
    head = model.weights["lm_head"]
    assert (head.shape, head.full_shape, head.pad, head.source) == (
        (129, 96),
        (515, 96),
        1,
        "model.embed_tokens.weight",
    )
    assert model.types["attention.q"].shape == (2, 32) and model.types["logits"].dtype == "f32"
    down = model.weights["down_proj"]
    assert (down.shape, down.split) == ((96, 64), 1)


def test_values_of_a_layer():
    model = bound(spec_of("gemma3"))
    ops = {o.name: o for s in model.sections for o in s.ops}
    attention = ops["attention.a"]
    assert attention.per_layer == {"window"}
    assert [attention.at(i)["window"] for i in range(8)] == [24, 24, 24, 24, 24, None, 24, 24]
    assert ops["attention.qr"].at(5)["parameters"]["rope_theta"] == 1e6
    assert ops["attention.qr"].at(0)["parameters"]["rope_theta"] == 1e4
    assert attention.values["scale"] == 24**-0.5


def test_carried_values():
    model = bound(spec_of("qwen3"))
    before, layers, head = model.sections
    assert before.ops[0].output == "y" and layers.ops[-1].output == "y" and head.ops[0].inputs == ("y",)
    assert layers.ops[0].inputs == ("y",) and layers.ops[-1].name == "mlp.out"
    assert model.origins == {"y": "mlp.out"} and model.carries == {"y"}


def test_built_in_names():
    """`context` and `batch` are known in values and operators."""
    spec = child("qwen3", blocks={"attention": {"a": {"window": "context // batch"}}})
    ops = {o.name: o for s in bound(spec).sections for o in s.ops}
    assert ops["attention.a"].values["window"] == 64


def test_all_problems_at_once():
    """Independent mistakes are told together, in the order of the file."""
    spec = child("qwen3", dims={"inter": "config.nothing", "heads": "0"})
    with pytest.raises(SpecError) as caught:
        planned(spec)
    said = [p.message for p in caught.value.problems]
    assert said == ["'config' has no 'nothing'", "a dim is a positive whole number, 'heads' is 0"]


def test_requirements():
    spec = spec_of("llama3")
    config = {**size_config(spec, "tiny"), "attention_bias": True, "hidden_act": "gelu"}
    with pytest.raises(SpecError) as caught:
        bind(spec, config, tp=1, batch=1, context=64)
    assert [p.message for p in caught.value.problems] == [
        'this config does not meet: config.hidden_act == "silu"',
        "this config does not meet: not config.attention_bias",
    ]


def test_degrees_told():
    """15 heads, 5 KV heads: the degrees that work are not only powers of two."""
    config = {"num_attention_heads": 15, "num_key_value_heads": 5, "intermediate_size": 480, "hidden_size": 960}
    spec = child("qwen3", config)
    assert planned(spec, tp=5).weights["k_proj"].shape == (32, 960)
    with pytest.raises(SpecError, match="15 heads do not divide over 2 ranks") as caught:
        planned(spec, tp=2)
    (problem,) = caught.value.problems
    assert problem.hint == "degrees that work: 1, 3, 5" or problem.hint == "degrees that work: 1, 5"
