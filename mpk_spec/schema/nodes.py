"""A spec file as a tree whose every key and value knows where it was written.

Plain values come out by `Node.data()`; problems point at nodes by `Node.place()`. Trees of several files are merged by
`extends`, so each node carries its own source.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mpk_spec.errors import Position, Problem

Path_ = tuple[Any, ...]  # keys and list indices from the root of a tree


@dataclass(frozen=True, eq=False)
class Source:
    """A file's text: `shown` is how messages name it, relative to the working directory where it lies below it."""

    path: Path
    shown: str
    lines: tuple[str, ...]

    @staticmethod
    def of(path: Path, text: str) -> Source:
        return Source(path, shown(path), tuple(text.splitlines()))


def shown(path: Path) -> str:
    """A path as messages name it: as given when relative, else relative to the working directory if that is shorter."""
    text = os.path.normpath(path)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return text


@dataclass(eq=False)
class Node:
    """`value` is a dict of (key, Node), a list of Node, or a scalar; `raw` is a scalar's text, `style` its quotes."""

    source: Source
    line: int  # from 0
    column: int  # from 0
    length: int
    value: dict[Any, Node] | list[Node] | str | int | float | bool | None
    raw: str = ""
    style: Literal["", "'", '"', "|", ">"] = ""
    keys: dict[Any, Node] = field(default_factory=dict)  # for maps: the node of each key

    @property
    def kind(self) -> str:
        """What it is, in words for messages."""
        if isinstance(self.value, dict):
            return "a map"
        if isinstance(self.value, list):
            return "a list"
        if self.value is None:
            return "null"
        if isinstance(self.value, bool):
            return "true or false"
        return "text" if isinstance(self.value, str) else "a number"

    def data(self) -> Any:
        """Plain dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: child.data() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.data() for child in self.value]
        return self.value

    def items(self) -> Iterator[tuple[Any, Node]]:
        """The children of a map or list; none of a scalar."""
        if isinstance(self.value, dict):
            yield from self.value.items()
        elif isinstance(self.value, list):
            yield from enumerate(self.value)

    def child(self, key: Any) -> Node | None:
        if isinstance(self.value, dict):
            return self.value.get(key)
        if isinstance(self.value, list) and isinstance(key, int) and key < len(self.value):
            return self.value[key]
        return None

    def place(self, inside: tuple[int, int] | None = None) -> Position:
        """Where it is; `inside` is (offset, length) within a scalar's text."""
        column, length = self.column, self.length
        if inside is not None and self._is_verbatim():
            column += inside[0] + len(self.style)
            length = inside[1]
        return Position(self.source.shown, self.line + 1, column + 1, max(1, length))

    def _is_verbatim(self) -> bool:
        """Whether the scalar's text stands in the file character by character, on one line."""
        if self.style in ("|", ">") or "\n" in self.raw:
            return False
        line = self.source.lines[self.line] if self.line < len(self.source.lines) else ""
        start = self.column + len(self.style)
        return line[start : start + len(self.raw)] == self.raw

    def problem(self, message: str, hint: str | None = None, inside: tuple[int, int] | None = None) -> Problem:
        lines = self.source.lines
        excerpt = lines[self.line] if self.line < len(lines) else None
        return Problem(message, self.place(inside), hint, excerpt)

    def at(self, path: Path_) -> Node:
        """The node at `path`, or the deepest one on the way there."""
        node = self
        for key in path:
            below = node.child(key)
            if below is None:
                return node
            node = below
        return node

    def key_at(self, path: Path_) -> Node:
        """The node of the key that leads to `path` (of the nearest key above for list items)."""
        found, node = self, self
        for key in path:
            found = node.keys.get(key, found)
            below = node.child(key)
            if below is None:
                break
            node = below
        return found


# YAML 1.2 core schema. 1.1 reads `on` as true, `1e-6` as text, `010` as eight and `1:30` as ninety.
_NULL = re.compile(r"^(~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?[0-9]+$")
_OCT = re.compile(r"^0o[0-7]+$")
_HEX = re.compile(r"^0x[0-9a-fA-F]+$")
_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
_INF = re.compile(r"^[-+]?\.(inf|Inf|INF)$")
_NAN = re.compile(r"^\.(nan|NaN|NAN)$")


def plain_scalar(text: str) -> str | int | float | bool | None:
    """What an unquoted scalar means in YAML 1.2."""
    if _NULL.match(text):
        return None
    if _BOOL.match(text):
        return text[0] in "tT"
    if _INT.match(text):
        return int(text)
    if _OCT.match(text):
        return int(text[2:], 8)
    if _HEX.match(text):
        return int(text[2:], 16)
    if _FLOAT.match(text):
        return float(text)
    if _INF.match(text):
        return float(text.replace(".", "").lower())
    return float("nan") if _NAN.match(text) else text
