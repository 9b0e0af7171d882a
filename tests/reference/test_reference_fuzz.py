"""Random sizes, fusions, rules, shares and requests: what is not refused is proved, and computes the same numbers."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tiny_specs import child, error, exact_error, executor_of, forced, planned, spec_of, tokens

from mpk_spec.errors import SpecError

REPLICATED = {"heads": "replicate", "kv_heads": "replicate"}


@st.composite
def specs(draw):
    name = draw(st.sampled_from(["qwen3", "gemma3", "qwen3_moe", "llama3"]))
    size = {
        "head_dim": draw(st.sampled_from([16, 32, 128])),
        "intermediate_size": draw(st.sampled_from([128, 256, 1536])),
        "num_hidden_layers": draw(st.sampled_from([1, 2, 3])),
        "num_key_value_heads": draw(st.sampled_from([1, 2, 4, 8])),
    }
    fixed = {"embed"} | ({"gate_up", "down_add"} if name == "qwen3_moe" else set())
    gone = draw(st.sets(st.sampled_from(sorted(spec_of(name).fusions.keys() - fixed)), max_size=3))
    gone |= {"embed"} if "qkv" in gone or draw(st.booleans()) else set()
    rules = [{"set": {"*": {"launch": draw(st.sampled_from(["static", "dynamic"]))}}}]
    left = spec_of(name).fusions.keys() - gone
    for group in sorted(left & {"qkv", "head", "o_add"}):
        rules.append({"set": {group: {"grid": [draw(st.integers(1, 6))], "partition": "balanced"}}})
    if "attend" in left:
        rules.append({"set": {"attend": {"kv_splits": draw(st.integers(1, 3))}}})
    if "down_add" in left and name != "qwen3_moe":
        rules.append({"set": {"down_add": {"split_k": draw(st.sampled_from([1, 3]))}}})
    shard = draw(st.sampled_from([{}, {"inter": "replicate"}, {"vocab": "replicate"}, REPLICATED]))
    return child(name, size, fusions=dict.fromkeys(gone), schedule=rules, shard={"tp": shard})


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    spec=specs(),
    tp=st.sampled_from([1, 2, 4]),
    target=st.sampled_from(["cpu", "rtx4090", "h100"]),
    chunk=st.sampled_from([5, 16, 40]),
    steps=st.sampled_from([["decode", "prefill"], ["prefill", "decode"], ["decode", "mixed", "prefill"]]),
    seed=st.integers(0, 99),
)
@example(  # more tasks than features to publish
    child("gemma3", {"head_dim": 128, "num_key_value_heads": 8}, shard={"tp": REPLICATED}),
    8, "rtx4090", 16, ["decode", "prefill"], 1,
)  # fmt: skip
def test_what_is_planned_is_right(spec, tp, target, chunk, steps, seed):
    try:
        made = planned(spec, tp=tp, target=target, chunk=chunk, steps=tuple(steps), context=160)
    except SpecError as refused:
        assert all(p.position is not None for p in refused.problems)
        assume(False)
    assert exact_error(spec, made, count=26, prompt=24) < 1e-4
    ids = tokens(7)
    straight, shuffled = (forced(executor_of(spec, made), ids, 6, shuffle=s) for s in (None, seed))
    assert error(straight, shuffled) == 0 and torch.equal(straight, shuffled)
