"""`mpk-spec tune`: the schedule that is fastest on this machine's GPU, and a cost model that predicts it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpk_spec.cli.options import Size, Unbuilt, Weights
from mpk_spec.errors import UserError


def command(
    model: Unbuilt,
    size: Size = None,
    weights: Weights = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Fit the cost model's constants to a profile and keep them.")
    ] = False,
    context: Annotated[
        int | None,
        typer.Option(
            "-c", "--context", min=16, metavar="N", help="Positions in the cache; default: 128, calibrating 1024."
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, max=256, metavar="N", help="Tokens of a measurement; default: 48, calibrating 8."),
    ] = None,
    limit: Annotated[
        float | None, typer.Option(min=1, metavar="SECONDS", help="End the search in time; it goes on when run again.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Write a spec there that extends SPEC with the rules."),
    ] = None,
    stream_gbps: Annotated[
        float | None,
        typer.Option(min=1, metavar="GBPS", help="Calibrating: the ceiling of memory, not measured then."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Search the schedule that is fastest on this machine's GPU. Needs a GPU.

    Tries the loader's limits, rings of fewer chunks, both ways that values cross between SMs, grids of linears, each
    fusion left out, splits of attention and who merges them. Every candidate's logits are held against those of the
    plan without rules. Prints what was tried and, where the best is faster beyond the noise, its rules. Measurements
    are kept: the same command goes on where it was stopped.

    With --calibrate it fits the cost model's constants instead, into a file per GPU in the cache folder, which 'plan',
    'profile' and 'bench' read: what fits a profile, and of that the part that is left without its clocks, which is
    found by timing the kernel that reads none. The ceiling of memory is measured too.
    """
    from mpk_spec.cli.calibrate import fit_constants
    from mpk_spec.cli.search import Asked, search

    if calibrate:
        for name, given in (("--limit", limit), ("--output", output)):
            if given is not None:
                raise UserError(f"{name} is for the search, --calibrate has none")
        fit_constants(model, size, weights, context or 1024, tokens or 8, stream_gbps, as_json)
        return
    if stream_gbps is not None:
        raise UserError("--stream-gbps is a constant of the cost model", "it goes with --calibrate")
    search(Asked(model, size, weights, context or 128, tokens or 48, limit, output, as_json))
