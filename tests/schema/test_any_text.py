"""Whatever the text, loading it gives a spec or problems with positions, never another error."""

from __future__ import annotations

from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpk_spec.errors import SpecError
from mpk_spec.paths import specs_dir
from mpk_spec.schema import load_spec

SMALL = (Path(__file__).parents[1] / "bad_specs" / "base" / "small.yaml").read_text()
TEXTS = [SMALL, *((specs_dir() / f"{name}.yaml").read_text() for name in ("gemma3", "qwen3_moe"))]
JUNK = ["", "null", "[]", "{}", "3", "true", "x: {", "]", "'", "\t", "\n", "&a ", "*a", "<<: 1", "- ", ": ", "none"]
JUNK += [
    "{a: b}",
    "[1, 2]",
    "é",
    "linear",
    "add",
    "~",
    "config",
    "i",
    "\x07",
    "when: x, ",
    "prefix",
    "layer",
    "out",
    "1 +",
]


@st.composite
def damaged(draw):
    text = draw(st.sampled_from(TEXTS))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        length = draw(st.sampled_from([0, 0, 1, 2, 5, 20, 80]))
        text = text[:start] + draw(st.sampled_from(JUNK)) + text[start + length :]
    return text


@given(damaged())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_damaged_specs_are_problems_with_positions(text):
    try:
        spec = load_spec(specs_dir() / "damaged.yaml", text=text)
    except SpecError as error:
        assert error.problems
        assert all(p.position is not None and p.position.line >= 1 and p.position.column >= 1 for p in error.problems)
        assert all(p.render() for p in error.problems)
    else:
        assert load_spec("resolved.yaml", text=spec.resolved_yaml()) == spec


@given(st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_text_at_all(text):
    try:
        load_spec("any.yaml", text=text)
    except SpecError as error:
        assert all(p.position is not None for p in error.problems)
