"""YAML 1.2 scalars, positions, and the parts of YAML that the language leaves out."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpk_spec.errors import SpecError
from mpk_spec.schema.nodes import plain_scalar
from mpk_spec.schema.reader import MAX_DEPTH, read_text, read_tree

FILE = Path("spec.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("5e5", 5e5),
        ("1.", 1.0),
        (".5", 0.5),
        ("-3", -3),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        (".inf", float("inf")),
        ("-.inf", float("-inf")),
        ("on", "on"),
        ("yes", "yes"),
        ("None", "None"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("0.6b", "0.6b"),
        ("2026-01-01", "2026-01-01"),
        ("e5", "e5"),
    ],
)
def test_plain_scalars_mean_what_yaml_1_2_says(text, value):
    got = plain_scalar(text)
    assert got == value
    assert type(got) is type(value)


def test_quotes_make_text():
    tree, problems = read_tree(FILE, "a: '1'\nb: \"true\"\nc: |\n  null\n")
    assert tree.data() == {"a": "1", "b": "true", "c": "null\n"}
    assert problems == []


def test_every_node_knows_its_place():
    tree, _ = read_tree(FILE, "dims:\n  hidden: {size: 96, 'q': [1, two]}\n")
    assert str(tree.key_at(("dims", "hidden")).place()) == "spec.yaml:2:3"
    assert str(tree.at(("dims", "hidden", "size")).place()) == "spec.yaml:2:18"
    assert str(tree.at(("dims", "hidden", "q", 1)).place()) == "spec.yaml:2:31"
    assert tree.at(("dims", "hidden", "q", 1)).place().length == 3


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("a: heads * dim", 12),  # plain: offset 8 of the text
        ("a: 'heads * dim'", 13),
        ('a: "heads * dim"', 13),
        ('a: "heads \\x2a dim"', 4),  # escapes: the text is not in the file as such, so the whole scalar
        ("a: >\n  heads * dim", 4),
    ],
)
def test_a_place_inside_a_scalar(text, column):
    tree, _ = read_tree(FILE, text)
    assert tree.at(("a",)).place((8, 3)).column == column


def test_problems_are_collected_and_the_rest_is_kept():
    tree, problems = read_tree(FILE, "a: 1\na: 2\nb: &x 3\nc: *x\n<<: {d: 1}\n")
    assert tree.data() == {"a": 1, "b": 3}
    assert [p.message for p in problems] == [
        "'a' is given twice; first in line 1, column 1",
        "anchors ('&x') are not part of the language",
        "merge keys ('<<') are not part of the language",
    ]


def test_whole_numbers_are_keys_in_checks_only():
    tree, problems = read_tree(FILE, "checks: {all_reduces: {tp: {1: 0, 2: 72}}}\nsizes: {8: {}}\n")
    assert tree.data()["checks"] == {"all_reduces": {"tp": {1: 0, 2: 72}}}
    assert [p.message for p in problems] == ["a key must be text, this is a number"]


def test_deep_nesting_is_refused():
    with pytest.raises(SpecError, match=f"nested more than {MAX_DEPTH} deep"):
        read_tree(FILE, "a: " + "[" * 3000 + "]" * 3000)


def test_the_slow_parser_says_it_the_same(monkeypatch):
    import yaml

    from mpk_spec.schema import reader

    for fast in (reader._FAST, yaml.SafeLoader):
        monkeypatch.setattr(reader, "_FAST", fast)
        with pytest.raises(SpecError) as refused:
            read_tree(FILE, "a: {b: 1\nc: 2\n")
        assert str(refused.value) == "spec.yaml:1:4: no '}' or ',' follows this line\n  | a: {b: 1\n  |    ^"


def test_a_forbidden_character():
    with pytest.raises(SpecError) as refused:
        read_tree(FILE, "a: 1\nb: x\x07y\n")
    assert str(refused.value) == "spec.yaml:2:5: a character that YAML forbids: '\\x07'"


def test_a_file_that_is_far_too_large(tmp_path):
    path = tmp_path / "weights.yaml"
    path.write_bytes(b"#" * (5 << 20))
    with pytest.raises(SpecError, match="5242880 bytes are too many for a spec"):
        read_text(path)


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_bytes(b"\xef\xbb\xbfspec: v1\n")
    assert read_text(path) == "spec: v1\n"
