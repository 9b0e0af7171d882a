"""A spec bound to a configuration and a degree: operators with types, before any decision about tasks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mpk_spec.ops import Op
from mpk_spec.ops.base import TensorType
from mpk_spec.planner.plan import State, Weight


@dataclass(frozen=True)
class BoundOp:
    """One operator. `name` is its address in the spec (`attention.q`), `output` the value it makes (often the same).

    `values` are its evaluated expressions; those in `per_layer` are lists with one entry per layer.
    """

    name: str
    op: Op
    inputs: tuple[str, ...]
    output: str
    weights: dict[str, str]
    values: dict[str, Any]
    per_layer: frozenset[str] = frozenset()
    path: tuple[str, ...] = ()

    def at(self, layer: int | None) -> dict[str, Any]:
        """The values of one layer."""
        return {k: v[layer or 0] if k in self.per_layer else v for k, v in self.values.items()}


@dataclass(frozen=True)
class Section:
    """Operators that run once (`layers` is None), or once per layer."""

    name: str
    ops: tuple[BoundOp, ...]
    layers: int | None = None


@dataclass
class Model:
    """Everything the later passes need of the spec. Sizes and shapes are one rank's."""

    sections: tuple[Section, ...]
    types: dict[str, TensorType]
    weights: dict[str, Weight]
    states: dict[str, State]
    dims: dict[str, int]
    carries: frozenset[str]
    config: dict[str, Any]
    tp: int
    all_reduces: int = 0
    cache_state: dict[str, str] = field(default_factory=dict)
    """Which state a cache value stands for."""
    origins: dict[str, str] = field(default_factory=dict)
    """The operator in the layers that makes a carried value: {"y": "mlp.out"}."""
    slots: dict[str, int] = field(default_factory=dict)
    """Values whose experts are claimed at run time: how many of them may be active."""
    two_shots: frozenset[str] = frozenset()
    """Addends of which each rank adds up its share and sends the sum to the others."""
    weight_chunk: int = 16 * 1024
    """Bytes of one copy of weights, at most."""
    notes: list[str] = field(default_factory=list)
