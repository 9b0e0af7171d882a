"""Every planted defect is found at short and at long context, and a true model never is."""

from __future__ import annotations

import pytest
from tiny import LONG, SHORT, checkpoint_of, spec_of, verdict_of

from mpk_spec.errors import UserError
from mpk_spec.planner import plan
from mpk_spec.testing.defects import (
    DEFECTS,
    ChangedWeights,
    change_operators,
    defects_of,
    drop_operators,
    find_defect,
    map_nodes,
)

ALL = sorted(DEFECTS)


@pytest.mark.parametrize("context", [SHORT, LONG])
@pytest.mark.parametrize("spec", ["qwen3", "gemma3"])
@pytest.mark.parametrize("name", ALL)
def test_a_defect_is_found(name, spec, context):
    verdict = verdict_of(spec, context, find_defect(name))
    assert not verdict.passed
    assert verdict.kl_ratio > 1.5


@pytest.mark.parametrize("spec", ["llama3", "qwen2_5", "qwen3_moe"])
def test_every_defect_of_the_other_specs_is_found(spec):
    passed = [d.name for d in defects_of(spec_of(spec)) if verdict_of(spec, SHORT, d).passed]
    assert passed == []


@pytest.mark.parametrize("context", [SHORT, LONG])
@pytest.mark.parametrize("spec", ["qwen3", "llama3", "smollm2", "qwen2_5", "gemma3", "qwen3_moe"])
def test_a_true_model_passes(spec, context):
    verdict = verdict_of(spec, context)
    assert verdict.passed
    assert 0.05 < verdict.kl_ratio < 1.1  # our roundings are real ones, and no worse


def test_ranks_do_not_change_the_verdict():
    assert verdict_of("qwen3", SHORT, tp=2).passed


def test_what_can_go_wrong_depends_on_the_spec():
    assert [d.name for d in defects_of(spec_of("qwen3"))] == list(DEFECTS)
    assert set(DEFECTS) - {d.name for d in defects_of(spec_of("llama3"))} == {"no-qk-norm"}


def test_an_unknown_defect_is_named_with_a_near_one():
    with pytest.raises(UserError, match="there is no defect 'no-ropes'\n  hint: did you mean 'no-rope'"):
        find_defect("no-ropes")


def operators(made):
    return [n.name for g in made.steps["decode"].templates[0].groups for n in g.nodes]


def test_a_dropped_operator_leaves_its_operand():
    spec = drop_operators(spec_of("qwen3"), [("attention", "qn")])
    made = plan(spec, size="tiny", target="cpu")
    assert "attention.qn" not in operators(made)
    assert "attention.kn" in operators(made)
    rope = next(n for g in made.steps["decode"].templates[0].groups for n in g.nodes if n.name == "attention.qr")
    assert rope.inputs == ("attention.q",)


def test_a_changed_operator_leaves_the_spec_alone():
    spec = spec_of("qwen3")
    changed = change_operators(spec, lambda at, op: {"eps": 0.5} if at == ("mlp", "h") else {})
    assert (changed.blocks["mlp"]["h"].eps, spec.blocks["mlp"]["h"].eps) == (0.5, "eps")
    assert changed.blocks["attention"] == spec.blocks["attention"]


def test_nodes_are_mapped_in_every_step():
    from dataclasses import replace

    made = map_nodes(plan(spec_of("qwen3"), size="tiny", target="cpu"), lambda n: replace(n, width=7))
    widths = {n.width for s in made.steps.values() for t in s.templates for g in t.groups for n in g.nodes}
    assert widths == {7}


def test_changed_weights_change_slices_too():
    checkpoint = checkpoint_of("qwen3")
    name = "model.norm.weight"
    changed = ChangedWeights(checkpoint, {name: lambda t: t + 1})
    whole = checkpoint.read(name)
    assert changed.read(name, (slice(3, 5),)).tolist() == (whole + 1)[3:5].tolist()
    other = "model.layers.0.input_layernorm.weight"
    assert changed.read(other).tolist() == checkpoint.read(other).tolist()
