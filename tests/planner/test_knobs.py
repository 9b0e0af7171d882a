"""Each knob acts: change it in the language, and the plan changes as it should while the numbers stay right.

`plan` proves each plan; the numbers are transformers', on a tiny random model.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import yaml
from tiny_specs import WIDE, child, exact_error, planned, spec_of

from mpk_spec.emit.source import emit
from mpk_spec.errors import SpecError
from mpk_spec.paths import specs_dir
from mpk_spec.planner.diff import diff
from mpk_spec.planner.plan import Group, Plan
from mpk_spec.planner.report import pin
from mpk_spec.schema import load_spec

TOLERANCE = 1e-4
GPU = {"target": "h100", "context": 256, "chunk": 16}


def groups(made: Plan, kind: str = "decode") -> dict[str, Group]:
    return {g.name: g for t in made.steps[kind].templates for g in t.groups}


def ruled(name: str, group: str, size: dict | None = None, when: dict | None = None, **settings: Any):
    """A child of the spec whose last rule sets one group."""
    rule = {"set": {group: settings}} | ({"when": when} if when else {})
    return child(name, size, schedule=[rule])


def right(spec, **request) -> Plan:
    made = planned(spec, **{**GPU, **request})
    assert exact_error(spec, made) < TOLERANCE
    return made


# ---- fusions

MEMBERS = {
    "embed": {"x"},
    "qkv": {"attention.h", "attention.q", "attention.k", "attention.v"},
    "attend": {"attention.qn", "attention.kn", "attention.qr", "attention.kr", "attention.cache", "attention.a"},
    "o_add": {"attention.o", "attention.out"},
    "gate_up": {"mlp.h", "mlp.gate", "mlp.up", "mlp.act"},
    "down_add": {"mlp.down", "mlp.out"},
    "head": {"h", "logits", "next_ids.partial", "next_ids"},
}


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("fusion", MEMBERS)
def test_a_fusion_left_out(fusion, tp):
    gone = {fusion: None} | ({"embed": None} if fusion == "qkv" else {})
    before = groups(planned(spec_of("qwen3"), tp=tp, **GPU))
    after = groups(right(child("qwen3", fusions=gone), tp=tp))
    apart = set().union(*(MEMBERS[f] for f in gone))
    assert apart <= after.keys()
    assert all(len([n for n in after[name].nodes if n.op != "attention_merge"]) == 1 for name in apart)
    same = before.keys() - gone.keys() - {"attention.a.merge"}
    same -= {"o_add"} if fusion == "attend" else set()  # which takes over the merge of attention splits
    assert same <= after.keys()
    tasks = {name for name in same if before[name].grid != after[name].grid}
    assert not tasks


@pytest.mark.parametrize("fusion", ["embed", "qkv", "attend", "o_add", "down_add", "head"])
def test_a_fusion_left_out_of_experts(fusion):
    gone = {fusion: None} | ({"embed": None} if fusion == "qkv" else {})
    rules = [{"set": {"mlp.down": {"launch": "dynamic"}}}] if fusion == "down_add" else []
    if fusion == "down_add":
        with pytest.raises(SpecError, match="unknown operator or fusion 'down_add'"):
            child("qwen3_moe", fusions=gone, schedule=rules)
        return
    right(child("qwen3_moe", fusions=gone), tp=2)


def test_all_fusions_left_out():
    for name in ("qwen3", "gemma3"):
        spec = child(name, fusions={f: None for f in spec_of(name).fusions})
        made = right(spec, tp=2)
        single = [g for g in groups(made).values() if len([n for n in g.nodes if n.op != "attention_merge"]) != 1]
        assert not single


CACHE = ["attention.cache", "attention.a"]


def bare(made: Plan) -> str:
    """All of it but what it says of its rules."""
    return replace(made, notes=(), schedule={}).to_json()


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("fusion", MEMBERS)
def test_a_rule_leaves_a_fusion_out(fusion, tp):
    """As if the spec did not name it, or not all of it."""
    left = {"of": CACHE} if fusion == "attend" else None
    gone = {fusion: left} | ({"embed": None} if fusion == "qkv" else {})
    rule = {"set": {fusion: {"fuse": CACHE if fusion == "attend" else False}}}
    made = planned(child("qwen3", schedule=[rule]), tp=tp, **GPU)
    assert bare(made) == bare(planned(child("qwen3", fusions=gone), tp=tp, **GPU))
    assert {n: r["fuse"] for n, r in made.schedule.items() if "fuse" in r} == {
        name: CACHE if left else False for name in gone
    }
    said = [n for n in made.notes if "rule says" in n or "left out" in n]
    assert len(said) == len(gone) and all(n.partition(":")[0].removeprefix("fusion ") in gone for n in said)
    again = planned(child("qwen3", schedule=yaml.safe_load(pin(made))["schedule"]), tp=tp, **GPU)
    assert again.to_json() == made.to_json()


def test_rules_that_leave_out_are_like_others():
    def left(*rules, **request):
        made = planned(child("qwen3", schedule=list(rules)), **{**GPU, **request})
        return {n for n, rule in made.schedule.items() if "fuse" in rule}

    out = {"set": {"o_add": {"fuse": False}}}
    assert left(out) == left({"set": {"o_add": {"grid": [12]}}}, out) == {"o_add"}  # later ones win
    assert left(out, {"set": {"*": {"fuse": "auto"}}}) == left(out, {"set": {"o_add": {"fuse": True}}}) == set()
    assert left({"when": {"target": "h200"}, **out}) == set()
    assert left({"when": {"target": "h200"}, **out}, target="h200") == {"o_add"}
    assert left({"set": {"*": {"fuse": False}, "attend": {"fuse": CACHE}}}) == MEMBERS.keys()
    assert left({"set": {"attend": {"fuse": sorted(MEMBERS["attend"])}}}) == set()  # all of it
    assert left({"set": {"attend": {"fuse": False}}}, target="cpu") == {"attend"}  # where each operator has its task


def test_operators_of_a_fusion_left_out_take_rules():
    rule = {"set": {"o_add": {"fuse": False}, "attention.o": {"grid": [6]}, "attention.out": {"grid": [2]}}}
    made = groups(right(child("qwen3", schedule=[rule])))
    assert (made["attention.o"].grid, made["attention.out"].grid) == ((6, 1, 1), (2, 1, 1))


def test_embedding_goes_into_the_first_layer():
    first, other, *_ = planned(spec_of("qwen3"), **GPU).steps["decode"].templates
    assert first.groups[0].nodes[0].op == "embedding" and first.groups[0].published == ("y.first",)
    assert "embedding" not in [n.op for n in other.groups[0].nodes]


# ---- packing


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_pack_groups(count):
    made = right(child("qwen3", fusions={"qkv": {"pack": {"layout": "concat", "groups": count}}}))
    packing = next(p for p in made.packings if p.group == "qkv")
    assert (packing.layout, packing.groups) == ("concat", count)
    # 256, 64 and 64 rows alternate in `count` groups
    first = [w for t in groups(made)["qkv"].tasks for w in t.writes if w.tensor != "y"]
    expected = [
        (tensor, n * width)
        for n in range(count)
        for tensor, width in (("attention.q", 256 // count), ("attention.k", 64 // count), ("attention.v", 64 // count))
    ]
    assert [(s.tensor, s.lo) for s in first if (s.tensor, s.lo) in expected] == expected


def test_pack_layout():
    interleaved = planned(spec_of("qwen3"), **GPU)
    apart = right(child("qwen3", fusions={"gate_up": {"pack": {"layout": "concat"}}}))
    assert next(p.layout for p in interleaved.packings if p.group == "gate_up") == "interleave"
    assert next(p.layout for p in apart.packings if p.group == "gate_up") == "concat"
    # a tile of 8 packed rows is 4 features of each weight, or 8 of one
    assert len(groups(interleaved)["gate_up"].tasks) == 256 // 4
    assert len(groups(apart)["gate_up"].tasks) == 256 // 8


# ---- schedule: every setting


@pytest.mark.parametrize(
    ("group", "grid"),
    [("qkv", 12), ("o_add", 3), ("gate_up", 16), ("down_add", 2), ("head", 13)],
)
def test_grid(group, grid):
    made = right(ruled("qwen3", group, grid=[grid, 1, 1]))
    for kind in made.steps:
        found = groups(made, kind)[group]
        assert found.grid == (grid, 1, 1) and len(found.tasks) == grid and found.partition == "even"
    assert made.schedule[group]["grid"] == [grid, 1, 1]
    assert groups(planned(spec_of("qwen3"), **GPU))[group].grid != (grid, 1, 1)


def test_grid_of_a_sample_of_its_own():
    """Fused, each task of the head finds the best of its own logits."""
    apart = {"head": {"of": ["h", "logits"]}}
    rule = {"set": {"next_ids.partial": {"grid": [11, 1, 1]}}}
    made = right(child("qwen3", fusions=apart, schedule=[rule]))
    assert groups(made)["next_ids.partial"].grid == (11, 1, 1) and made.tensors["next_ids.partial"].shape == (33, 2)
    fused = right(ruled("qwen3", "head", grid=[13, 1, 1]))
    assert "next_ids.partial" not in groups(fused) and fused.tensors["next_ids.partial"].shape == (13, 2)


def test_a_short_grid_is_filled_up():
    assert planned(ruled("qwen3", "qkv", grid=[12]), **GPU) == planned(ruled("qwen3", "qkv", grid=[12, 1, 1]), **GPU)


def test_block():
    made = right(ruled("qwen3", "qkv", block=[512, 1, 1]))
    assert groups(made)["qkv"].block == (512, 1, 1) and groups(made)["o_add"].block == (384, 1, 1)
    assert groups(planned(ruled("qwen3", "*", block=[256]), **GPU))["o_add"].block == (256, 1, 1)


def test_stages():
    made = right(ruled("qwen3", "gate_up", stages=2))
    assert groups(made)["gate_up"].stages == 2 and groups(made)["qkv"].stages > 2


def test_launch():
    made = right(ruled("qwen3", "gate_up", launch="dynamic"))
    template = made.steps["decode"].templates[1]
    n = [g.name for g in template.groups].index("gate_up")
    assert template.groups[n].launch == "dynamic"
    assert all((n, -1) in queue and not any(g == n and t >= 0 for g, t in queue) for queue in template.queues)
    assert all((n, -1) in loads for loads in template.loads)
    everything = right(ruled("qwen3", "*", launch="dynamic"), tp=2)
    assert {g.launch for g in groups(everything).values()} == {"dynamic"}


def test_partition():
    uneven = right(ruled("qwen3", "qkv", grid=[7, 1, 1], partition="balanced"))
    sizes = [t.out[1] - t.out[0] for t in groups(uneven)["qkv"].tasks]
    assert groups(uneven)["qkv"].partition == "balanced" and sorted(set(sizes)) == [54, 55] and sum(sizes) == 384
    assert groups(planned(ruled("qwen3", "head", partition="even"), **GPU))["head"].grid == (65, 1, 1)
    wide = {"vocab_size": 515 * 16}
    auto, even = (groups(planned(child("qwen3", wide, schedule=s), **GPU))["head"] for s in (
        [], [{"set": {"head": {"partition": "even"}}}],
    ))  # fmt: skip
    assert (auto.grid[0], auto.partition) == (132, "balanced")
    assert (even.grid[0], even.partition) == (103, "even")  # the most that divide 1030 tiles


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("splits", [1, 2, 3, 4])
def test_kv_splits(splits, tp):
    made = right(ruled("gemma3", "attend", kv_splits=splits), tp=tp)
    group = groups(made)["attend"]
    assert group.kv_splits == splits and group.grid == (2 // tp, splits, 1)
    assert made.states["kv"].extent == 2 // tp * splits
    assert ("attention.a.splits" in made.tensors) == (splits > 1)
    merges = [n.name for n in groups(made)["attention.o"].nodes if n.op == "attention_merge"]
    assert merges == (["attention.a.merge"] if splits > 1 else [])


@pytest.mark.parametrize(("group", "splits"), [("o_add", 2), ("down_add", 3)])
def test_split_k(group, splits):
    made = right(ruled("qwen3", group, WIDE, split_k=splits))
    found = groups(made)
    assert found[group].split_k == splits and found[group].grid[1] == splits
    assert found[f"{group}.reduce"].nodes[0].op == "split_k_reduce"
    k = 1024 if group == "o_add" else 1536
    assert {t.k for t in found[group].tasks} == {(n * 512, (n + 1) * 512) for n in range(k // 512)}
    said = ruled("qwen3", group, WIDE, grid=[3, splits, 1])  # a grid says it too
    assert groups(planned(said, **GPU))[group].split_k == splits


def test_split_k_differs_by_step():
    spec = ruled("qwen3", "down_add", WIDE, when={"step": "decode"}, split_k=3)
    made = right(spec)
    assert groups(made)["down_add"].split_k == 3 and groups(made, "prefill")["down_add"].split_k == 1


def _constants(made: Plan) -> dict[str, int]:
    """The numbers that the kernel's source names."""
    found = re.findall(r"^constexpr mpk::u32 (\w+) = (\d+);", emit(made).source, re.MULTILINE)
    return {name: int(value) for name, value in found}


BOTH_LIMITS = {"copies_in_flight", "copies_while_looking"}  # the second one is at most the first


@pytest.mark.parametrize(
    ("key", "asked", "bytes_", "constants", "chunks"),
    [
        ("in_flight", 32768, 32768, BOTH_LIMITS, 8),
        ("in_flight", 33000, 32768, BOTH_LIMITS, 8),  # whole chunks
        ("in_flight", 4096, 4096, BOTH_LIMITS, 1),
        ("in_flight_looking", 16384, 16384, {"copies_while_looking"}, 4),
        ("prefetch", 0, 0, {"prefetch_chunks"}, 0),
        ("prefetch", 262144, 262144, {"prefetch_chunks"}, 64),
    ],
)
def test_loader(key, asked, bytes_, constants, chunks):
    auto = planned(spec_of("qwen3"), **GPU)
    made = planned(ruled("qwen3", "*", **{key: asked}), **GPU)
    assert getattr(made, f"{key}_bytes") == json.loads(made.to_json())[f"{key}_bytes"] == bytes_
    before, after = _constants(auto), _constants(made)
    assert (before["copies_in_flight"], before["prefetch_chunks"]) == (12, 32)  # 48 and 128 KiB
    assert {name for name in after if after[name] != before[name]} == constants
    assert {after[name] for name in constants} == {chunks}
    assert made.key != planned(ruled("qwen3", "*", **{key: "auto"}), **GPU).key
    again = planned(child("qwen3", schedule=yaml.safe_load(pin(made))["schedule"]), **GPU)
    assert again.to_json() == made.to_json() and f"{key}: {bytes_}" in pin(made)
    assert f"{key}_bytes: {getattr(auto, f'{key}_bytes')} -> {bytes_}\n" in diff(auto, made)


@pytest.mark.parametrize(
    ("size", "asked", "chunk", "ring", "columns"),
    [
        ("0.6b", 16384, 16384, 11, {"qkv": 1024, "o_add": 1024, "down_add": 1024}),
        ("0.6b", 8192, 16384, 11, {"qkv": 512, "o_add": 512, "down_add": 512}),  # a block's keys have 16 KiB
        ("1b", 8192, 8192, 22, {"qkv": 512, "o_add": 512, "down_add": 512}),
        ("1b", 12000, 11264, 16, {"qkv": 704, "o_add": 704, "down_add": 704}),
    ],
)
def test_smaller_copies_of_weights(size, asked, chunk, ring, columns):
    name = "qwen3" if size == "0.6b" else "llama3"
    made = planned(ruled(name, "*", spec_of(name).sizes[size].config, weight_chunk=asked), target="h200", context=512)
    assert (made.weight_chunk_bytes, made.chunk_bytes, made.ring_stages, made.copy_bytes) == (
        asked,
        chunk,
        ring,
        min(asked, chunk),
    )
    found = {p.group: p.tile_k for p in made.packings}
    assert {name: found[name] for name in columns} == columns
    for group in made.steps["decode"].templates[1].groups:
        if group.name in columns:
            linear = next(node for node in group.nodes if node.op == "linear")
            k = made.weights[linear.weights["weight"]].shape[-1]
            tiles = {-(-(t.out[1] - t.out[0]) // 8) for t in group.tasks}
            assert {t.load_chunks for t in group.tasks} == {n * -(-k // found[group.name]) for n in tiles}


def test_the_loader_keeps_as_many_bytes_under_way_in_smaller_copies():
    """Of Qwen3-0.6B, whose ring has stages of 16 KiB for a block's keys either way."""
    config, at = spec_of("qwen3").sizes["0.6b"].config, {"target": "h200", "context": 512}
    usual, small = (_constants(planned(ruled("qwen3", "*", config, weight_chunk=n), **at)) for n in (16384, 8192))
    assert small["ring_slots"] == usual["ring_slots"] and small["slot_bytes"] == usual["slot_bytes"] == 16384
    for name in ("copies_in_flight", "copies_while_looking", "prefetch_chunks"):
        assert small[name] == 2 * usual[name]
    assert abs(2 * small["prefetch_clocks"] - usual["prefetch_clocks"]) <= 1


def test_tasks_in_turn():
    """Each operator goes on where the one before ended, whatever that leaves an SM to load."""
    made = planned(ruled("qwen3", "*", order="in_turn"), **GPU)
    template = made.steps["decode"].templates[1]
    placed = {task: sm for sm, queue in enumerate(template.queues) for task in queue}
    turns = [placed[n, t.index] for n, group in enumerate(template.groups) for t in group.tasks]
    assert turns == [n % made.num_sms for n in range(len(turns))]
    assert planned(spec_of("qwen3"), **GPU).order == "balanced" != made.order
    again = planned(child("qwen3", schedule=yaml.safe_load(pin(made))["schedule"]), **GPU)
    assert again.to_json() == made.to_json() and "order: in_turn" in pin(made)


def test_the_loader_fits_small_rings():
    """What is usual and does not fit is cut, so that a pinned plan is always accepted again."""
    size = spec_of("qwen3").sizes["0.6b"].config
    made = planned(ruled("qwen3", "*", size, stages=2), target="h200", context=512, verified=False)
    assert (made.ring_bytes, made.in_flight_bytes, made.in_flight_looking_bytes) == (32768, 32768, 32768)


@pytest.mark.parametrize(
    ("size", "both"),
    [("135m", (48, 48)), ("0.6b", (80, 32)), ("1.7b", (80, 32)), ("8b", (80, 32)), ("32b", (80, 32))],
)
def test_limits_of_the_loader_follow_from_the_layers_size(size, both):
    """KiB in flight, always and while workers look. Layers that fit the ring (135m) never hold a value up."""
    made = planned(
        spec_of("smollm2" if size == "135m" else "qwen3"), target="h200", context=512, size=size, verified=False
    )
    assert (made.in_flight_bytes, made.in_flight_looking_bytes) == tuple(n * 1024 for n in both)


@pytest.mark.parametrize(("context", "tp", "kib"), [(4096, 1, 128), (8192, 1, 128), (32768, 1, 0), (4096, 2, 128)])
def test_nothing_is_prefetched_beside_a_cache_that_rings_do_not_hold(context, tp, kib):
    made = planned(spec_of("qwen3"), target="h200", context=context, size="8b", tp=tp, verified=False)
    assert made.prefetch_bytes == kib * 1024


@pytest.mark.parametrize(
    ("size", "target", "every"),
    [
        ("0.6b", "h200", 1),
        ("1.7b", "h200", 4),
        ("8b", "h200", 4),
        ("8b", "h100", 2),
        ("8b", "a100", 1),
        ("8b", "b200", 4),
    ],
)
def test_chunks_that_memory_brings_lie_between_those_from_l2(size, target, every):
    """So many that L2 has something to give besides; none where a layer (0.6b) is shorter than what they reach over."""
    made = planned(spec_of("qwen3"), target=target, context=512, size=size, verified=False)
    assert _constants(made)["prefetch_every"] == every


ALONE = {"*": {"fuse": False}, "attend": {"fuse": CACHE}}  # each operator a task of its own


@pytest.mark.parametrize(
    ("name", "size", "target", "tp", "kib"),
    [
        ("smollm2", "135m", "h100", 1, 48),  # a layer fits the ring
        ("llama3", "1b", "h100", 1, 64),
        ("qwen3", "8b", "h100", 1, 64),  # as it was measured
        ("qwen3", "8b", "h200", 2, 80),  # no slower than 48 or 64
        ("qwen3", "0.6b", "rtx4090", 1, 32),
    ],
)
def test_bytes_in_flight_are_what_a_targets_memory_brings(name, size, target, tp, kib):
    made = planned(spec_of(name), target=target, context=512, size=size, tp=tp, steps=("decode",), verified=False)
    assert made.in_flight_bytes == kib * 1024


def test_fewer_copies_while_workers_look():
    spec = ruled("qwen3", "*", in_flight=8192, in_flight_looking=12288)
    with pytest.raises(
        SpecError, match="'in_flight_looking' is at least one chunk of 4096 bytes and at most the 8192 of"
    ):
        planned(spec, **GPU)


@pytest.mark.parametrize(
    ("when", "request_", "applies"),
    [
        ({"target": "h100"}, {}, True),
        ({"target": ["a100", "h200"]}, {}, False),
        ({"target": "h200"}, {"target": "h200"}, True),
        ({"tp": 2}, {"tp": 2}, True),
        ({"tp": [4, 8]}, {"tp": 2}, False),
        ({"size": "tiny"}, {}, True),
        ({"batch": 4}, {"batch": 4}, True),
        ({"batch": 4}, {"batch": 3}, False),
        ({"context": 256}, {}, True),
        ({"context": 128}, {}, False),
    ],
)
def test_when(when, request_, applies):
    spec = ruled("qwen3", "gate_up", when=when, stages=2)
    made = planned(spec, **{**GPU, **request_})
    assert (groups(made)["gate_up"].stages == 2) == applies


def test_later_rules_win():
    def stages(*rules):
        return groups(planned(child("qwen3", schedule=[{"set": r} for r in rules]), **GPU))["gate_up"].stages

    auto = stages({})
    assert stages({"gate_up": {"stages": 2}}, {"gate_up": {"stages": 3}}) == 3
    assert stages({"gate_up": {"stages": 2}}, {"*": {"stages": 3}}) == 3
    assert stages({"*": {"stages": 3}, "gate_up": {"stages": 2}}) == 2
    assert stages({"gate_up": {"stages": 2}}, {"gate_up": {"stages": "auto"}}) == auto


# ---- tensors and sharding


def test_dtypes():
    made = right(child("qwen3", tensors={"attention.out": {"dtype": "bf16"}, "mlp.out": {"dtype": "f32"}}))
    assert made.tensors["attention.out"].dtype == "bf16" and made.tensors["y"].dtype == "f32"
    default = right(child("qwen3", tensors={"default": {"dtype": "f32"}}), tp=2)
    assert {t.dtype for t in default.tensors.values()} == {"f32", "i32"}
    assert planned(spec_of("qwen3"), **GPU).tensors["attention.q"].dtype == "bf16"


def test_placement():
    changes = {"mlp.out": {"placement": "host"}, "attention.q": {"placement": "nvshmem"}}
    one, two = (right(child("qwen3", tensors=changes), tp=tp) for tp in (1, 2))
    assert one.tensors["y"].placement == two.tensors["y"].placement == "host"
    assert one.tensors["attention.q"].placement == "cuda" and two.tensors["attention.q"].placement == "nvshmem"
    assert two.arena_bytes["host"] >= two.tensors["y"].bytes
    assert two.tensors["attention.o"].inbox and two.tensors["attention.o"].placement == "nvshmem"


@pytest.mark.parametrize(
    ("rule", "sums", "shape"),
    [
        ({}, 6, {"down_proj": (96, 128), "q_proj": (128, 96), "lm_head": (258, 96)}),
        ({"inter": "replicate"}, 3, {"down_proj": (96, 256)}),
        ({"inter": "split_padded"}, 6, {"down_proj": (96, 128)}),
        ({"heads": "replicate", "kv_heads": "replicate"}, 3, {"q_proj": (256, 96), "k_proj": (64, 96)}),
        ({"kv_heads": "split"}, 6, {"k_proj": (32, 96)}),
        ({"vocab": "replicate"}, 6, {"lm_head": (515, 96)}),
    ],
)
def test_shard_rules(rule, sums, shape):
    made = right(child("qwen3", shard={"tp": rule}), tp=2)
    assert made.all_reduces == sums
    assert {n: made.weights[n].shape for n in shape} == shape
    assert made.tensors["next_ids.partial"].inbox == (rule != {"vocab": "replicate"})


@pytest.mark.parametrize("tp", [2, 8])
@pytest.mark.parametrize("count", [16, 14])
@pytest.mark.parametrize("launch", ["static", "dynamic"])
def test_experts_shared_out(count, tp, launch):
    """Expert parallel: each rank has some of the experts, whole, and what it adds to the sum over ranks."""
    rule = {"tp": {"inter": "replicate", "experts": "split_padded"}}
    schedule = [{"set": {"gate_up": {"launch": launch}}}]
    made = right(child("qwen3_moe", {"num_experts": count}, shard=rule, schedule=schedule), tp=tp, batch=3)
    assert made.weights["up_proj"].shape == (-(-count // tp), 128, 96) and made.weights["router"].shape == (count, 96)
    assert made.all_reduces == 6 and made.tensors["mlp.mix"].inbox


def test_weights_kept_whole():
    kept = {
        "layer": {
            "prefix": "model.layers.{i}.",
            **{n: {"shard": "replicate"} for n in ("gate_proj", "up_proj", "down_proj")},
        }
    }
    made = right(child("qwen3", weights=kept), tp=2)
    assert made.weights["down_proj"].shape == (96, 256) and made.all_reduces == 3


# ---- pins


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "gemma3"])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_pinned_plan_is_the_plan(name, tp):
    request = {**GPU, "tp": tp, "batch": 2}
    auto = planned(spec_of(name), **request)
    rules = yaml.safe_load(pin(auto))["schedule"]
    again = planned(child(name, schedule=rules), **request)
    assert again.to_json().replace('"child', f'"{name}') == auto.to_json().replace('"child', f'"{name}')


def test_a_pinned_plan_with_splits_is_the_plan():
    schedule = [{"set": {"attend": {"kv_splits": 3}, "down_add": {"split_k": 3}, "qkv": {"launch": "dynamic"}}}]
    auto = planned(child("qwen3", WIDE, schedule=schedule), **GPU)
    again = planned(child("qwen3", WIDE, schedule=yaml.safe_load(pin(auto))["schedule"]), **GPU)
    assert again.to_json() == auto.to_json()


def test_pins_stay_with_their_file():
    """Rules made for a target are not inherited."""
    pinned = yaml.safe_load(pin(planned(spec_of("llama3"), **GPU)))["schedule"]
    assert all("target" in rule["when"] for rule in pinned)
    assert load_spec(specs_dir() / "smollm2.yaml").schedule == load_spec(specs_dir() / "llama3.yaml").schedule
