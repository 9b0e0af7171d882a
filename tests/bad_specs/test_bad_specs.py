"""Every wrong spec in this folder has a `.txt` with the exact words it must be refused with.

After changing a message: `UPDATE_BAD_SPECS=1 pytest tests/bad_specs`, then read the difference: is it what a person
needs?
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mpk_spec.errors import MpkSpecError
from mpk_spec.schema import load_spec

HERE = Path(__file__).parent
SPECS = sorted(HERE.glob("*.yaml"))


def diagnose(path: str | Path) -> str:
    """What `mpk-spec validate` says about a spec; nothing if it is right.

    A first line such as `# plan: size=tiny tp=3` plans for that instead of every size on one rank.
    """
    try:
        spec = load_spec(path)
        from mpk_spec.planner import check, plan

        first = Path(path).read_bytes().split(b"\n")[0].decode(errors="replace")
        if first.startswith("# plan: "):
            given = dict(word.split("=") for word in first.removeprefix("# plan: ").split())
            plan(spec, **{k: int(v) if v.isdigit() else v for k, v in given.items()})
        else:
            check(spec)
    except MpkSpecError as error:
        return f"{error}\n"
    return ""


@pytest.mark.parametrize("path", SPECS, ids=lambda p: p.stem)
def test_refused_in_these_words(path, monkeypatch):
    monkeypatch.chdir(HERE)  # messages name files relative to the working directory
    said = diagnose(Path(path.name))
    expected = path.with_suffix(".txt")
    if os.environ.get("UPDATE_BAD_SPECS"):
        expected.write_text(said, encoding="utf-8")
    assert said, "this spec is accepted"
    assert said == expected.read_text(encoding="utf-8")


def test_every_message_belongs_to_a_spec():
    assert {p.stem for p in HERE.glob("*.txt")} == {p.stem for p in SPECS}


def test_there_are_enough_of_them():
    assert len(SPECS) >= 60
