"""Plans as files: JSON out, written aside and renamed; JSON in, checked and proved again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from mpk_spec.errors import UserError
from mpk_spec.files import write_aside
from mpk_spec.planner.plan import PLAN_VERSION, Plan

if TYPE_CHECKING:
    from pydantic import ValidationError

SHOWN = 3  # of a file's defects; the rest are counted


def save_plan(plan: Plan, path: str | Path) -> None:
    """Writes the plan; the file is whole or not there. Raises UserError where it cannot be written."""
    write_aside(Path(path), plan.to_json() + "\n")


def load_plan(path: str | Path) -> Plan:
    """Reads a plan and proves it. Raises UserError for a file that is none, PlanError for one that must not run."""
    from mpk_spec.planner.verify import verify

    plan = read_plan(path)
    verify(plan)
    return plan


def read_plan(path: str | Path) -> Plan:
    """Reads a plan that whoever asks still has to prove. Raises UserError for a file that is none."""
    from pydantic import ValidationError

    path = Path(path)
    text = _read(path)
    _check_version(path, text)
    try:
        return Plan.from_json(text)
    except ValidationError as error:
        raise UserError(
            f"{path} is no plan: {_told(error)}", "make it again with 'mpk-spec plan SPEC -o FILE'"
        ) from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as trouble:
        raise UserError(f"cannot read {path}: {trouble.strerror or trouble}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no plan: it is not text") from None


def _check_version(path: Path, text: str) -> None:
    """Before all else: another version's keys differ, and naming each would hide the cause."""
    try:
        data = json.loads(text)
    except ValueError as trouble:
        raise UserError(f"{path} is no plan: it is not JSON: {trouble}") from None
    if not isinstance(data, dict) or "version" not in data:
        raise UserError(f"{path} is no plan: it has no version", "plans come from 'mpk-spec plan SPEC -o FILE'")
    if data["version"] != PLAN_VERSION:
        raise UserError(
            f"{path} is a plan of version {data['version']}, this is mpk-spec for version {PLAN_VERSION}",
            "make it again with 'mpk-spec plan SPEC -o FILE'",
        )


def _told(error: ValidationError) -> str:
    """What pydantic found, by key."""
    found = []
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"])
        found.append(f"'{place}' is missing" if item["type"] == "missing" else f"'{place}': {item['msg']}")
    rest = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return "; ".join(found[:SHOWN]) + rest
