"""A spec whose sections are read and whose names are not checked yet, and how to walk over its references."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel

from mpk_spec.errors import Problem
from mpk_spec.ops import Op
from mpk_spec.ops.base import Kind
from mpk_spec.schema.models import Repeat, SpecFile, WeightDecl
from mpk_spec.schema.nodes import Node

BLOCK_INPUT, BLOCK_RESULT, MODEL_INPUT = "x", "out", "token_ids"


@dataclass(frozen=True)
class Draft:
    """A spec before its names are checked; operators that could not be read are None."""

    tree: Node
    file: SpecFile
    ops: Mapping[str, type[Op]]
    blocks: Mapping[str, Mapping[str, Op | None]]
    layers: Mapping[str, Op | Repeat | None]
    weights: Mapping[str, WeightDecl]
    whens: Mapping[tuple[str, str], Any]
    broken: frozenset[tuple]

    def written(self, *path: Any) -> set[str]:
        """The keys of the map at `path`, right or wrong."""
        node = self.tree
        for key in path:
            node = node.child(key) if node is not None else None
        return set(node.value) if node is not None and isinstance(node.value, dict) else set()

    @property
    def layer_weights(self) -> set[str]:
        return self.written("weights", "layer") - {"prefix"}

    @property
    def model_weights(self) -> set[str]:
        return self.written("weights") - {"layer"}

    def problem(self, path: tuple, message: str, hint: str | None = None, on: str = "value", inside=None) -> Problem:
        node = self.tree.key_at(path) if on == "key" else self.tree.at(path)
        return node.problem(message, hint, inside)


@cache
def kinds(model: type[BaseModel]) -> dict[str, str]:
    """What the fields of an operator hold, by their names in Python: 'value', 'weight', 'state' or 'expr'."""
    found = {}
    for name, field in model.model_fields.items():
        marks = [m for m in field.metadata if isinstance(m, Kind)] or list(_marks(field.annotation))
        if marks:
            found[name] = marks[0].of
    return found


def _marks(annotation: Any) -> Iterator[Kind]:
    yield from (m for m in getattr(annotation, "__metadata__", ()) if isinstance(m, Kind))
    for inner in get_args(annotation):
        yield from _marks(inner)


def references(op: Op | Repeat, kind: str) -> Iterator[tuple[tuple, str]]:
    """(path below the operator, name) of all its references of one kind."""
    for field, of in kinds(type(op)).items():
        given = getattr(op, field, None)  # an operator with mistakes lacks fields
        if of != kind or given is None:
            continue
        key = type(op).model_fields[field].alias or field
        if isinstance(given, list):
            yield from (((key, index), name) for index, name in enumerate(given))
        else:
            yield (key,), given


def reads(op: Op | Repeat | None) -> list[str]:
    """The values that it reads."""
    return [] if op is None else [name for _, name in references(op, "value")]


def scopes(draft: Draft) -> Iterator[tuple[tuple, Mapping[str, Op | Repeat | None], str]]:
    """(path, entries, name of the value that is there from the start) of each block and of the top level."""
    for name, block in draft.blocks.items():
        yield ("blocks", name), block, BLOCK_INPUT
    yield ("layers",), draft.layers, MODEL_INPUT


def operators(draft: Draft) -> set[str]:
    """All operators by the names that fusions and the schedule use: `attention.q`, and plain names at the top level."""
    blocks = {block: draft.written("blocks", block) | {BLOCK_RESULT} for block in draft.written("blocks")}
    inner = {f"{block}.{key}" for block, keys in blocks.items() for key in keys}
    top = {k for k in draft.written("layers") if not isinstance(draft.layers.get(k), Repeat)}
    return inner | top


def is_broken(draft: Draft, path: tuple) -> bool:
    return any(path[: len(b)] == b or b[: len(path)] == path for b in draft.broken)
