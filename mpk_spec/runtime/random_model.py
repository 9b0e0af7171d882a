"""Random weights for a spec: what its plan reads, drawn from a seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpk_spec.planner.plan import Plan
    from mpk_spec.schema import Spec
    from mpk_spec.weights import RandomCheckpoint


def random_checkpoint(spec: Spec, size: str, seed: int, dtype: str = "bf16") -> RandomCheckpoint:
    """A checkpoint of one of the spec's sizes, without files. The same for every degree, target and context."""
    from mpk_spec.planner import plan

    return checkpoint_of_plan(plan(spec, size=size, target="cpu", verified=False), seed, dtype)


def checkpoint_of_plan(plan: Plan, seed: int, dtype: str = "bf16") -> RandomCheckpoint:
    """Draws every tensor that `plan` reads, in the shapes that a published checkpoint would have."""
    from mpk_spec.reference.state import source_names
    from mpk_spec.weights import RandomCheckpoint, TensorSpec

    layers = max((state.layers for state in plan.states.values()), default=0)
    tensors = {}
    for weight in plan.weights.values():
        shape = weight.full_shape[1:] if weight.stack else weight.full_shape
        for layer in range(layers) if weight.per_layer else [None]:
            for name in source_names(weight, layer, plan.prefixes[0]):
                # a tied head names the embedding's tensor again; the first to name it says what it is
                tensors.setdefault(name, TensorSpec(name, tuple(shape), weight.kind, weight.offset))
    return RandomCheckpoint(seed, plan.architecture, plan.config, tensors.values(), dtype)
