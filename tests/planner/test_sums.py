"""Sums over ranks go into the products that read them, where there is one that reads them first."""

from __future__ import annotations

import pytest
from tiny_specs import child, planned, spec_of


def ops_of(spec, tp: int = 2, template: int = 1, **request) -> dict[str, list[str]]:
    made = planned(spec, tp=tp, target="h100", context=256, **request)
    return {g.name: [n.op for n in g.nodes] for g in made.steps["decode"].templates[template].groups}


def test_a_layer_has_as_many_groups_on_two_ranks_as_on_one():
    assert list(ops_of(spec_of("qwen3"))) == list(ops_of(spec_of("qwen3"), tp=1))


def test_the_sum_at_a_layers_end_is_the_next_layers_and_the_heads():
    first, middle, head = (ops_of(spec_of("qwen3"), template=n) for n in (0, 1, 2))
    assert first["qkv"][:2] == ["embedding", "rmsnorm"]
    assert middle["qkv"][:3] == head["head"][:3] == ["all_reduce", "add", "rmsnorm"]
    made = planned(spec_of("qwen3"), tp=2, target="h100", context=256)
    groups = {g.name: g for g in made.steps["decode"].templates[1].groups}
    assert groups["qkv"].published == ("y",)
    assert groups["gate_up"].published == ("attention.out",)
    assert groups["qkv"].inputs[:2] == ("mlp.down", "attention.out")
    assert made.tensors["mlp.down"].inbox
    said = [n for n in made.notes if "added up by" in n]
    assert said == [
        "attention.o.all_reduce: added up by 'gate_up' as it loads its input",
        "mlp.down.all_reduce: added up by 'qkv' of the next layer and by 'head' as they load their input",
    ]


def test_a_sum_that_no_product_reads_first_stays():
    """Gemma normalises the sum before it adds the residual."""
    groups = ops_of(spec_of("gemma3"))
    assert groups["attention.o.all_reduce"] == ["all_reduce"]
    assert "all_reduce" not in groups["o_add"]


def test_a_layers_end_that_more_than_the_head_reads_stays():
    """Two norms after the layers: both would add it up, and the sum is published by neither."""
    twice = child("qwen3", layers={"h2": {"rmsnorm": "y", "weight": "final_norm", "eps": "eps"},
                                   "z": {"add": ["h", "h2"]}, "logits": {"linear": "z", "weight": "lm_head"}},
                  fusions={"head": {"of": ["z", "logits"]}})  # fmt: skip
    groups = ops_of(twice)
    assert groups["mlp.down.all_reduce"] == ["all_reduce", "add"]


@pytest.mark.parametrize("spec", ["qwen3", "llama3", "qwen2_5", "qwen3_moe", "gemma3"])
@pytest.mark.parametrize("tp", [2, 4, 8])
def test_such_plans_are_proved(spec, tp):
    planned(spec_of(spec), tp=tp, target="h100", context=256)
