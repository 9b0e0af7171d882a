"""Expressions: what they can say, what they refuse, and where they point."""

from __future__ import annotations

import pytest

from mpk_spec.schema import Expression, ExpressionError, expression_of

ENV = {
    "hidden": 96,
    "heads": 8,
    "i": 1,
    "config": {
        "head_dim": None,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"full_attention": {"rope_theta": 1e6}},
        "act": "silu",
        "bias": False,
        "window": 512,
        "factor": 0.5,
    },
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("hidden // heads", 12),
        ("hidden / heads", 12.0),
        ("-hidden + 3 * 2 ** 3", -72),
        ("hidden % 7", 5),
        ("4 ** -0.5", 0.5),
        ("config.head_dim or hidden // heads", 12),  # null
        ("config.nothing or hidden // heads", 12),  # absent
        ("config.nothing.inner or 3", 3),
        ("config.nothing is none", True),
        ("config.window is not none", True),
        ("config.window if config.layer_types[i] == 'sliding_attention' else none", None),
        ("config.layer_types[-1]", "full_attention"),
        ("config.rope_parameters['full_attention'].rope_theta", 1e6),
        ("not config.bias and config.act == 'silu'", True),
        ("config.act in ['silu', 'gelu']", True),
        ("'window' in config", True),
        ("1 < heads <= 8", True),
        ("all_equal(config.layer_types, 'full_attention')", False),
        ("round_bf16(96 ** 0.5)", 9.8125),
        ("round_bf16(1152 ** 0.5)", 34.0),
        ("ceil_div(515, 16)", 33),
        ("max(1, heads, 3) + min(4, 2) + len(config.layer_types) + sum([1, 2])", 15),
        ("true and not false", True),
        ("none", None),
        ("1e-6", 1e-6),
        ("  heads\n  + 1 ", 9),
    ],
)
def test_values(text, value):
    got = Expression(text).evaluate(ENV)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(("raw", "text"), [(3, "3"), (1e-6, "1e-06"), (True, "true"), (None, "none"), ("a", "a")])
def test_scalars_mean_themselves(raw, text):
    expression = expression_of(raw)
    assert expression.text == text
    if raw != "a":
        assert expression.evaluate({}) == raw
        assert type(expression.evaluate({})) is type(raw)


def test_one_and_true_are_not_mixed_up():
    assert [expression_of(raw).evaluate({}) for raw in (1, True, 1.0)] == [1, True, 1.0]
    assert [expression_of(raw).text for raw in (1, True, 1.0)] == ["1", "true", "1.0"]


def test_names_and_places():
    expression = Expression("heads * config.a + min(heads, i)")
    assert expression.names == {"heads", "config", "i"}
    assert expression.positions("heads") == [(0, 5), (23, 5)]
    assert Expression("'é' == heads").positions("heads") == [(7, 5)]
    assert Expression("3").literal
    assert not expression.literal


@pytest.mark.parametrize(
    ("text", "message", "offset", "length"),
    [
        ("", "an empty expression", 0, 1),
        ("heads *", "something is missing after '*'", 6, 1),
        ("heads * / 2", "something is missing between '*' and '/'", 8, 1),
        ("* 2", "something is missing before '*'", 0, 1),
        ("not", "something is missing after 'not'", 0, 3),
        ("heads hidden", "an operator is missing before 'hidden'", 6, 6),
        ("(heads", "'(' is never closed", 0, 1),
        ("heads]", "']' closes nothing", 5, 1),
        ("a == 'x", "this quote is never closed", 5, 1),
        ("a = 1", "'=' is no comparison", 2, 1),
        ("a && b", "'&&' is no operator", 2, 2),
        ("!a", "'!' is no operator", 0, 1),
        ("a ? b", "'?' is no operator", 2, 1),
        ("sqrt(a)", "unknown function 'sqrt'", 0, 4),
        ("a.b(1)", "only the language's functions can be called", 0, 3),
        ("min", "'min' is a function", 0, 3),
        ("ceil_div(1)", "'ceil_div' takes 2 arguments, got 1", 0, 11),
        ("1 + None", "'None' is Python", 4, 4),
        ("a.__class__", "'__class__' is not for expressions", 0, 11),
        ("a[1:2]", "slices are not allowed in an expression", 0, 6),
        ("{'a': 1}", "not allowed in an expression", 0, 8),
        ("[x for x in a]", "an operator is missing before 'for'", 3, 3),
        ("a @ b", "not an operator of expressions", 0, 5),
        ("~a", "not allowed in an expression", 0, 2),
        ("a if b", "this is no expression", 0, 6),
        ("1j", "1j is not a number", 0, 2),
        ("a" * 501, "an expression of 501 characters; at most 500", 0, 501),
    ],
)
def test_refused_when_read(text, message, offset, length):
    with pytest.raises(ExpressionError) as refused:
        Expression(text)
    error = refused.value
    assert (error.message, error.offset, error.length) == (message, offset, length)


@pytest.mark.parametrize(
    ("text", "message", "offset"),
    [
        ("1 + hiden", "unknown name 'hiden'", 4),
        ("heads * config.windw", "'config' has no 'windw'", 8),
        ("not config.nothing", "'config' has no 'nothing'", 4),
        ("config.nothing or config.nothing", "'config' has no 'nothing'", 18),
        ("config.layer_types[9]", "index 9 is outside of 'config.layer_types', which has 2 items", 0),
        ("heads.size", "'heads' is the number 8, it has no 'size'", 0),
        ("1 + heads // 0", "division by zero", 4),
        ("config.act * 2", "'*' between the text 'silu' and the number 2", 0),
        ("config.act < 2", "'<' between the text 'silu' and the number 2", 0),
        ("-config.act", "a sign before the text 'silu'", 0),
        ("1 + hidden ** 99", "96 ** 99 is too large", 4),
        ("9.0 ** 999", "the result is too large", 0),
        ("(0 - 4) ** 0.5", "-4 ** 0.5 is not a real number", 0),
        ("len(heads)", "'len' cannot take the number 8", 0),
        ("round_bf16(config.act)", "'round_bf16' cannot take the text 'silu'", 0),
    ],
)
def test_refused_when_evaluated(text, message, offset):
    with pytest.raises(ExpressionError) as refused:
        Expression(text).evaluate(ENV)
    assert (refused.value.message, refused.value.offset) == (message, offset)


def test_a_missing_config_key_suggests_the_nearest():
    with pytest.raises(ExpressionError) as refused:
        Expression("config.windo").evaluate(ENV)
    assert refused.value.hint == "did you mean 'window'?"


def test_equal_when_written_equally():
    assert Expression("a + b") == Expression("a + b") != Expression("b + a")
    assert len({Expression("a"), Expression("a")}) == 1


def test_bf16_rounds_as_torch_does():
    torch = pytest.importorskip("torch")
    from mpk_spec.schema.expressions import round_bf16

    for value in (0.1, 1 / 3, 33.94112549695428, 1.00390625, 1.01171875, -7.7e-12, 3.0e38):
        assert round_bf16(value) == torch.tensor(value, dtype=torch.bfloat16).item()
