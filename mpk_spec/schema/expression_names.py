"""The names inside expressions: known, defined without circles, and the layer index only where there is a layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from mpk_spec.errors import Problem, did_you_mean
from mpk_spec.schema.draft import Draft, kinds
from mpk_spec.schema.expressions import CONSTANTS, FUNCTIONS, Expression, ExpressionError, expression_of

BUILT_IN = frozenset({"config", "tokens", "context", "batch", "i"})
_IDENTIFIER = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


def placeholders(text: str) -> set[str]:
    """`i` and `e` of "layers.{i}.experts.{e}"."""
    return set(_PLACEHOLDER.findall(text))


def depending_on(defined: Mapping[str, Expression], root: str) -> frozenset[str]:
    """Those that mention `root`, directly or through others."""
    found: set[str] = set()
    while True:
        more = {n for n, e in defined.items() if n not in found and (root in e.names or e.names & found)}
        if not more:
            return frozenset(found)
        found |= more


def check(draft: Draft) -> Iterator[Problem]:
    yield from _check_definitions(draft)
    yield from _check_identifiers(draft)
    defined = draft.written("dims") | draft.written("values")
    layered = depending_on(draft.file.values, "i")
    for path, expression, allowed in _uses(draft):
        known = defined | {"config"} | allowed
        for name in sorted(expression.names - known):
            if name == "i":
                message, hint = "'i', the layer, is not known here", "it can be used in values and in blocks"
            elif name in BUILT_IN:
                message, hint = f"'{name}' is not known here", None
            else:
                message, hint = f"unknown name '{name}'", did_you_mean(name, known, "names")
            yield _at(draft, path, expression, name, message, hint)
        if "i" not in allowed:
            for name in sorted(expression.names & layered):
                hint = f"'{name}' depends on i, the layer: it can be used in blocks"
                yield _at(draft, path, expression, name, f"'{name}' differs by layer and there is no layer here", hint)


def _at(draft: Draft, path: tuple, expression: Expression, name: str, message: str, hint: str | None) -> Problem:
    return draft.problem(path, message, hint, inside=expression.positions(name)[0])


STEP, PLAN, LAYER = frozenset({"tokens"}), frozenset({"context", "batch"}), frozenset({"i"})


def _uses(draft: Draft) -> Iterator[tuple[tuple, Expression, frozenset[str]]]:
    """(path, expression, built-in names it may use besides config) of every expression in the file."""
    file = draft.file
    for section, allowed in (("dims", frozenset()), ("values", PLAN | LAYER)):
        for name, expression in getattr(file, section).items():
            yield (section, name), expression, allowed
    yield from ((path, e, frozenset()) for path, e in _inside(file.model, ("model",)))
    for name, weight in draft.weights.items():
        path = ("weights", "layer", name) if weight.layer else ("weights", name)
        for below, expression in _inside(weight, path):
            whens = LAYER if weight.layer and below[-1] == "when" else frozenset()
            yield below, expression, whens
    for section in ("state", "fusions"):
        for name, entry in getattr(file, section).items():
            yield from ((path, e, frozenset()) for path, e in _inside(entry, (section, name)))
    for name, entry in file.tensors.__pydantic_extra__.items():
        yield from ((path, e, STEP | PLAN) for path, e in _inside(entry, ("tensors", name)))
    yield from _in_operators(draft)


def _in_operators(draft: Draft) -> Iterator[tuple[tuple, Expression, frozenset[str]]]:
    """Operators' expressions; those with mistakes were reported by `operator_mistakes`."""
    for path, op, allowed in _operators(draft):
        for below, raw in operator_scalars(op):
            try:
                yield (*path, *below), expression_of(raw), allowed
            except ExpressionError:
                continue
    for (block, key), expression in draft.whens.items():
        path = ("layers", key, "when") if block == "layers" else ("blocks", block, key, "when")
        yield path, expression, PLAN | (frozenset() if block == "layers" else LAYER)


def _operators(draft: Draft) -> Iterator[tuple[tuple, Any, frozenset[str]]]:
    for block, entries in draft.blocks.items():
        yield from ((("blocks", block, key), op, PLAN | LAYER) for key, op in entries.items() if op is not None)
    yield from ((("layers", key), op, PLAN) for key, op in draft.layers.items() if op is not None)


def operator_scalars(op: BaseModel) -> Iterator[tuple[tuple, Any]]:
    """(path below the operator, raw scalar) of its expression fields that were given."""
    for field, kind in kinds(type(op)).items():
        if kind == "expr" and field in op.model_fields_set:
            yield (type(op).model_fields[field].alias or field,), getattr(op, field)


def operator_mistakes(draft: Draft) -> Iterator[Problem]:
    for path, op, _ in _operators(draft):
        for below, raw in operator_scalars(op):
            try:
                expression_of(raw)
            except ExpressionError as error:
                yield draft.problem((*path, *below), error.message, error.hint, inside=(error.offset, error.length))


def _inside(value: Any, path: tuple) -> Iterator[tuple[tuple, Expression]]:
    """All expressions in a model, with the paths of the YAML keys that lead to them."""
    if isinstance(value, Expression):
        yield path, value
    elif isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            if name in value.model_fields_set:
                yield from _inside(getattr(value, name), (*path, field.alias or name))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _inside(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _inside(item, (*path, index))


def _check_definitions(draft: Draft) -> Iterator[Problem]:
    """dims and values: one meaning per name, and no circles."""
    yield from operator_mistakes(draft)
    for name in sorted(draft.written("dims") & draft.written("values")):
        yield draft.problem(("values", name), f"'{name}' is already a dim", on="key")
    defined = {**draft.file.dims, **draft.file.values}
    left = dict(defined)
    while True:  # take away what needs nothing that is left; a circle remains
        free = [n for n, e in left.items() if not e.names & left.keys()]
        if not free:
            break
        for name in free:
            del left[name]
    while left:
        trail = [next(iter(left))]
        while (following := next(n for n in left if n in left[trail[-1]].names)) not in trail:
            trail.append(following)
        cycle = trail[trail.index(following) :]
        section = "dims" if cycle[0] in draft.file.dims else "values"
        loop = " -> ".join([*cycle, cycle[0]])
        yield draft.problem((section, cycle[0]), f"'{cycle[0]}' is defined by itself: {loop}", on="key")
        gone = set(cycle)
        while gone:  # and what only hangs on the circle
            left = {n: e for n, e in left.items() if n not in gone}
            gone = {n for n, e in left.items() if not e.names & left.keys()}


def _check_identifiers(draft: Draft) -> Iterator[Problem]:
    """Names that expressions use must look like names, and built-in ones keep their meaning."""
    taken = BUILT_IN | CONSTANTS.keys() | FUNCTIONS.keys()
    for section in ("dims", "values"):
        for name in draft.written(section):
            if name in taken:
                yield draft.problem((section, name), f"'{name}' is built in; choose another name", on="key")
            elif not _IDENTIFIER.match(name):
                yield _no_name(draft, (section, name))
    sections = [("weights",), ("weights", "layer"), ("state",), ("blocks",), ("layers",), ("fusions",)]
    sections += [("blocks", block) for block in sorted(draft.written("blocks"))]
    for path in sections:
        for name in sorted(draft.written(*path)):
            if not _IDENTIFIER.match(name):
                yield _no_name(draft, (*path, name))
    if "layers" in draft.written("blocks"):
        yield draft.problem(("blocks", "layers"), "'layers' names the top level; choose another name", on="key")


def _no_name(draft: Draft, path: tuple) -> Problem:
    return draft.problem(path, f"'{path[-1]}' is no name", "letters, digits and '_', not a digit first", on="key")
