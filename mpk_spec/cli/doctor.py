"""`mpk-spec doctor`: what this machine has and lacks, and what each lack costs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from mpk_spec.errors import UserError

MARKS = {"ok": "ok", "absent": "--", "warning": "!!", "broken": "XX"}


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what this machine has and lacks for mpk-spec. Fails only where chatting on the CPU would."""
    from mpk_spec.doctor import all_findings

    findings = all_findings()
    if as_json:
        import json

        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            print(f"{MARKS[finding.status]}  {finding.name:<{width}}  {finding.says}")
            if finding.hint:
                print(f"{'':<{width + 6}}hint: {finding.hint}")
    broken = [finding.name for finding in findings if finding.status == "broken"]
    if broken:
        raise UserError(f"chatting on the CPU needs these to work: {', '.join(broken)}")
