"""The syntax of expressions: what is allowed, and plain words for what is not.

The text is parsed by `ast`; nothing of Python passes that `_Checker` does not know.
"""

from __future__ import annotations

import ast
import re
import struct
from collections.abc import Callable
from typing import Any

from mpk_spec.errors import did_you_mean

MAX_LENGTH = 500
CONSTANTS = {"none": None, "true": True, "false": False}
OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow)


class ExpressionError(Exception):
    """What is wrong with an expression; `offset` and `length` count characters of its text."""

    def __init__(self, message: str, offset: int = 0, length: int = 1, hint: str | None = None):
        super().__init__(message)
        self.message, self.offset, self.length, self.hint = message, offset, length, hint


def round_bf16(x: float) -> float:
    """`x` rounded to the nearest bfloat16, ties to even."""
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def all_equal(items: list, value: Any) -> bool:
    """Whether every item of a list is `value`."""
    return all(item == value for item in items)


def ceil_div(a: int, b: int) -> int:
    """`a / b` rounded up."""
    return -(-a // b)


FUNCTIONS: dict[str, tuple[Callable, int, int]] = {  # name: function, fewest and most arguments
    "all_equal": (all_equal, 2, 2),
    "ceil_div": (ceil_div, 2, 2),
    "len": (len, 1, 1),
    "max": (max, 1, 8),
    "min": (min, 1, 8),
    "round_bf16": (round_bf16, 1, 1),
    "sum": (sum, 1, 1),
}


def parse(text: str) -> tuple[ast.expr, frozenset[str]]:
    """The tree of a text and the root names in it. Raises ExpressionError."""
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"an expression of {len(text)} characters; at most {MAX_LENGTH}", 0, len(text))
    if not text.strip():
        raise ExpressionError("an empty expression", 0, max(1, len(text)))
    _refuse_foreign(text)
    _refuse_gaps(text)
    lead = len(text) - len(text.lstrip())
    try:
        tree = ast.parse(text.replace("\n", " ")[lead:], mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ExpressionError("this is no expression", 0, len(text)) from None
    for node in ast.walk(tree):
        if hasattr(node, "col_offset"):
            node.col_offset += len(text[:lead].encode())
            node.end_col_offset += len(text[:lead].encode())
    checker = _Checker(text)
    checker.check(tree)
    return tree, frozenset(checker.names)


def _refuse_foreign(text: str) -> None:
    """Mistakes for which Python's parser has no useful words: brackets, and operators of other languages."""
    opened: list[tuple[str, int]] = []
    quote = None
    for offset, c in enumerate(text):
        pair = text[offset : offset + 2]
        if quote:
            quote = None if c == quote else quote
        elif c in "'\"":
            quote, quote_at = c, offset
        elif c in "([{":
            opened.append((c, offset))
        elif c in ")]}":
            if not opened or opened[-1][0] + c not in ("()", "[]", "{}"):
                raise ExpressionError(f"'{c}' closes nothing", offset, 1)
            opened.pop()
        elif pair in ("&&", "||"):
            raise ExpressionError(f"'{pair}' is no operator", offset, 2, f"write '{'and' if pair == '&&' else 'or'}'")
        elif c == "!" and pair != "!=":
            raise ExpressionError("'!' is no operator", offset, 1, "write 'not'")
        elif c == "?":
            raise ExpressionError("'?' is no operator", offset, 1, "write 'a if condition else b'")
        elif c == "=" and pair != "==" and (offset == 0 or text[offset - 1] not in "=!<>"):
            raise ExpressionError("'=' is no comparison", offset, 1, "write '=='")
    if quote:
        raise ExpressionError("this quote is never closed", quote_at, 1)
    if opened:
        raise ExpressionError(f"'{opened[-1][0]}' is never closed", opened[-1][1], 1)


_TOKEN = re.compile(
    r"\s*(?:(?P<word>is\s+not|not\s+in|\w+(?:\.\w+)*)|(?P<text>'[^']*'|\"[^\"]*\")|(?P<sign>\*\*|//|[=!<>]=|[-+*/%<>])|(?P<other>.))"
)
_WORDS_BETWEEN = frozenset({"and", "or", "in", "is", "is not", "not in", "if", "else", "not"})


def _refuse_gaps(text: str) -> None:
    """An operand or an operator that is missing; Python's words and places for these differ by version."""
    last, wants_operand = None, True
    for token in _TOKEN.finditer(text.replace("\n", " ")):
        word = " ".join((token["word"] or "").split())
        between = bool(token["sign"]) or word in _WORDS_BETWEEN
        is_operand = bool(token["text"]) or (bool(word) and not between)
        place = token.start() + len(token[0]) - len(token[0].lstrip())
        said = token[0].strip()
        if is_operand and not wants_operand:
            shown = said if token["text"] else f"'{said}'"
            raise ExpressionError(f"an operator is missing before {shown}", place, len(said))
        if token["sign"] and wants_operand and said not in "+-":
            after = f"between '{last}' and '{said}'" if last else f"before '{said}'"
            raise ExpressionError(f"something is missing {after}", place, len(said))
        wants_operand = not is_operand and said not in (")", "]", "}")
        last = said
    if last is not None and wants_operand and (last in _WORDS_BETWEEN or not last.isalnum()) and last not in "([{,":
        place = text.rstrip().rindex(last)
        raise ExpressionError(f"something is missing after '{last}'", place, len(last))


def span(text: str, node: ast.AST) -> tuple[int, int]:
    """(offset, length) of a node in characters, where ast counts bytes."""
    raw = text.replace("\n", " ").encode()
    start = len(raw[: node.col_offset].decode())
    return start, max(1, len(raw[node.col_offset : node.end_col_offset].decode()))


class _Checker:
    """Refuses what is not whitelisted and collects root names."""

    def __init__(self, text: str):
        self.text, self.names = text, set()

    def fail(self, node: ast.AST, message: str, hint: str | None = None) -> None:
        raise ExpressionError(message, *span(self.text, node), hint)

    def check(self, node: ast.AST) -> None:
        if isinstance(node, ast.Constant):
            self._constant(node)
        elif isinstance(node, ast.Name):
            self._name(node)
        elif isinstance(node, ast.Call):
            self._call(node)
        elif isinstance(node, ast.Attribute):
            if node.attr.startswith("_"):
                self.fail(node, f"'{node.attr}' is not for expressions")
            self.check(node.value)
        else:
            self._children(node)

    def _children(self, node: ast.AST) -> None:
        parts = (ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.Compare, ast.IfExp, ast.Subscript, ast.List)
        if not isinstance(node, parts) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert)):
            self.fail(node, "not allowed in an expression", "arithmetic, comparison, 'a if c else b', 'or', indexing")
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context)):
                if isinstance(child, ast.operator) and type(child) not in OPERATORS:
                    self.fail(node, "not an operator of expressions", "known operators: + - * / // % **")
                continue
            if isinstance(child, ast.Slice):
                self.fail(node, "slices are not allowed in an expression", "index one item")
            self.check(child)

    def _constant(self, node: ast.Constant) -> None:
        word = {None: "none", True: "true", False: "false"}
        if node.value is None or isinstance(node.value, bool):
            self.fail(node, f"'{node.value}' is Python", f"write '{word[node.value]}'")
        if not isinstance(node.value, (int, float, str)):
            self.fail(node, f"{node.value!r} is not a number")

    def _name(self, node: ast.Name) -> None:
        if node.id in FUNCTIONS:
            self.fail(node, f"'{node.id}' is a function", f"write '{node.id}(...)'")
        if node.id not in CONSTANTS:
            self.names.add(node.id)

    def _call(self, node: ast.Call) -> None:
        if not isinstance(node.func, ast.Name):
            self.fail(
                node.func, "only the language's functions can be called", did_you_mean("", FUNCTIONS, "functions")
            )
        if node.func.id not in FUNCTIONS:
            hint = did_you_mean(node.func.id, FUNCTIONS, "functions")
            self.fail(node.func, f"unknown function '{node.func.id}'", hint)
        _, fewest, most = FUNCTIONS[node.func.id]
        if node.keywords or not fewest <= len(node.args) <= most:
            wants = f"{fewest}" if fewest == most else f"{fewest} to {most}"
            self.fail(node, f"'{node.func.id}' takes {wants} argument{'s' * (wants != '1')}, got {len(node.args)}")
        for argument in node.args:
            self.check(argument)
