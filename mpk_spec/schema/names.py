"""Names: everything that a spec refers to exists, is computed before it is used, and is used.

Needs no config. What is broken already (`Draft.broken`) is not blamed again, and "nothing reads it" is only said where
every reader could be understood.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mpk_spec.errors import Problem, did_you_mean
from mpk_spec.ops import Op
from mpk_spec.schema import expression_names as exprs
from mpk_spec.schema import groups
from mpk_spec.schema.draft import BLOCK_RESULT, Draft, is_broken, reads, references, scopes
from mpk_spec.schema.models import Repeat, SpecFile
from mpk_spec.schema.nodes import shown


def check(draft: Draft) -> list[Problem]:
    """Everything wrong with names."""
    problems = [
        *exprs.check(draft),
        *_check_weights(draft),
        *_check_dims(draft),
        *_check_operators(draft),
        *_check_layers(draft),
        *groups.check(draft),
    ]
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
    if layer is not None and "{i}" not in layer.prefix and not is_broken(draft, prefix_path):
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


def _check_operators(draft: Draft) -> Iterator[Problem]:
    for path, entries, start in scopes(draft):
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
        where = [p[1] for p, entries, _ in scopes(draft) if p[0] == "blocks" and name in entries]
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
    if not samples and None not in draft.layers.values() and not is_broken(draft, ("layers",)):
        hint = "add for instance 'next_ids: {sample: logits}'"
        yield draft.problem(("layers",), "the model does not end in 'sample'", hint, on="key")
    for key in samples[1:]:
        yield draft.problem(("layers", key), f"a second 'sample'; the first is '{samples[0]}'", on="key")


# ---- what nothing reads


def _check_unused(draft: Draft, has_problems: bool) -> Iterator[Problem]:
    ops = [op for _, entries, _ in scopes(draft) for op in entries.values()]
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
    for path, entries, _ in scopes(draft):
        used = {name for op in entries.values() for name in reads(op)} | {BLOCK_RESULT}
        for key, op in entries.items():
            if key not in used and not (isinstance(op, Op) and op.op == "sample"):
                hint = _drop_hint(draft, (*path, key))
                yield draft.problem((*path, key), f"value '{key}' is used by nothing", hint, on="key")


def _drop_hint(draft: Draft, path: tuple) -> str | None:
    """How to get rid of an inherited entry."""
    written, own = draft.tree.key_at(path).source, draft.tree.source
    return f"in {own.shown}, '{path[-1]}: null' drops it" if written.path != own.path and shown(own.path) else None


def per_layer(file: SpecFile) -> frozenset[str]:
    """Names of values whose value depends on the layer index."""
    return exprs.depending_on(file.dims | file.values, "i")
