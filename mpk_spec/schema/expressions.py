"""Small, whitelisted expressions: `config.head_dim or hidden // heads`.

Arithmetic, comparison, `a if c else b`, `and or not`, `in`, indexing, attributes of config, literals, lists and the
functions below. Nothing else of Python: the text is parsed by `ast` and walked by `_Checker` and `_Evaluator`.
"""

from __future__ import annotations

import ast
import operator
import re
import struct
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from mpk_spec.errors import did_you_mean

MAX_LENGTH = 500
MAX_BITS = 256  # of a power's result; dimensions have 64
CONSTANTS = {"none": None, "true": True, "false": False}
Scalar = str | int | float | bool | None


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

_BINARY = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
    ast.Div: ("/", operator.truediv),
    ast.FloorDiv: ("//", operator.floordiv),
    ast.Mod: ("%", operator.mod),
    ast.Pow: ("**", operator.pow),
}
_COMPARE = {
    ast.Eq: ("==", operator.eq),
    ast.NotEq: ("!=", operator.ne),
    ast.Lt: ("<", operator.lt),
    ast.LtE: ("<=", operator.le),
    ast.Gt: (">", operator.gt),
    ast.GtE: (">=", operator.ge),
    ast.Is: ("is", lambda a, b: a is b),
    ast.IsNot: ("is not", lambda a, b: a is not b),
    ast.In: ("in", lambda a, b: a in b),
    ast.NotIn: ("not in", lambda a, b: a not in b),
}


class Expression:
    """A checked expression. Numbers, true, false and null are expressions that mean themselves.

    text: as written. names: the root names it reads, functions and constants excluded. Equal when written equally.
    """

    __slots__ = ("_tree", "literal", "names", "text")

    def __init__(self, raw: Scalar):
        """Raises ExpressionError where `raw` is text that is no expression."""
        self.text = _text(raw)
        self._tree, self.names = _parse(self.text)
        self.literal = not self.names and isinstance(self._tree, ast.Constant)

    def evaluate(self, env: Mapping[str, Any]) -> Any:
        """Its value, with names from `env`. Raises ExpressionError with the place to blame."""
        return _Evaluator(self.text, env).value(self._tree)

    def positions(self, name: str) -> list[tuple[int, int]]:
        """(offset, length) of each use of a root name."""
        nodes = (n for n in ast.walk(self._tree) if isinstance(n, ast.Name) and n.id == name)
        return sorted(_span(self.text, n) for n in nodes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expression) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return f"Expression({self.text!r})"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(_validate)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
        return {"type": ["string", "number", "boolean", "null"], "description": "a number or an expression"}


@lru_cache(maxsize=4096)
def _expression_of(kind: type, raw: Scalar) -> Expression:  # `kind` keeps 1, 1.0 and True apart
    return Expression(raw)


def expression_of(raw: Scalar | Expression) -> Expression:
    """The expression behind a field that holds a raw scalar. Raises ExpressionError."""
    return raw if isinstance(raw, Expression) else _expression_of(type(raw), raw)


def _validate(raw: Any) -> Expression:
    """For pydantic: its error carries the offset, so that the loader can point into the scalar."""
    from pydantic_core import PydanticCustomError

    if isinstance(raw, Expression):
        return raw
    if not isinstance(raw, (str, int, float, bool, type(None))):
        raise PydanticCustomError("expression_type", "a number or an expression")
    try:
        return expression_of(raw)
    except ExpressionError as error:
        context = {"offset": error.offset, "length": error.length, "hint": error.hint or "", "said": error.message}
        raise PydanticCustomError("expression", "bad expression", context) from None


def _text(raw: Scalar) -> str:
    if raw is None:
        return "none"
    if isinstance(raw, bool):
        return "true" if raw else "false"
    return raw if isinstance(raw, str) else repr(raw)


def _parse(text: str) -> tuple[ast.expr, frozenset[str]]:
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


def _span(text: str, node: ast.AST) -> tuple[int, int]:
    """Characters, where ast counts bytes."""
    raw = text.replace("\n", " ").encode()
    start = len(raw[: node.col_offset].decode())
    return start, max(1, len(raw[node.col_offset : node.end_col_offset].decode()))


class _Checker:
    """Refuses what is not whitelisted and collects root names."""

    def __init__(self, text: str):
        self.text, self.names = text, set()

    def fail(self, node: ast.AST, message: str, hint: str | None = None) -> None:
        raise ExpressionError(message, *_span(self.text, node), hint)

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
                if isinstance(child, ast.operator) and type(child) not in _BINARY:
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


class _Absent:
    """What `config.head_dim` is where the config lacks it, on the left of `or` and of `is none`."""


class _Evaluator:
    def __init__(self, text: str, env: Mapping[str, Any]):
        self.text, self.env = text, env

    def fail(self, node: ast.AST, message: str, hint: str | None = None) -> ExpressionError:
        return ExpressionError(message, *_span(self.text, node), hint)

    def value(self, node: ast.AST, may_miss: bool = False) -> Any:
        """`may_miss`: an absent config key counts as null."""
        method = getattr(self, f"_{type(node).__name__.lower()}")
        return method(node, may_miss) if isinstance(node, (ast.Attribute, ast.Subscript)) else method(node)

    def _constant(self, node: ast.Constant) -> Any:
        return node.value

    def _name(self, node: ast.Name) -> Any:
        if node.id in CONSTANTS:
            return CONSTANTS[node.id]
        if node.id not in self.env:
            raise self.fail(node, f"unknown name '{node.id}'", did_you_mean(node.id, self.env, "names"))
        return self.env[node.id]

    def _attribute(self, node: ast.Attribute, may_miss: bool) -> Any:
        return self._get(node, self.value(node.value, may_miss), node.attr, may_miss)

    def _subscript(self, node: ast.Subscript, may_miss: bool) -> Any:
        return self._get(node, self.value(node.value, may_miss), self.value(node.slice), may_miss)

    def _get(self, node: ast.AST, whole: Any, key: Any, may_miss: bool) -> Any:
        what = ast.unparse(node.value)
        if may_miss and whole is None:
            return None
        if isinstance(whole, Mapping):
            if key in whole:
                return whole[key]
            if may_miss:
                return None
            raise self.fail(node, f"'{what}' has no '{key}'", did_you_mean(str(key), map(str, whole), "keys"))
        if isinstance(whole, (list, tuple)) and isinstance(key, int) and isinstance(node, ast.Subscript):
            if -len(whole) <= key < len(whole):
                return whole[key]
            raise self.fail(node, f"index {key} is outside of '{what}', which has {len(whole)} items")
        raise self.fail(node, f"'{what}' is {_a(whole)}, it has no '{key}'")

    def _boolop(self, node: ast.BoolOp) -> Any:
        is_or = isinstance(node.op, ast.Or)
        for part in node.values[:-1]:
            result = self.value(part, may_miss=is_or)
            if bool(result) == is_or:
                return result
        return self.value(node.values[-1])

    def _unaryop(self, node: ast.UnaryOp) -> Any:
        operand = self.value(node.operand)
        if isinstance(node.op, ast.Not):
            return not operand
        if not isinstance(operand, (int, float)):
            raise self.fail(node, f"a sign before {_a(operand)}")
        return -operand if isinstance(node.op, ast.USub) else +operand

    def _binop(self, node: ast.BinOp) -> Any:
        left, right = self.value(node.left), self.value(node.right)
        sign, apply = _BINARY[type(node.op)]
        texts = isinstance(left, str) and isinstance(right, str) and sign == "+"
        if not texts and not (isinstance(left, (int, float)) and isinstance(right, (int, float))):
            raise self.fail(node, f"'{sign}' between {_a(left)} and {_a(right)}")
        whole = isinstance(left, int) and isinstance(right, int)
        if sign == "**" and whole and left.bit_length() * right > MAX_BITS:
            raise self.fail(node, f"{left} ** {right} is too large")
        try:
            result = apply(left, right)
        except ZeroDivisionError:
            raise self.fail(node, "division by zero") from None
        except OverflowError:
            raise self.fail(node, "the result is too large") from None
        if isinstance(result, complex):
            raise self.fail(node, f"{left} ** {right} is not a real number")
        return result

    def _compare(self, node: ast.Compare) -> bool:
        may_miss = isinstance(node.ops[0], (ast.Is, ast.IsNot))
        left = self.value(node.left, may_miss)
        for op, right_node in zip(node.ops, node.comparators, strict=True):
            right = self.value(right_node)
            sign, apply = _COMPARE[type(op)]
            try:
                if not apply(left, right):
                    return False
            except TypeError:
                raise self.fail(node, f"'{sign}' between {_a(left)} and {_a(right)}") from None
            left = right
        return True

    def _ifexp(self, node: ast.IfExp) -> Any:
        return self.value(node.body if self.value(node.test) else node.orelse)

    def _list(self, node: ast.List) -> list:
        return [self.value(item) for item in node.elts]

    def _call(self, node: ast.Call) -> Any:
        arguments = [self.value(a) for a in node.args]
        try:
            return FUNCTIONS[node.func.id][0](*arguments)
        except ZeroDivisionError:
            raise self.fail(node, "division by zero") from None
        except (TypeError, ValueError, OverflowError, struct.error):
            shown = ", ".join(_a(a) for a in arguments)
            raise self.fail(node, f"'{node.func.id}' cannot take {shown}") from None


def _a(value: Any) -> str:
    """A value in words."""
    if value is None:
        return "nothing (none)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text '{value}'"
    return "a list" if isinstance(value, (list, tuple)) else "a map"
