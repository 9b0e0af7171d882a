"""pydantic's errors in the words and positions of the YAML file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from mpk_spec.errors import Problem, did_you_mean
from mpk_spec.schema.nodes import Node

_TYPES = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "none_required": "nothing",
    "list_type": "a list",
    "dict_type": "a map",
    "model_type": "a map",
    "model_attributes_type": "a map",
    "expression_type": "a number or an expression",
    "is_instance_of": "another type",
}


def translated(
    error: ValidationError, model: type[BaseModel], tree: Node, prefix: tuple = ()
) -> Iterator[tuple[tuple, Problem]]:
    """(path in the tree, problem) for each mistake; `model` was validated against the node at `prefix`."""
    alternatives: dict[tuple, list[dict[str, Any]]] = {}
    for entry in error.errors(include_url=False, include_input=False):
        path, is_key = _in_tree(entry, tree, prefix)
        alternatives.setdefault((path, is_key), []).append(entry)
    for (path, is_key), entries in alternatives.items():
        yield path, _problem(entries, model, tree, prefix, path, is_key)


def _in_tree(entry: dict[str, Any], tree: Node, prefix: tuple) -> tuple[tuple, bool]:
    """Where the entry points, without pydantic's own parts (union members, '[key]'), and whether it is about a key."""
    path, node, is_key = prefix, tree.at(prefix), False
    location = list(entry["loc"])
    for index, part in enumerate(location):
        if part == "[key]":
            return path, True
        below = node.child(part)
        last = index == len(location) - 1
        if below is None:
            if last and entry["type"] == "missing":
                return (*path, part), False
            continue
        path, node = (*path, part), below
    return path, is_key


def _problem(
    entries: list[dict], model: type[BaseModel], tree: Node, prefix: tuple, path: tuple, is_key: bool
) -> Problem:
    entry = entries[0]
    kind, context, node = entry["type"], entry.get("ctx", {}), tree.at(path)
    name = path[-1] if path else ""
    if kind == "missing":
        holder = tree.at(path[:-1]) if len(path) > 1 and isinstance(path[-2], int) else tree.key_at(path[:-1])
        return holder.problem(f"{_owner(path)} has no '{name}'", _what_for(model, path[len(prefix) :]))
    if kind == "extra_forbidden":
        known = _keys_at(model, path[len(prefix) : -1])
        where = f" in '{path[-2]}'" if len(path) > 1 and isinstance(path[-2], str) else ""
        return tree.key_at(path).problem(f"unknown key '{name}'{where}", did_you_mean(str(name), known, "keys"))
    if kind == "expression":
        return node.problem(context["said"], context["hint"] or None, (context["offset"], context["length"]))
    if kind == "literal_error":
        allowed = [part.strip("'") for part in context["expected"].replace(" or ", ", ").split(", ")]
        where = tree.key_at(path) if is_key else node
        label = f"unknown key '{name}'" if is_key else f"'{name}' cannot be {_shown(node)}"
        return where.problem(
            label, did_you_mean(str(name if is_key else node.value), allowed, "keys" if is_key else "values")
        )
    if kind in ("too_short", "string_too_short"):
        least = context.get("min_length", 1)
        what = "empty" if least == 1 else f"too short: it needs {least} items"
        return node.problem(f"'{name}' is {what}")
    if kind == "too_long":
        return node.problem(
            f"'{name}' is too long: it takes {context['max_length']} items, got {context['actual_length']}"
        )
    if kind == "expected":
        return node.problem(f"'{name}' must be {context['what']}")
    wanted = list(dict.fromkeys(_TYPES[e["type"]] for e in entries if e["type"] in _TYPES))
    if wanted:
        if len(wanted) > 2 and "text" in wanted:  # a scalar of any kind: an operator's expression
            wanted = ["a number or an expression"]
        return node.problem(f"'{name}' must be {' or '.join(wanted)}, this is {node.kind}")
    return node.problem(f"'{name}': {entry['msg'][:1].lower()}{entry['msg'][1:]}")


def _owner(path: tuple) -> str:
    """What a missing key is missing from."""
    if len(path) == 1:
        return "the spec"
    *outer, last = path[:-1]
    if isinstance(last, int):
        return f"item {last + 1} of '{'.'.join(map(str, outer))}'"
    return f"'{'.'.join(map(str, path[:-1]))}'"


def _shown(node: Node) -> str:
    return f"'{node.value}'" if isinstance(node.value, (str, int, float)) else node.kind


def _model_at(model: type[BaseModel], path: tuple) -> type[BaseModel] | None:
    """The model that reads the map at `path` below one read by `model`."""
    current: Any = model
    for part in path:
        if isinstance(current, type) and issubclass(current, BaseModel):
            field = next((f for n, f in current.model_fields.items() if part in (n, f.alias)), None)
            current = field.annotation if field else _extra_type(current)
        else:
            arguments = get_args(current)
            current = arguments[-1] if arguments else None
        current = _unwrapped(current)
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def _extra_type(model: type[BaseModel]) -> Any:
    from typing import get_type_hints

    hints = get_type_hints(model).get("__pydantic_extra__")
    return get_args(hints)[1] if hints else None


def _unwrapped(annotation: Any) -> Any:
    """`X` of `X | None`."""
    arguments = [a for a in get_args(annotation) if a is not type(None)]
    has_none = len(arguments) < len(get_args(annotation))
    return _unwrapped(arguments[0]) if has_none and len(arguments) == 1 else annotation


def _keys_at(model: type[BaseModel], path: tuple) -> list[str]:
    found = _model_at(model, path)
    return [f.alias or n for n, f in found.model_fields.items()] if found else []


def _what_for(model: type[BaseModel], path: tuple) -> str | None:
    """The description of a missing field."""
    found = _model_at(model, path[:-1])
    if found is None:
        return None
    field = next((f for n, f in found.model_fields.items() if path[-1] in (n, f.alias)), None)
    if field is None:
        return None
    inner = _unwrapped(field.annotation)
    is_model = isinstance(inner, type) and issubclass(inner, BaseModel)
    said = field.description or (inner.__doc__ if is_model else None)
    return f"{path[-1]}: {said[:1].lower()}{said[1:].rstrip('.')}" if said else None
