"""pytest collects the specs in folders named `specs`: one item per check, named and placed as in the YAML file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SPEC_LINE = re.compile(r"^spec:\s*v\d+\b", re.MULTILINE)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> SpecFile | None:
    if file_path.suffix == ".yaml" and file_path.parent.name == "specs" and _is_spec(file_path):
        return SpecFile.from_parent(parent, path=file_path)
    return None


def _is_spec(path: Path) -> bool:
    return bool(SPEC_LINE.search(path.read_text(encoding="utf-8", errors="replace")))


class SpecFile(pytest.File):
    """A spec and its checks, which share plans and models."""

    def collect(self) -> Iterator[SpecItem]:
        from mpk_spec.errors import MpkSpecError
        from mpk_spec.schema import load_spec
        from mpk_spec.testing.suite import collect

        try:
            items = collect(load_spec(self.path))
        except MpkSpecError as error:
            raise self.CollectError(str(error)) from None
        for item in items:
            yield SpecItem.from_parent(self, name=item.name, item=item)


class CheckFailed(Exception):
    """A check whose verdict is "no"; its text is the whole report."""


class SpecItem(pytest.Item):
    """One check of a spec."""

    def __init__(self, *, item, **options):
        super().__init__(**options)
        self.item = item

    def runtest(self) -> None:
        outcome = self.item.outcome()
        if outcome.verdict == "skip":
            pytest.skip(outcome.reason)
        if outcome.verdict == "fail":
            lines = [
                f"{self.item.position}: check '{self.item.name}' of spec '{self.item.spec}' failed",
                f"  expected: {outcome.expected}",
                f"  got:      {outcome.got}",
                *(f"  {line}" for line in outcome.reason.splitlines()),
            ]
            raise CheckFailed("\n".join(lines))

    def repr_failure(self, excinfo, style=None):
        """The report alone: where in Python the verdict fell is of no interest."""
        if isinstance(excinfo.value, CheckFailed):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self):
        return self.path, self.item.position.line - 1, f"{self.item.spec}/{self.item.name}"
