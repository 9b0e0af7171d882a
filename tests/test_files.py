"""What is written where a person says: whole, or an error in a sentence and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpk_spec.errors import UserError
from mpk_spec.files import check_place, make_folder, write_aside

IMPOSSIBLE = [
    (".", "Is a directory"), ("folder", "Is a directory"), ("file/x", "Not a directory"),
    ("nowhere/x", "No such file or directory"), ("/", "Is a directory"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_text("before")


def test_a_file_is_replaced_and_nothing_else_is_left():
    check_place(Path("file"))
    write_aside(Path("file"), "après")
    write_aside(Path("new"), b"\0")
    assert Path("file").read_text(encoding="utf-8") == "après" and Path("new").read_bytes() == b"\0"
    assert sorted(p.name for p in Path().iterdir()) == ["file", "folder", "new"]


@pytest.mark.parametrize(("path", "why"), IMPOSSIBLE)
def test_a_place_that_cannot_be_is_said_before_and_when_it_is_written(path, why):
    for act in (check_place, lambda p: write_aside(p, "x")):
        with pytest.raises(UserError) as error:
            act(Path(path))
        assert error.value.message == f"cannot write {path}: {why}"
    assert sorted(p.name for p in Path().rglob("*")) == ["file", "folder"]


def test_a_folder_below_a_file_cannot_be_made():
    make_folder(Path("folder/a/b"))
    assert Path("folder/a/b").is_dir()
    with pytest.raises(UserError, match="cannot write file/x: Not a directory"):
        make_folder(Path("file/x"))
