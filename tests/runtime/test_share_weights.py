"""Backends of plans that differ in their schedule alone use one copy of the packed weights."""

from __future__ import annotations

import pytest

from mpk_spec.planner import plan
from mpk_spec.planner.unfuse import inseparable
from mpk_spec.runtime.cuda_backend import CudaBackend
from mpk_spec.runtime.random_model import random_checkpoint
from mpk_spec.schema import load_spec
from mpk_spec.tuner.space import knobs, with_rules

SPEC = load_spec("qwen3")


def planned(rules, size="tiny", spec=SPEC):
    return plan(with_rules(spec, rules), size=size, target="h100", context=256, verified=False)


@pytest.fixture
def opened(fake_gpu, monkeypatch):
    monkeypatch.setattr(CudaBackend, "_compile", lambda self, defines, progress: b"a cubin")
    checkpoint = random_checkpoint(SPEC, "tiny", 0)
    return lambda made, share=None: CudaBackend(made, checkpoint, share=share)


def test_whatever_a_search_sets_but_grids_the_weights_are_shared(opened, fake_gpu):
    first = opened(planned({}))
    fake_gpu.free = (512 << 20) + sum(first.plan.arena_bytes.values()) + first.emitted.layout.cache_bytes
    for knob in knobs(first.plan, SPEC):
        if knob.name == "grid":  # tiles lie by task
            continue
        other = opened(planned({knob.group: knob.choices[0]}), share=first)
        assert other.launcher.weights is first.launcher.weights and other.plan is not first.plan


@pytest.mark.parametrize("fusion", SPEC.fusions)
def test_a_fusion_left_out_needs_other_weights_only_where_it_packs_some_together(fusion, opened):
    first = opened(planned({}))
    other = opened(planned({fusion: {"fuse": inseparable(SPEC, fusion) or False}}), share=first)
    assert (other.launcher.weights is first.launcher.weights) == (SPEC.fusions[fusion].pack is None)


def test_weights_that_lie_otherwise_are_packed_again(opened):
    from tiny_specs import child

    first = opened(planned({}))
    apart = child("qwen3", fusions={"qkv": {"pack": {"layout": "concat", "groups": 1}}})
    other = opened(planned({}, spec=apart), share=first)
    assert other.launcher.weights is not first.launcher.weights
