"""What was measured, one JSON object per line in the cache folder, so that a search goes on where it was stopped."""

from __future__ import annotations

import hashlib
import json
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
    """Nothing is known against this plan, but its logits cannot be judged here."""


class Journal:
    """Measurements by the key of their plan. What another run appends meanwhile is not seen."""

    def __init__(self, path: Path):
        self.path = path
        self.found = dict(_read(path))

    def add(self, plan: str, settings: str, measured: Measurement) -> None:
        """Keeps it. Raises UserError where the file cannot be written."""
        self.found[plan] = measured
        line = json.dumps({"plan": plan, "settings": settings, **asdict(measured)}) + "\n"
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


def _read(path: Path):
    """(plan, measurement) of every whole line; the last may be cut short where a run was ended while it wrote."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            entry = json.loads(line)
            yield entry.pop("plan"), Measurement(**{k: v for k, v in entry.items() if k != "settings"})
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
