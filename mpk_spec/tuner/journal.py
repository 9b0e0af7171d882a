"""What was measured, one JSON object per line in the cache folder, so that a search goes on where it was stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpk_spec.errors import UserError

if TYPE_CHECKING:
    from mpk_spec.planner.plan import Plan


@dataclass(frozen=True)
class Measurement:
    """One plan on the GPU. Milliseconds per token (None where it did not run), and how its logits compare with those
    of the plan without rules: `right`, and in words."""

    ms: float | None
    ms_min: float | None
    ms_max: float | None
    right: bool
    output: str


class NotJudged(UserError):
    """Nothing is known against this plan, but it cannot be judged here."""


class Journal:
    """Measurements by the key of their plan. What another run appends meanwhile is not seen."""

    def __init__(self, path: Path):
        self.path = path
        text = _read(path)
        self.found = dict(_entries(text))
        self._whole = text.endswith("\n") or not text

    def add(self, plan: str, settings: str, measured: Measurement) -> None:
        """Keeps it. Raises UserError where the file cannot be written."""
        self.found[plan] = measured
        line = json.dumps({"plan": plan, "settings": settings, **asdict(measured)}) + "\n"
        line, self._whole = line if self._whole else "\n" + line, True
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError as trouble:
            raise UserError(f"cannot write {self.path}: {trouble.strerror or trouble}") from None


def journal_of(plan: Plan, gpu: str, weights: str, context: int, tokens: int) -> Journal:
    """For measurements beside `plan`, the one without rules: other sources, weights or GPUs have other journals."""
    from mpk_spec.emit.source import emit
    from mpk_spec.paths import cache_dir
    from mpk_spec.runtime.built import source_digest

    digest = hashlib.sha256()
    for text in (plan.key, source_digest(emit(plan).source), gpu, weights, str(tokens)):
        digest.update(text.encode() + b"\0")
    name = f"{plan.spec}-{plan.size}-{plan.target.replace(':', '_')}-c{context}-{digest.hexdigest()[:16]}.jsonl"
    return Journal(cache_dir() / "tune" / name)


def _read(path: Path) -> str:
    """The file's text, empty where there is none. Raises UserError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as trouble:
        raise UserError(f"cannot read {path}: {trouble.strerror or trouble}") from None


def _entries(text: str) -> Iterator[tuple[str, Measurement]]:
    """(plan, measurement) of every whole line: one is cut short where a run was ended while it wrote."""
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            yield entry.pop("plan"), Measurement(**{k: v for k, v in entry.items() if k != "settings"})
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
