"""The JSON Schema of spec files, for editors: made from the models and the operators, checked in beside this file.

It judges a file by itself. A file that extends another may leave out what it inherits and delete with null, so nothing
below the top level is required here; `mpk-spec validate` knows better.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mpk_spec.ops import Op, public_ops
from mpk_spec.schema.models import Repeat, SpecFile

FILE = Path(__file__).with_name("spec-v1.schema.json")
_MAPS = ("dims", "values", "state", "blocks", "fusions", "checks", "sizes")


def json_schema() -> dict[str, Any]:
    """The schema as plain data."""
    schema = SpecFile.model_json_schema(by_alias=True)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "mpk-spec"
    definitions = schema["$defs"]
    properties = schema["properties"]
    properties["blocks"]["additionalProperties"]["additionalProperties"] = {
        "anyOf": [_ref("Operator"), {"type": "null"}]
    }
    properties["layers"]["additionalProperties"] = {"anyOf": [_ref("Repeat"), _ref("Operator"), {"type": "null"}]}
    definitions["Repeat"] = Repeat.model_json_schema(by_alias=True)
    ops = public_ops()
    for name in sorted(ops):
        definitions[f"op_{name}"] = _operator(name, ops[name])
    definitions["Operator"] = {
        "description": "an operator: its key, its input, its parameters",
        "anyOf": [_ref(f"op_{name}") for name in sorted(ops)] + [_change(ops)],
    }
    for definition in definitions.values():
        _relax(definition)
    schema["required"] = ["spec", "name", "model"]
    schema["if"] = {"not": {"required": ["extends"]}}
    schema["then"] = {"required": ["weights", "blocks", "layers"]}
    return _nullable(schema)


def text() -> str:
    """The checked-in file's content."""
    return json.dumps(json_schema(), indent=1, sort_keys=True) + "\n"


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{name}"}


def _operator(name: str, op: type[Op]) -> dict[str, Any]:
    made = op.model_json_schema(by_alias=True)
    made.pop("$defs", None)
    made["title"] = name
    made["properties"]["when"] = _WHEN
    made["required"] = [name]
    return made


_WHEN = {"type": ["string", "boolean"], "description": "where this is false, the first operand takes its place"}


def _change(ops: dict[str, type[Op]]) -> dict[str, Any]:
    """A change to an inherited operator: parameters without the operator's own key."""
    fields = {field.alias or n for op in ops.values() for n, field in op.model_fields.items()} - set(ops)
    return {
        "title": "a change to an inherited operator",
        "type": "object",
        "properties": {name: {} for name in sorted(fields)} | {"when": _WHEN},
        "additionalProperties": False,
    }


def _relax(definition: dict[str, Any]) -> None:
    """What a definition requires may be inherited; an operator's own key stays required."""
    if definition.get("title") != definition.get("required", [None])[0]:
        definition.pop("required", None)


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    """Entries of the maps can be null: that deletes what was inherited."""
    for name in _MAPS:
        inner = schema["properties"][name].get("additionalProperties")
        if inner is not None:
            schema["properties"][name]["additionalProperties"] = {"anyOf": [inner, {"type": "null"}]}
    for definition in schema["$defs"].values():
        inner = definition.get("additionalProperties")
        if isinstance(inner, dict):
            definition["additionalProperties"] = {"anyOf": [inner, {"type": "null"}]}
    return schema


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
