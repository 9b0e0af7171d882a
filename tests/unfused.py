"""The tiny qwen3 with fusions left out: operators on rows are groups of their own."""

from __future__ import annotations

from tiny_specs import child

from mpk_spec.schema import Spec

APART = {"of": ["attention.cache", "attention.a"]}  # the kernel appends to the cache where it attends
LAYERS = {"attend": APART, "o_add": None, "gate_up": None, "down_add": None}
WITHOUT = {
    "embed": {"embed": None},
    "qkv": {"qkv": None, "embed": None},  # which is fused into it
    "attend": {"attend": APART},
    "o_add": {"o_add": None},
    "gate_up": {"gate_up": None},
    "down_add": {"down_add": None},
    "head": {"head": None},
    "layers and head": {**LAYERS, "head": None},  # values cross as data: a step begins with its layers
    "all": {**LAYERS, "head": None, "qkv": None, "embed": None},
}


def spec_without(case: str) -> Spec:
    return child("qwen3", fusions=WITHOUT[case])
