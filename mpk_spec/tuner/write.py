"""What a search found, in the spec's own language: a rule, or a file that extends the spec with it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mpk_spec.planner.report import rule_lines
from mpk_spec.tuner.space import Rules

if TYPE_CHECKING:
    from mpk_spec.planner.plan import Plan
    from mpk_spec.schema import Spec
    from mpk_spec.schema.nodes import Node

STAYS = ("spec", "name", "model", "sizes")  # what a file that extends another says itself


def rule(plan: Plan, rules: Rules) -> str:
    """An item of `schedule` for the GPU, size and ranks of `plan`; its grids would fit no others."""
    when = {"target": plan.target, "size": plan.size, "tp": plan.tp, "batch": plan.batch}
    return "\n".join(rule_lines(when, rules)) + "\n"


def extended(spec: Spec, plan: Plan, rules: Rules, path: Path, notes: list[str]) -> str:
    """A file, to lie at `path`, that gives the plan that `spec` gives under `rules`.

    What is not inherited is said again: the model, its sizes, and rules that `spec` has for single targets.
    """
    from mpk_spec.schema.writer import as_text, written

    tree = spec.tree
    head = written(replace(tree, value={k: tree.value[k] for k in STAYS if k in tree.value}))
    version, _, rest = head.partition("\n")
    own = _pinned(tree)
    schedule = written(replace(tree, value={"schedule": own})) if own.value else "schedule:\n"
    comments = "".join(f"# {note}\n" for note in notes)
    return f"{comments}{version}\nextends: {as_text(_parent(spec.path, path))}\n{rest}{schedule}{rule(plan, rules)}"


def _pinned(tree: Node) -> Node:
    """The schedule's rules for single targets."""
    schedule = tree.child("schedule")
    rules = schedule.value if schedule is not None and isinstance(schedule.value, list) else []
    pinned = [r for r in rules if (when := r.child("when")) is not None and when.child("target") is not None]
    return replace(schedule or tree, value=pinned)


def _parent(spec: Path, path: Path) -> str:
    """How a file at `path` names the spec."""
    from mpk_spec.paths import specs_dir

    if spec.resolve().parent == specs_dir().resolve():
        return spec.stem
    return Path(os.path.relpath(spec.resolve(), path.resolve().parent)).as_posix()
