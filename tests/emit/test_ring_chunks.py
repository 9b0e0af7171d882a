"""What flows through the ring: each SM's list of loads, and that the loader streams as many chunks as a task takes."""

from __future__ import annotations

import subprocess
from collections import Counter

import numpy as np
import pytest
from host_build import built
from tiny_specs import child

from mpk_spec.emit.program import _program_dtype
from mpk_spec.emit.source import Emitted, emit
from mpk_spec.planner import plan

LONG = {"max_position_embeddings": 8192, "vocab_size": 256, "intermediate_size": 128}
CASES = {  # splits, ranks, SMs
    "few SMs": (3, 1, "h100:4"),
    "many SMs": (2, 1, "h100"),
    "many splits": (50, 1, "h100"),
    "two ranks": (5, 2, "h100:7"),
}


def made(case: str) -> Emitted:
    splits, tp, target = CASES[case]
    spec = child("qwen3", LONG, schedule=[{"set": {"attend": {"kv_splits": splits}}}])
    return emit(plan(spec, size="tiny", target=target, context=8192, tp=tp, verified=False))


def programs(one: Emitted) -> np.ndarray:
    sizes, templates = one.programs.sizes, len(one.step.templates)
    return np.frombuffer(
        one.programs.blob, _program_dtype(templates, sizes.entries, sizes.loads, sizes.waits, sizes.signals)
    )


@pytest.mark.parametrize("case", CASES)
def test_loads_are_in_the_order_of_the_queue(case):
    """The workers take chunks in the order in which they come, whatever task they are of."""
    one = made(case)
    of_weights = {name: n for n, name in enumerate(one.layout.packed)}
    of_cache = len(of_weights)  # one state: behind all weights
    for program in programs(one):
        for t in range(len(one.step.templates)):
            entries = program["entry"][program["queue_begin"][t] : program["queue_begin"][t + 1]]
            groups = [one.step.templates[t].groups[entry["group"]] for entry in entries]
            wanted = [
                (of_weights.get(group.name, of_cache), entry["lo"], entry["hi"])
                for group, entry in zip(groups, entries, strict=True)
                if group.name in of_weights or group.task == "attention"
            ]
            found = program["load"][program["load_begin"][t] : program["load_begin"][t + 1]]
            assert found.tolist() == wanted


@pytest.mark.parametrize("case", CASES)
def test_every_part_of_the_cache_is_read_once_a_layer(case):
    one = made(case)
    cache = one.layout.caches["kv"]
    every = {(head, split) for head in range(cache.kv_heads) for split in range(cache.splits)}
    assert cache.splits == CASES[case][0]
    assert cache.kv_heads * cache.group * one.plan.tp == one.plan.config["num_attention_heads"]
    for t, template in enumerate(one.step.templates):
        found = Counter()
        for program in programs(one):
            loads = program["load"][program["load_begin"][t] : program["load_begin"][t + 1]]
            found.update((lo, hi) for what, lo, hi in loads.tolist() if what == len(one.layout.packed))
        attends = any(g.task == "attention" for g in template.groups)
        assert found == (Counter(every) if attends else Counter())


def test_some_sm_has_a_part_of_the_cache_and_no_weights():
    """Such a one is among the cases above."""
    one = made("many splits")
    weights = len(one.layout.packed)
    assert {weights} in [{n for n, _, _ in p["load"][: p["load_begin"][-1]].tolist()} for p in programs(one)]


def test_the_loader_streams_what_attention_takes(tmp_path):
    """The kernel's own code on the host: 1 to 16 tokens and heads, positions around the edges of blocks."""
    ran = subprocess.run([built("ring_chunks.cc", tmp_path)], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "110748 steps compared\n"), ran.stdout[-2000:]
