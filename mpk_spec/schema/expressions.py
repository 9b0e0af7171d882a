"""Small, whitelisted expressions: `config.head_dim or hidden // heads`.

Arithmetic, comparison, `a if c else b`, `and or not`, `in`, indexing, attributes of config, literals, lists and a few
functions. `syntax` reads them, `evaluator` gives their values.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from mpk_spec.schema.evaluator import Evaluator
from mpk_spec.schema.syntax import CONSTANTS, FUNCTIONS, ExpressionError, parse, round_bf16, span

__all__ = ["CONSTANTS", "FUNCTIONS", "Expression", "ExpressionError", "expression_of", "round_bf16"]

Scalar = str | int | float | bool | None


class Expression:
    """A checked expression. Numbers, true, false and null are expressions that mean themselves.

    text: as written. names: the root names it reads, functions and constants excluded. Equal when written equally.
    """

    __slots__ = ("_tree", "literal", "names", "text")

    def __init__(self, raw: Scalar):
        """Raises ExpressionError where `raw` is text that is no expression."""
        self.text = _text(raw)
        self._tree, self.names = parse(self.text)
        self.literal = not self.names and isinstance(self._tree, ast.Constant)

    def evaluate(self, env: Mapping[str, Any]) -> Any:
        """Its value, with names from `env`. Raises ExpressionError with the place to blame."""
        return Evaluator(self.text, env).value(self._tree)

    def positions(self, name: str) -> list[tuple[int, int]]:
        """(offset, length) of each use of a root name."""
        nodes = (n for n in ast.walk(self._tree) if isinstance(n, ast.Name) and n.id == name)
        return sorted(span(self.text, n) for n in nodes)

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
