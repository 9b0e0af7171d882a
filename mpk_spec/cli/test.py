"""`mpk-spec test`: the checks of specs, the built-in ones and their own."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from mpk_spec.errors import SpecError, UserError, VerdictFailed, did_you_mean

WIDEST = 60  # characters of a table's cell


def command(
    specs: Annotated[
        list[str] | None, typer.Argument(metavar="[SPEC...]", help="Spec files or names; default: all of mpk-spec's.")
    ] = None,
    size: Annotated[str | None, typer.Option(metavar="NAME", help="Only checks of this size.")] = None,
    update: Annotated[bool, typer.Option("--update", help="Write the golden plan summaries anew.")] = False,
    only: Annotated[
        str | None, typer.Option("-k", metavar="TEXT", help="Only checks with this in SPEC/CHECK, as in qwen3/golden.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Run the checks of specs: that every size plans, tiny equals Hugging Face, goldens, and the specs' own.

    Exit code 4 if a check fails.
    """
    items = _items(specs or _all_specs(), size, update, only)
    results = []
    for item in items:
        outcome = item.outcome()
        results.append((item, outcome))
        if not as_json:
            print(_line(item, outcome), flush=True)
            if outcome.reason and outcome.verdict == "fail":
                print(_indented(outcome.reason), flush=True)
    if as_json:
        print(json.dumps([_data(item, outcome) for item, outcome in results], indent=2))
    verdicts = [outcome.verdict for _, outcome in results]
    failed = verdicts.count("fail")
    said = f"{verdicts.count('pass')} passed, {failed} failed, {verdicts.count('skip')} skipped"
    if failed:
        raise VerdictFailed(said)
    print(said, file=sys.stderr)


def _all_specs() -> list[str]:
    from mpk_spec.schema import spec_names

    return spec_names()


def _items(names: list[str], size: str | None, update: bool, only: str | None) -> list:
    """All checks asked for; every spec is read before the first check runs."""
    from mpk_spec.schema import load_spec
    from mpk_spec.testing.suite import collect

    items, problems, sizes = [], [], set()
    for name in names:
        try:
            spec = load_spec(name)
            sizes |= set(spec.sizes)
            items += collect(spec, size, update)
        except SpecError as error:
            problems += error.problems
    if problems:
        raise SpecError(problems)
    if size is not None and size not in sizes:
        raise UserError(f"none of these specs has a size '{size}'", did_you_mean(size, sizes, "sizes"))
    found = [item for item in items if only is None or only in f"{item.spec}/{item.name}"]
    if not found:
        raise UserError(f"no check has '{only}' in its name", "names look like qwen3/plans[8b] and qwen3/kl_ratio")
    return found


def _line(item, outcome) -> str:
    name = f"{item.spec}/{item.name}"
    if outcome.verdict == "skip":
        return f"skip  {name:<34} {outcome.reason}"
    expected, got = _short(outcome.expected), _short(outcome.got)
    if outcome.verdict == "pass":
        return f"pass  {name:<34} {got}" + ("" if expected == got else f" (expected {expected})")
    return f"FAIL  {name:<34} expected {expected}, got {got}, {item.position}"


def _short(text: str) -> str:
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."


def _indented(text: str) -> str:
    return "\n".join(f"      {line}" for line in text.splitlines())


def _data(item, outcome) -> dict:
    place = {"file": item.position.file, "line": item.position.line, "column": item.position.column}
    found = {"expected": outcome.expected, "got": outcome.got, "reason": outcome.reason}
    return {"spec": item.spec, "check": item.name, "verdict": outcome.verdict, **found, **place}
