"""The values of expressions."""

from __future__ import annotations

import ast
import operator
import struct
from collections.abc import Mapping
from typing import Any

from mpk_spec.errors import did_you_mean
from mpk_spec.schema.syntax import CONSTANTS, FUNCTIONS, ExpressionError, span

MAX_BITS = 256  # of a power's result; dimensions have 64
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


class Evaluator:
    """Evaluates the tree of `text` with names from `env`. Raises ExpressionError with the place to blame."""

    def __init__(self, text: str, env: Mapping[str, Any]):
        self.text, self.env = text, env

    def fail(self, node: ast.AST, message: str, hint: str | None = None) -> ExpressionError:
        return ExpressionError(message, *span(self.text, node), hint)

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
