"""Names: everything that a spec refers to exists, is computed before it is used, and is used.

Needs no config. What is broken already (`Draft.broken`) is not blamed again, and "nothing reads it" is only said where
every reader could be understood.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel

from mpk_spec.errors import Problem, did_you_mean
from mpk_spec.ops import Op
from mpk_spec.ops.base import Kind
from mpk_spec.schema import expression_names as exprs
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


def check(draft: Draft) -> list[Problem]:
    """Everything wrong with names."""
    problems = [
        *exprs.check(draft),
        *_check_weights(draft),
        *_check_dims(draft),
        *_check_operators(draft),
    ]
    problems += _check_layers(draft)
    problems += _check_fusions(draft)
    problems += _check_tensors(draft)
    problems += _check_schedule(draft)
    problems += _check_sizes_named(draft)
    return [*_once_each(problems), *_check_unused(draft, bool(problems))]


def _once_each(problems: list[Problem]) -> list[Problem]:
    """One problem per unknown name, at its first use: what is missing is missing once."""
    places: dict[str, list[Problem]] = {}
    for problem in problems:
        key = problem.message if problem.message.startswith("unknown ") else f"{problem.message} {problem.position}"
        places.setdefault(key, []).append(problem)
    return [_with_count(min(same, key=lambda p: p.position), len(same) - 1) for same in places.values()]


def _with_count(first: Problem, others: int) -> Problem:
    if not others:
        return first
    return replace(first, message=f"{first.message} (and in {others} more place{'s' * (others > 1)})")


# ---- weights, states, dims


def _check_weights(draft: Draft) -> Iterator[Problem]:
    every = draft.model_weights | draft.layer_weights
    for name in sorted(draft.model_weights & draft.layer_weights):
        yield draft.problem(("weights", "layer", name), f"weight '{name}' exists already outside of 'layer'", on="key")
    layer = draft.file.weights.layer
    prefix_path = ("weights", "layer", "prefix")
    if layer is not None and "{i}" not in layer.prefix and not _is_broken(draft, prefix_path):
        yield draft.problem(prefix_path, "the prefix has no '{i}': all layers would read the same tensors")
    for name, weight in draft.weights.items():
        path = ("weights", "layer", name) if weight.layer else ("weights", name)
        if weight.tie and weight.tie.to not in every - {name}:
            hint = did_you_mean(weight.tie.to, every - {name}, "weights")
            yield draft.problem((*path, "tie", "to"), f"unknown weight '{weight.tie.to}'", hint)
        stacked = set(weight.stack or ())
        wanted = exprs.placeholders(weight.from_) - ({"i"} if weight.layer else set())
        for key in sorted(wanted - stacked):
            why = "this weight is not under 'layer'" if key == "i" else f"add 'stack: {{{key}: ...}}'"
            yield draft.problem((*path, "from"), f"nothing says what '{{{key}}}' runs over", why)
        for key in sorted(stacked - wanted):
            yield draft.problem((*path, "stack", key), f"'from' has no '{{{key}}}'", on="key")


def _check_dims(draft: Draft) -> Iterator[Problem]:
    dims = draft.written("dims")
    for name in draft.file.shard.get("tp", {}):
        if name not in dims:
            hint = did_you_mean(name, dims, "dims")
            yield draft.problem(("shard", "tp", name), f"unknown dim '{name}'", hint, on="key")
    for name, state in draft.file.state.items():
        for index, dim in enumerate(state.per):
            if dim not in dims | {"context", "batch"}:
                hint = did_you_mean(dim, dims | {"context", "batch"}, "dims")
                yield draft.problem(("state", name, "per", index), f"unknown dim '{dim}'", hint)


# ---- operators


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


def _scopes(draft: Draft) -> Iterator[tuple[tuple, Mapping[str, Op | Repeat | None], str]]:
    """(path, entries, name of the value that is there from the start) of each block and of the top level."""
    for name, block in draft.blocks.items():
        yield ("blocks", name), block, BLOCK_INPUT
    yield ("layers",), draft.layers, MODEL_INPUT


def _check_operators(draft: Draft) -> Iterator[Problem]:
    for path, entries, start in _scopes(draft):
        if start in entries:
            yield draft.problem((*path, start), f"'{start}' is the input here and cannot be assigned", on="key")
        known = draft.written(*path) | {start}
        for key, op in entries.items():
            if op is None:
                continue
            yield from _check_values(draft, (*path, key), op, known)
            yield from _check_weight_refs(draft, (*path, key), op)
            for below, name in references(op, "state"):
                if name not in draft.written("state"):
                    hint = did_you_mean(name, draft.written("state"), "states")
                    yield draft.problem((*path, key, *below), f"unknown state '{name}'", hint)
            if path[0] == "blocks" and isinstance(op, Op) and op.op == "sample":
                yield draft.problem((*path, key), "'sample' ends the model: it belongs under 'layers'", on="key")
        for cycle in _cycles({key: op for key, op in entries.items() if key != start}):
            loop = " -> ".join([*cycle, cycle[0]])
            yield draft.problem((*path, cycle[0]), f"values that need each other: {loop}", on="key")
        if path[0] == "blocks" and BLOCK_RESULT not in draft.written(*path):
            yield draft.problem(
                path, f"block '{path[1]}' has no '{BLOCK_RESULT}'", "name its last value 'out'", on="key"
            )


def _check_values(draft: Draft, path: tuple, op: Op | Repeat, known: set[str]) -> Iterator[Problem]:
    for below, name in references(op, "value"):
        if name in known:
            continue
        where = [p[1] for p, entries, _ in _scopes(draft) if p[0] == "blocks" and name in entries]
        hint = did_you_mean(name, known - {path[-1]}, "values here")
        if where and not hint.startswith("did"):
            hint = f"'{name}' is in block '{where[0]}'; a block sees its own values and 'x'"
        yield draft.problem((*path, *below), f"unknown value '{name}'", hint)


def _check_weight_refs(draft: Draft, path: tuple, op: Op | Repeat) -> Iterator[Problem]:
    here = draft.model_weights | (draft.layer_weights if path[0] == "blocks" else set())
    for below, name in references(op, "weight"):
        if name in here:
            continue
        if name in draft.layer_weights:
            yield draft.problem((*path, *below), f"weight '{name}' exists once per layer", "only blocks can read it")
        else:
            yield draft.problem((*path, *below), f"unknown weight '{name}'", did_you_mean(name, here, "weights"))


def in_order(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Entries so that each comes after what it reads, otherwise as written."""
    ordered: dict[str, Any] = {}
    waiting = dict(entries)
    while waiting:
        ready = next((k for k, op in waiting.items() if not any(n in waiting for n in reads(op))), None)
        if ready is None:
            return ordered | waiting  # a cycle, reported by its own check
        ordered[ready] = waiting.pop(ready)
    return ordered


def _cycles(entries: Mapping[str, Op | Repeat | None]) -> Iterator[list[str]]:
    """Values that need each other, each cycle once, from its first written value on."""
    done: set[str] = set()
    for start in entries:
        trail: list[str] = []
        stack = [(start, 0)]
        while stack:  # depth first, with the way from `start` in `trail`
            name, step = stack.pop()
            del trail[step:]
            if name in trail:
                cycle = trail[trail.index(name) :]
                if not done & set(cycle):
                    first = min(range(len(cycle)), key=lambda n: list(entries).index(cycle[n]))
                    yield cycle[first:] + cycle[:first]
                done |= set(cycle)
            elif name in entries and name not in done:
                trail.append(name)
                stack += [(needed, len(trail)) for needed in reads(entries[name])]
        done |= set(trail) | {start}


# ---- layers


def _check_layers(draft: Draft) -> Iterator[Problem]:
    dims, blocks = draft.written("dims"), draft.written("blocks")
    for key, op in draft.layers.items():
        if not isinstance(op, Repeat):
            continue
        if getattr(op, "over", None) not in {None, *dims}:
            hint = did_you_mean(op.over, dims, "dims")
            yield draft.problem(("layers", key, "over"), f"unknown dim '{op.over}'", hint)
        for index, name in enumerate(getattr(op, "blocks", ())):
            if name not in blocks:
                hint = did_you_mean(name, blocks, "blocks")
                yield draft.problem(("layers", key, "blocks", index), f"unknown block '{name}'", hint)
    samples = [key for key, op in draft.layers.items() if isinstance(op, Op) and op.op == "sample"]
    if not samples and None not in draft.layers.values() and not _is_broken(draft, ("layers",)):
        hint = "add for instance 'next_ids: {sample: logits}'"
        yield draft.problem(("layers",), "the model does not end in 'sample'", hint, on="key")
    for key in samples[1:]:
        yield draft.problem(("layers", key), f"a second 'sample'; the first is '{samples[0]}'", on="key")


# ---- fusions, tensors, schedule, sizes


def operators(draft: Draft) -> set[str]:
    """All operators by the names that fusions and the schedule use: `attention.q`, and plain names at the top level."""
    blocks = {block: draft.written("blocks", block) | {BLOCK_RESULT} for block in draft.written("blocks")}
    inner = {f"{block}.{key}" for block, keys in blocks.items() for key in keys}
    top = {k for k in draft.written("layers") if not isinstance(draft.layers.get(k), Repeat)}
    return inner | top


def _unknown(draft: Draft, name: str, known: set[str], kind: str) -> tuple[str, str]:
    """Message and hint: an unknown block is one mistake, however many of its operators are named."""
    block, dot, _ = name.rpartition(".")
    blocks = draft.written("blocks")
    if dot and block not in blocks and "." not in block and block not in known:
        return f"unknown block '{block}'", did_you_mean(block, blocks, "blocks")
    return f"unknown {kind} '{name}'", did_you_mean(name, known, f"{kind.split()[0]}s")


def _check_fusions(draft: Draft) -> Iterator[Problem]:
    known = operators(draft)
    owner: dict[str, str] = {}
    for name, fusion in draft.file.fusions.items():
        homes = set()
        for index, member in enumerate(fusion.of):
            path = ("fusions", name, "of", index)
            if member not in known:
                yield draft.problem(path, *_unknown(draft, member, known, "operator"))
                continue
            if member in owner:
                where = f"fusion '{owner[member]}'" if owner[member] != name else "this fusion"
                yield draft.problem(path, f"'{member}' is already in {where}", "an operator is computed in one fusion")
            owner.setdefault(member, name)
            homes.add(member.rpartition(".")[0])
        if len(homes) > 1:
            said = " and ".join(f"block '{h}'" if h else "the top level" for h in sorted(homes))
            yield draft.problem(
                ("fusions", name, "of"), f"fusion '{name}' has operators of {said}", "a fusion stays in one block"
            )
        yield from _check_into(draft, name, homes)


def _check_into(draft: Draft, name: str, homes: set[str]) -> Iterator[Problem]:
    into = draft.file.fusions[name].into
    if into is None:
        return
    path = ("fusions", name, "into")
    others = draft.written("fusions") - {name}
    if into not in others:
        yield draft.problem(path, f"unknown fusion '{into}'", did_you_mean(into, others, "fusions"))
    elif homes and homes != {""}:
        hint = "'into' puts operators from before the layers into the first layer's fusion"
        yield draft.problem(path, f"'{name}' is inside a block", hint)


def _check_tensors(draft: Draft) -> Iterator[Problem]:
    known = operators(draft) | {k for k, op in draft.layers.items() if isinstance(op, Repeat)}
    for name in draft.file.tensors.__pydantic_extra__:
        if name not in known:
            yield draft.problem(("tensors", name), *_unknown(draft, name, known, "value"), on="key")


_DERIVED = {"merge": "attention", "reduce": "linear", "all_reduce": None, "partial": "sample"}


def _check_schedule(draft: Draft) -> Iterator[Problem]:
    fused = {member: name for name, fusion in draft.file.fusions.items() for member in fusion.of}
    known = (operators(draft) - set(fused)) | draft.written("fusions")
    for index, rule in enumerate(draft.file.schedule):
        for group in rule.set:
            base, _, derived = group.rpartition(".")
            if group in known | {"*"} or (derived in _DERIVED and base in known | set(fused)):
                continue
            path = ("schedule", index, "set", group)
            if group in fused:
                hint = f"write '{fused[group]}'"
                yield draft.problem(path, f"'{group}' is computed in fusion '{fused[group]}'", hint, on="key")
            else:
                yield draft.problem(path, *_unknown(draft, group, known, "operator or fusion"), on="key")


def _check_sizes_named(draft: Draft) -> Iterator[Problem]:
    sizes = draft.written("sizes") - {"common"}
    for name, given in draft.file.checks.items():
        size = given.__pydantic_extra__.get("size")
        if size is not None and size not in sizes:
            hint = did_you_mean(str(size), sizes, "sizes")
            yield draft.problem(("checks", name, "size"), f"unknown size '{size}'", hint)


# ---- what nothing reads


def _check_unused(draft: Draft, has_problems: bool) -> Iterator[Problem]:
    ops = [op for _, entries, _ in _scopes(draft) for op in entries.values()]
    if has_problems or draft.broken or None in ops:
        return  # the reader may be what is broken
    read = {name for op in ops for _, name in references(op, "weight")}
    for name, weight in draft.weights.items():
        if name not in read:
            path = ("weights", "layer", name) if weight.layer else ("weights", name)
            yield draft.problem(path, f"weight '{name}' is read by no operator", _drop_hint(draft, path), on="key")
    states = {name for op in ops for _, name in references(op, "state")}
    for name in draft.file.state:
        if name not in states:
            yield draft.problem(("state", name), f"state '{name}' is used by no operator", on="key")
    repeated = {name for op in draft.layers.values() if isinstance(op, Repeat) for name in op.blocks}
    for name in draft.file.blocks:
        if name not in repeated:
            hint = _drop_hint(draft, ("blocks", name)) or "list it in a 'repeat'"
            yield draft.problem(("blocks", name), f"block '{name}' is repeated nowhere", hint, on="key")
    for path, entries, _ in _scopes(draft):
        used = {name for op in entries.values() for name in reads(op)} | {BLOCK_RESULT}
        for key, op in entries.items():
            if key not in used and not (isinstance(op, Op) and op.op == "sample"):
                hint = _drop_hint(draft, (*path, key))
                yield draft.problem((*path, key), f"value '{key}' is used by nothing", hint, on="key")


def _drop_hint(draft: Draft, path: tuple) -> str | None:
    """How to get rid of an inherited entry."""
    from mpk_spec.schema.nodes import shown

    written, own = draft.tree.key_at(path).source, draft.tree.source
    return f"in {own.shown}, '{path[-1]}: null' drops it" if written.path != own.path and shown(own.path) else None


def _is_broken(draft: Draft, path: tuple) -> bool:
    return any(path[: len(b)] == b or b[: len(path)] == path for b in draft.broken)


def per_layer(file: SpecFile) -> frozenset[str]:
    """Names of values whose value depends on the layer index."""
    return exprs.depending_on(file.dims | file.values, "i")
