"""Operators to groups: order, names, what is published, what `--explain` tells."""

from __future__ import annotations

import pytest
from tiny_specs import child, planned, spec_of

from mpk_spec.errors import SpecError
from mpk_spec.ops import all_ops

GPU = {"target": "h100", "context": 256}


def layer_groups(spec, **request):
    return planned(spec, **{**GPU, **request}).steps["decode"].templates[1].groups


def test_groups_of_a_layer():
    assert [g.name for g in layer_groups(spec_of("qwen3"))] == ["qkv", "attend", "o_add", "gate_up", "down_add"]
    assert [g.name for g in layer_groups(spec_of("qwen3_moe"))] == [
        "qkv", "attend", "o_add", "router", "mlp.route", "gate_up", "down_add",
    ]  # fmt: skip


def test_groups_are_cut_where_ranks_add_their_parts():
    groups = {g.name: [n.op for n in g.nodes] for g in layer_groups(spec_of("qwen3"), tp=2)}
    assert groups["o_add"] == ["attention_merge", "linear"]
    assert groups["gate_up"][:3] == groups["qkv"][:3] == ["all_reduce", "add", "rmsnorm"]
    gemma = {g.name: [n.op for n in g.nodes] for g in layer_groups(spec_of("gemma3"), tp=2)}
    assert gemma["attention.o"] == ["attention_merge", "linear"]
    assert gemma["attention.o.all_reduce"] == ["all_reduce"] and gemma["o_add"] == ["rmsnorm", "add"]


def test_a_merge_is_computed_by_its_one_reader():
    """Or by a group of its own, where it has several."""
    alone = {g.name: [n.op for n in g.nodes] for g in layer_groups(spec_of("qwen3"))}
    assert alone["o_add"] == ["attention_merge", "linear", "add"]
    twice = child("qwen3", blocks={"attention": {"b": {"add": ["a", "a"]}, "o": {"linear": "b"}}})
    groups = {g.name: [n.op for n in g.nodes] for g in layer_groups(twice)}
    assert groups["attention.a.merge"] == ["attention_merge"] and groups["attention.b"] == ["add"]


def test_shared_prologues_are_published():
    """The router's norm also serves the experts: its tasks store a share of it each."""
    router = next(g for g in layer_groups(spec_of("qwen3_moe")) if g.name == "router")
    assert router.published == ("mlp.h",) and router.outputs == ("mlp.scores", "mlp.h")
    shares = [next(s for s in t.writes if s.tensor == "mlp.h") for t in router.tasks]
    assert [(s.lo, s.hi) for s in shares] == [(0, 48), (48, 96)]
    first = planned(spec_of("qwen3"), **GPU).steps["decode"].templates[0].groups[0]
    shares = [s for t in first.tasks for s in t.writes if s.tensor == "y.first"]
    # 24 vectors of 4 features: half of the 48 tasks have one to store
    assert len(first.tasks) == 48 and [(s.lo, s.hi) for s in shares] == [(n, n + 4) for n in range(0, 96, 4)]


def test_what_is_explained():
    one, two = (planned(spec_of("qwen3"), tp=tp, **GPU).notes for tp in (1, 2))
    assert "fusion qkv: applied, rmsnorm + linear + linear + linear" in one
    assert "fusion embed: applied in layer 0" in one and "fusion embed: applied in layer 0" in two
    assert "fusion o_add: cut at attention.o.all_reduce: ranks add their parts there" in two
    assert not any("cut" in note for note in one)


@pytest.mark.parametrize("tp", [1, 2])
def test_the_head_finds_the_best_of_its_own_logits(tp):
    head, last = planned(spec_of("qwen3"), tp=tp, **GPU).steps["decode"].templates[-1].groups
    assert [n.op for n in head.nodes][-2:] == ["linear", "argmax_partial"]
    assert head.outputs == ("logits", "next_ids.partial") and last.inputs == ("next_ids.partial",)
    pairs = [next(s for s in t.writes if s.tensor == "next_ids.partial") for t in head.tasks]
    assert [(s.lo, s.hi) for s in pairs] == [(2 * n, 2 * n + 2) for n in range(len(head.tasks))]
    values = head.nodes[-1].values
    assert values["slices"] == last.nodes[0].values["slices"] == len(head.tasks)
    op = all_ops()["argmax_partial"](argmax_partial="logits", **values)
    assert [(op.edge(t.index), op.edge(t.index + 1)) for t in head.tasks] == [t.out for t in head.tasks]
    assert last.tasks[0].waits[0].event == "head.done"


def test_a_sample_whose_logits_are_summed_first_is_a_group_of_its_own():
    rules = [{"set": {"head": {"split_k": 2}}}]
    step = planned(child("qwen3", {"hidden_size": 1024}, schedule=rules), **GPU).steps["decode"]
    assert [g.name for g in step.templates[-1].groups] == ["head", "head.reduce", "next_ids.partial", "next_ids"]


def test_a_sample_is_fused_with_its_linear_or_not_at_all():
    layers = {"loud": {"add": ["logits", "logits"]}, "next_ids": {"sample": "loud"}}
    members = {"head": {"of": ["h", "logits", "loud", "next_ids"]}}
    with pytest.raises(
        SpecError, match=r"'next_ids' \(sample\) is fused with nothing but the linear that makes its logits"
    ):
        planned(child("qwen3", layers=layers, fusions=members), **GPU)
    apart = planned(child("qwen3", layers=layers, fusions={"head": {"of": ["h", "logits", "loud"]}}), **GPU)
    assert [g.name for g in apart.steps["decode"].templates[-1].groups] == ["head", "next_ids.partial", "next_ids"]


def test_a_group_waits_for_what_it_reads():
    """Groups stand in an order in which each comes after those that it reads from, or the layer before has them."""
    for name in ("qwen3", "gemma3", "qwen3_moe"):
        for fusions in ({}, {f: None for f in spec_of(name).fusions if f not in ("gate_up", "down_add")}):
            made: set[str] = set()
            groups = layer_groups(child(name, fusions=fusions), tp=2)
            inner = {n for g in groups for n in g.outputs}
            for group in groups:
                assert set(group.inputs) & inner <= made | {"y"} | set(groups[0].inputs)
                made |= set(group.outputs)
