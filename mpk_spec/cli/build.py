"""`mpk-spec build`: comes with the CUDA back end; says so until then."""

from __future__ import annotations

from typing import Annotated

import typer

from mpk_spec.errors import UserError


def command(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="A spec file or the name of one.")],
) -> None:
    """Compile a plan into one CUDA kernel."""
    raise UserError(
        "building the CUDA kernel is not available in this version of mpk-spec",
        hint=f"'mpk-spec plan {spec}' shows and proves the plan; 'mpk-spec chat {spec}' runs it on the CPU",
    )
