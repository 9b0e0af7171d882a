"""All checks of a spec as a list of items: the built-in ones, golden summaries, the spec's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpk_spec.errors import Position
from mpk_spec.testing.checks import Outcome, guarded
from mpk_spec.testing.fixtures import Fixtures

if TYPE_CHECKING:
    from mpk_spec.schema import Spec

REFERENCE_SIZE = "tiny"  # small enough to run anywhere


@dataclass(frozen=True)
class Item:
    """A check that can be run. `position`: where the spec file asks for it."""

    spec: str
    name: str
    position: Position
    run: Callable[[], Outcome]

    def outcome(self) -> Outcome:
        return guarded(self.run)


def collect(spec: Spec, size: str | None = None, update: bool = False) -> list[Item]:
    """Every check of a spec. size: only what is about that size. update: golden summaries are written, not compared.

    Raises SpecError for checks that cannot be read.
    """
    from mpk_spec.testing import checks

    fixtures = Fixtures(spec)
    items = []
    for name in spec.sizes:
        place = spec.position("sizes", name, on="key")
        items.append((name, Item(spec.name, f"plans[{name}]", place, _bound(checks.plans, fixtures, name))))
        items.append((name, Item(spec.name, f"golden[{name}]", place, _bound(_golden, fixtures, name, update))))
    for tp in (1, 2) if REFERENCE_SIZE in spec.sizes else ():
        place = spec.position("sizes", REFERENCE_SIZE, on="key")
        run = _bound(checks.equals_huggingface, fixtures, REFERENCE_SIZE, tp)
        items.append((REFERENCE_SIZE, Item(spec.name, f"huggingface[{REFERENCE_SIZE}, tp {tp}]", place, run)))
    for name, (kind, given) in checks.read_checks(spec).items():
        place = spec.position("checks", name, on="key")
        items.append((given.size, Item(spec.name, name, place, _bound(kind.run, fixtures, given))))
    return [item for about, item in items if size in (None, about)]


def _bound(function: Callable, *arguments: object) -> Callable[[], Outcome]:
    return lambda: function(*arguments)


def _golden(fixtures: Fixtures, size: str, update: bool) -> Outcome:
    from mpk_spec.testing.golden import difference, golden_path, golden_text, write_golden

    path = golden_path(fixtures.spec, size)
    if not path.parent.is_dir() and not update:
        return Outcome("", "", "skip", f"{path.parent} does not exist; 'mpk-spec test --update' writes it")
    text = golden_text(fixtures.plan(size))
    differs = difference(path, text)
    if differs and update:
        write_golden(path, text)
        return Outcome(path.name, "written", "pass")
    if differs:
        return Outcome(path.name, "differs", "fail", differs)
    return Outcome(path.name, "the same", "pass")
