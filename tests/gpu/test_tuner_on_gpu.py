"""Candidates of the search on a GPU: each knob acts, and what must have the same bits has them."""

from __future__ import annotations

import pytest

CANDIDATES = [
    ({}, "the plan to beat"),
    ({"*": {"in_flight": 32768, "in_flight_looking": 8192, "prefetch": 0}}, "same bits"),
    ({"qkv": {"grid": [7, 1, 1], "partition": "balanced"}, "head": {"grid": [13, 1, 1]}}, "same bits"),
    ({"*": {"weight_chunk": 1024, "order": "in_turn"}}, "as near the truth as compare asks"),
    ({"attend": {"kv_splits": 2}}, "as near the truth as compare asks"),
    ({"o_add": {"fuse": False}, "attention.o": {"grid": [6, 1, 1]}}, "as near the truth as compare asks"),
    ({"gate_up": {"fuse": False}, "*": {"stages": 8}}, "as near the truth as compare asks"),
]


def planned(rules: dict, target: str):
    from mpk_spec.planner import plan
    from mpk_spec.schema import load_spec
    from mpk_spec.tuner.space import with_rules

    return plan(with_rules(load_spec("qwen3"), rules), size="tiny", target=target, context=512)


def test_candidates_can_be_built():
    from mpk_spec.emit.source import emit

    sources = [emit(planned(rules, "h100")).source for rules, _ in CANDIDATES]
    assert len(set(sources)) == len(CANDIDATES)


@pytest.mark.gpu
def test_candidates_are_measured_and_judged(gpu):
    from mpk_spec.runtime.cuda_backend import CudaBackend
    from mpk_spec.runtime.random_model import random_checkpoint
    from mpk_spec.schema import load_spec
    from mpk_spec.testing.yardstick import Yardstick
    from mpk_spec.tuner.gpu import GpuMeasurer

    checkpoint = random_checkpoint(load_spec("qwen3"), "tiny", 0)
    plans = [planned(rules, gpu) for rules, _ in CANDIDATES]
    opened = []

    def open_(made, share):
        opened.append(CudaBackend(made, checkpoint, share=share))
        return opened[-1]

    measurer = GpuMeasurer(plans[0], open_, lambda ids, last: Yardstick(checkpoint, ids, last=last), 128, 8)
    measurer.prepare(plans)
    found = [measurer.measure(made) for made in plans]
    assert [m.right for m in found] == [True] * len(plans), found
    assert [m.output for m in found[:3]] == [output for _, output in CANDIDATES[:3]]
    assert {m.output for m in found[3:]} <= {"same bits", CANDIDATES[3][1]} and all(m.ms > 0 for m in found)
    assert all(before > 0 and after > 0 for before, after in measurer.in_turn((plans[0], plans[1]), 2))
