"""The vocabulary of specs: every operator that a block can use, one module each."""

from __future__ import annotations

from functools import cache

from mpk_spec.ops import attention, elementwise, embedding, experts, linear, reduce, rmsnorm, rope, sample
from mpk_spec.ops.base import REGISTRY, Op, register

__all__ = ["REGISTRY", "Op", "all_ops", "public_ops", "register"]

_BUILT_IN = (attention, elementwise, embedding, experts, linear, reduce, rmsnorm, rope, sample)
MADE_BY_PLANNER = frozenset({"attention_merge", "split_k_reduce", "argmax_partial", "argmax_reduce"})


@cache
def all_ops() -> dict[str, type[Op]]:
    """All operators by YAML key, those of other packages (entry point group `mpk_spec.ops`) included."""
    from importlib.metadata import entry_points

    for point in entry_points(group="mpk_spec.ops"):
        point.load()
    return dict(REGISTRY)


def public_ops() -> dict[str, type[Op]]:
    """The operators that a spec may write."""
    return {name: op for name, op in all_ops().items() if name not in MADE_BY_PLANNER}
