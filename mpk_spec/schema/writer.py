"""A tree of nodes back to YAML text: a block per section, one line per entry where it fits."""

from __future__ import annotations

import json
import re

from mpk_spec.schema.nodes import Node, plain_scalar

WIDTH = 120
ORDER = [
    *("spec", "name", "model", "dims", "values", "shard", "weights", "state", "tensors"),
    *("blocks", "layers", "fusions", "schedule", "sizes", "checks"),
]
_UNSAFE = re.compile(
    r"^[^\w/.(+-]|^-($| )|[,\[\]{}\n\\]|:($| )| #|:$"
)  # what a plain scalar cannot hold, flow style included


def written(tree: Node) -> str:
    """YAML of a merged tree, without `extends`."""
    names = sorted(
        (k for k in tree.value if k != "extends"), key=lambda k: ORDER.index(k) if k in ORDER else len(ORDER)
    )
    return "".join(_entry(name, tree.value[name], 0) for name in names)


def _entry(key: str | int, node: Node, indent: int) -> str:
    pad = "  " * indent
    flat = f"{pad}{_key(key)}: {_flat(node)}\n"
    deep = indent == 0 and isinstance(node.value, (dict, list)) and node.value
    if not deep and (len(flat) <= WIDTH or not isinstance(node.value, (dict, list))):
        return flat
    if isinstance(node.value, dict):
        return f"{pad}{_key(key)}:\n" + "".join(_entry(k, child, indent + 1) for k, child in node.value.items())
    return f"{pad}{_key(key)}:\n" + "".join(_item(child, indent + 1) for child in node.value)


def _item(node: Node, indent: int) -> str:
    pad = "  " * indent
    flat = f"{pad}- {_flat(node)}\n"
    if len(flat) <= WIDTH or not isinstance(node.value, dict) or not node.value:
        return flat
    body = "".join(_entry(k, child, indent + 1) for k, child in node.value.items())
    return f"{pad}- {body[len(pad) + 2 :]}"


def _flat(node: Node) -> str:
    if isinstance(node.value, dict):
        return "{" + ", ".join(f"{_key(k)}: {_flat(child)}" for k, child in node.value.items()) + "}"
    if isinstance(node.value, list):
        return "[" + ", ".join(_flat(child) for child in node.value) + "]"
    if isinstance(node.value, str):
        return as_text(node.value)
    return node.raw or "null"


def _key(key: str | int) -> str:
    return str(key) if isinstance(key, int) else as_text(key)


def as_text(text: str) -> str:
    """Bare where it would be read back as the same text, else quoted."""
    is_plain = not _UNSAFE.search(text) and text == text.strip() and text.isprintable() and plain_scalar(text) == text
    return text if text and is_plain else json.dumps(text, ensure_ascii=False)
