"""`mpk-spec validate`: is this spec right, and what does it come to once everything it extends is put together."""

from __future__ import annotations

from typing import Annotated

import typer

from mpk_spec.errors import SpecError


def command(
    specs: Annotated[list[str], typer.Argument(metavar="SPEC...", help="Spec files or names of specs.")],
    resolved: Annotated[bool, typer.Option("--resolved", help="Print the spec with all it extends, as YAML.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Check specs and say what is wrong with them, where: the language, then a plan of every size."""
    from mpk_spec.planner import check
    from mpk_spec.schema import load_spec
    from mpk_spec.testing.checks import read_checks

    problems, reports = [], []
    for name in specs:
        try:
            spec = load_spec(name)
            read_checks(spec)
            check(spec, verified=False)  # the proof holds the planner to account, not the spec: `plan`, `test` do it
        except SpecError as error:
            problems += error.problems
            reports.append({"spec": name, "ok": False, "problems": [_as_data(problem) for problem in error.problems]})
            continue
        reports.append({"spec": name, "ok": True, **_summary(spec)})
        if resolved and not as_json:
            print(spec.resolved_yaml(), end="")
        elif not as_json:
            print(_line(reports[-1]))
    if as_json:
        import json

        print(json.dumps(reports, indent=2))
    if problems:
        raise SpecError(problems)


def _summary(spec) -> dict:
    return {
        "name": spec.name,
        "path": str(spec.path),
        "architectures": list(spec.model.architectures),
        "sizes": list(spec.sizes),
    }


def _line(report: dict) -> str:
    architectures, sizes = ", ".join(report["architectures"]), ", ".join(report["sizes"])
    return f"ok: {report['name']} ({report['path']}), reads {architectures}, sizes {sizes}"


def _as_data(problem) -> dict:
    position = problem.position
    place = {"file": position.file, "line": position.line, "column": position.column} if position else {}
    return {"message": problem.message, **place, "hint": problem.hint}
