"""`extends`: maps merge, null deletes, lists replace, identity stays behind, and positions point to who wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpk_spec.errors import SpecError
from mpk_spec.schema import load_spec

SMALL = Path(__file__).parents[1] / "bad_specs" / "base" / "small.yaml"
HEAD = f"spec: v1\nextends: {SMALL}\nname: child\nmodel: {{architectures: [LlamaForCausalLM]}}\n"


@pytest.fixture(autouse=True)
def _beside_the_parent(monkeypatch):
    monkeypatch.chdir(SMALL.parent)  # messages name files relative to the working directory


def child(text: str, head: str = HEAD):
    return load_spec("child.yaml", text=head + text)


def test_a_field_is_added_and_another_kept():
    q = child(
        "weights: {layer: {q_bias: {from: self_attn.q_proj.bias, shape: [heads * head_dim]}}}\n"
        "blocks: {attention: {q: {bias: q_bias}}}\n"
    ).blocks["attention"]["q"]
    assert (q.input, q.weight, q.bias, q.heads) == ("h", "q_proj", "q_bias", "heads")


def test_an_operand_is_replaced_and_parameters_kept():
    spec = child("blocks: {attention: {n: {rmsnorm: q, weight: final_norm, eps: eps}, qr: {rope: n}}}\n")
    assert (spec.blocks["attention"]["qr"].input, spec.blocks["attention"]["qr"].parameters) == ("n", "rope")


def test_a_bare_name_is_a_spec_that_comes_with_mpk_spec(tmp_path):
    file = tmp_path / "mine.yaml"
    rest = "name: mine\nmodel: {architectures: [LlamaForCausalLM]}\n"
    file.write_text(f"spec: v1\nextends: llama3\n{rest}")
    assert load_spec(file).blocks == load_spec("llama3").blocks
    for name, message, hint in (
        ("lama3", "there is no spec named 'lama3'", "did you mean 'llama3'?"),
        ("llama3.yaml", "there is no file", "'extends: llama3' means the spec that comes with mpk-spec"),
    ):
        file.write_text(f"spec: v1\nextends: {name}\n{rest}")
        with pytest.raises(SpecError) as caught:
            load_spec(file)
        (problem,) = caught.value.problems
        assert problem.message.startswith(message) and problem.hint == hint
        assert (problem.position.line, problem.position.column) == (2, 10)


def test_another_operator_replaces_the_whole_entry():
    spec = child("blocks: {mlp: {act: {add: [gate, up]}}}\n")
    assert spec.blocks["mlp"]["act"].op == "add"
    assert "fn" not in spec.resolved_yaml()


def test_null_deletes_and_lists_replace():
    spec = child(
        "values: {tied: null}\nweights: {lm_head: {tie: null}}\nfusions: {head: null, o_add: {of: [attention.o]}}\n"
    )
    assert "tied" not in spec.values
    assert spec.weights["lm_head"].tie is None
    assert "head" not in spec.fusions
    assert spec.fusions["o_add"].of == ["attention.o"]


def test_blocks_are_put_in_order():
    spec = child("blocks: {attention: {extra: {add: [x, o]}, out: {add: [x, extra]}}}\n")
    order = list(spec.blocks["attention"])
    assert order.index("o") < order.index("extra") < order.index("out")
    assert order[:3] == ["h", "q", "k"]  # otherwise as written


def test_identity_is_not_inherited():
    spec = child("")
    assert spec.name == "child"
    assert spec.sizes == {}
    assert spec.model.requires == []


def test_rules_for_a_target_stay_behind_and_own_ones_come_last(tmp_path):
    parent = tmp_path / "parent.yaml"
    parent.write_text(
        HEAD.replace("child", "parent") + "schedule:\n"
        "  - set: {head: {stages: 2}}\n"
        "  - {when: {target: h100}, set: {head: {stages: 3}}}\n"
        "  - {when: {batch: [1, 2]}, set: {head: {stages: 4}}}\n"
    )
    head = HEAD.replace(str(SMALL), str(parent))
    assert [r.set["head"].stages for r in child("", head).schedule] == [2, 4]
    spec = child("schedule: [{when: {target: a100}, set: {head: {stages: 5}}}]\n", head)
    assert [(r.set["head"].stages, r.pinned) for r in spec.schedule] == [(2, False), (4, False), (5, True)]
    assert spec.position("schedule", 0, "set", "head", "stages").file == str(parent)
    assert spec.position("schedule", 2, "set", "head", "stages").file == "child.yaml"
    assert child("schedule: null\n", head).schedule == []


def test_positions_point_to_the_file_that_wrote_the_value():
    spec = child("blocks: {attention: {a: {scale: 1 / heads}}}\n")
    assert str(spec.position("blocks", "attention", "a", "scale")) == "child.yaml:5:33"
    assert spec.position("blocks", "attention", "a", "cache").file == "small.yaml"
    assert spec.position("weights", "q_proj", "shape", 1).file == "small.yaml"


def test_the_child_is_named_where_it_deletes_what_is_not_there():
    with pytest.raises(SpecError) as refused:
        child("values: {epsilon: null}\n")
    assert str(refused.value) == (
        "child.yaml:5:10: 'epsilon' cannot be deleted: small.yaml has none\n"
        "  | values: {epsilon: null}\n"
        "  |          ^^^^^^^\n"
        "  hint: did you mean 'eps'?"
    )


def test_grandchildren(tmp_path):
    (tmp_path / "middle.yaml").write_text(HEAD + "values: {eps: 1e-5}\n")
    spec = child("values: {scale: 0.5}\n", HEAD.replace(str(SMALL), str(tmp_path / "middle.yaml")))
    assert (spec.values["eps"].text, spec.values["scale"].text, spec.values["tied"].text) == (
        "1e-05",
        "0.5",
        "config.tie_word_embeddings",
    )
