"""A loaded spec: validated, `extends` resolved, and every value knows where it was written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mpk_spec.errors import Position, Problem
from mpk_spec.ops import Op
from mpk_spec.schema.expressions import Expression
from mpk_spec.schema.models import Fusion, ModelSection, Repeat, Rule, StateDecl, TensorDecl, WeightDecl
from mpk_spec.schema.nodes import Node


@dataclass(frozen=True)
class Size:
    """A configuration in config.json's keys, `common` merged in, and where its weights come from, best first."""

    config: dict[str, Any]
    weights: tuple[str, ...] = ()


@dataclass(frozen=True)
class Check:
    """One of the spec's own regression tests."""

    kind: str
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Spec:
    """What a spec file says. Two specs are equal when they say the same, wherever they were written.

    blocks and layers are in order of computation. op_when[(block, key)] holds the `when:` of operators that have one,
    with "layers" as the block of top-level ones: where it is false, the operator is left out and its first operand
    takes its place. per_layer: the names in `values` whose value depends on the layer.
    """

    path: Path = field(compare=False)
    spec: Literal["v1"]
    name: str
    model: ModelSection
    dims: dict[str, Expression]
    values: dict[str, Expression]
    shard: dict[str, dict[str, str]]
    weights: dict[str, WeightDecl]
    state: dict[str, StateDecl]
    tensor_default: TensorDecl
    tensors: dict[str, TensorDecl]
    blocks: dict[str, dict[str, Op]]
    layers: dict[str, Op | Repeat]
    op_when: dict[tuple[str, str], Expression]
    fusions: dict[str, Fusion]
    schedule: list[Rule]
    sizes: dict[str, Size]
    checks: dict[str, Check]
    per_layer: frozenset[str]
    tree: Node = field(compare=False, repr=False)

    def position(self, *path: Any, on: Literal["value", "key"] = "value") -> Position:
        """Where `path` was written, as in ("blocks", "attention", "q", "weight"); of a missing end, what holds it."""
        return self._node(path, on).place()

    def problem(
        self,
        path: tuple,
        message: str,
        hint: str | None = None,
        on: Literal["value", "key"] = "value",
        inside: tuple[int, int] | None = None,
    ) -> Problem:
        """A problem with the place and the line where `path` was written; `inside`: (offset, length) in the scalar."""
        return self._node(path, on).problem(message, hint, inside)

    def _node(self, path: tuple, on: str) -> Node:
        path = self._written_at(path)
        return self.tree.key_at(path) if on == "key" else self.tree.at(path)

    def _written_at(self, path: tuple) -> tuple:
        """`weights.q_proj` may stand under `weights.layer`, and a size's key under `sizes.common`."""
        if len(path) > 1 and path[0] == "weights" and path[1] in self.weights and self.weights[path[1]].layer:
            return ("weights", "layer", *path[1:])
        if len(path) > 2 and path[0] == "sizes" and self.tree.at(path[:2]).child(path[2]) is None:
            common = ("sizes", "common", *path[2:])
            return common if self.tree.at(common[:2]).child(path[2]) is not None else path
        return path

    def resolved_yaml(self) -> str:
        """The whole spec as one file that extends nothing: loading it gives an equal Spec."""
        from mpk_spec.schema.writer import written

        return written(self.tree)
