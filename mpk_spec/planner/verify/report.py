"""What the verifier says: the error that lists every violated property, and the proof when there is none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mpk_spec.errors import MpkSpecError


class PlanError(MpkSpecError):
    """A plan that must not run. `problems` holds one sentence per violated property."""

    def __init__(self, name: str, problems: Sequence[str]):
        self.problems = tuple(problems)
        count = len(self.problems)
        head = f"the plan '{name}' is refused, {count} propert{'y is' if count == 1 else 'ies are'} violated:"
        super().__init__("\n".join([head, *(f"  {p}" for p in self.problems)]))


@dataclass(frozen=True)
class Proof:
    """What was proved of a plan, and how.

    `tasks`, `reads` and `writes` are counted over the stages examined; `events` over all templates. `induced` stages
    were not walked: the state before them was shown to be the same as before a stage that was.
    """

    plan: str
    kinds: tuple[str, ...]
    transitions: tuple[tuple[str, str], ...]
    stages: int
    examined: int
    induced: int
    tasks: int
    events: int
    reads: int
    writes: int

    def summary(self) -> str:
        """One paragraph for `mpk-spec plan`."""
        pairs = ", ".join(f"{a} to {b}" for a, b in self.transitions)
        return (
            f"proved: acyclic, no queue or ring deadlock, thresholds, limits, {self.reads} reads after their writes, "
            f"{self.writes} writes after earlier uses, next step included ({pairs}); "
            f"{self.tasks} tasks, {self.events} events; {self.examined} stages examined, {self.induced} by induction"
        )


@dataclass
class Report:
    """Collects problems. Those alike (same `key`) are told once, with their number."""

    found: dict[tuple, list] = field(default_factory=dict)

    def add(self, message: str, *key: object) -> None:
        entry = self.found.setdefault(key or (message,), [message, 0])
        entry[1] += 1

    def __bool__(self) -> bool:
        return bool(self.found)

    def messages(self) -> list[str]:
        return [text if n == 1 else f"{text} (and {n - 1} more like it)" for text, n in self.found.values()]


def some(items: Iterable[object], most: int = 4) -> str:
    """The first few of a list, for a sentence."""
    listed = [str(x) for x in items]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
