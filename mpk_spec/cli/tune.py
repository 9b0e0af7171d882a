"""`mpk-spec tune`: the schedule that is fastest on this machine's GPU, and a cost model that predicts it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpk_spec.cli.options import Size, Unbuilt, Weights
from mpk_spec.errors import UserError

if TYPE_CHECKING:
    from mpk_spec.planner.cost import CostModel
    from mpk_spec.profiler.calibrate import Fit


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
        float | None, typer.Option(min=1, metavar="GBPS", help="A measured ceiling, as 'bench' prints it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Search the schedule that is fastest on this machine's GPU. Needs a GPU.

    Tries the loader's limits, rings of fewer chunks, both ways that values cross between SMs, grids of linears, each
    fusion left out, splits of attention and who merges them. Every candidate's logits are held against those of the
    plan without rules. Prints what was tried and, where the best is faster beyond the noise, its rules. Measurements
    are kept: the same command goes on where it was stopped.

    With --calibrate it fits the cost model's constants instead, into a file per GPU in the cache folder, which 'plan',
    'profile' and 'bench' read. What it fits is a profile, whose clocks are part of the times: of a small model it makes
    predictions that are too slow for the kernel without them.
    """
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


def fit_constants(
    model: str, size: str | None, weights: str | None, context: int, tokens: int, stream_gbps: float | None,
    as_json: bool,
) -> None:  # fmt: skip
    """`--calibrate`: a profile, the constants that fit it, and how well they predict it."""
    from mpk_spec.cli.profile import recorded
    from mpk_spec.planner.simulate import predict
    from mpk_spec.profiler.calibrate import fit, save
    from mpk_spec.profiler.report import path, profile_of

    backend, (times,), predicted = recorded(model, size, weights, context, tokens)
    before = profile_of(times, predicted)
    fits = fit(before.steps)
    kept = save(backend.plan.target, fits, **({"stream_gbps": stream_gbps} if stream_gbps else {}))
    after = profile_of(times, predict(backend.plan, context=context))
    if as_json:
        print(json.dumps({fit.name: fit.value for fit in fits}, indent=2))
        return
    print(page(fits, predicted.cost), end="\n\n")
    now = after.predicted.ms
    print(f"a token takes {before.us / 1e3:.4f} ms, predicted {predicted.ms:.4f} ms before and {now:.4f} ms now")
    print(path(after), end="\n\n")
    print(kept)


def page(fits: list[Fit], cost: CostModel) -> str:
    """A table: constant, as it was, as measured, the middle half of the samples."""
    from mpk_spec.planner.report import table

    rows = [
        [f.name, f"{getattr(cost, f.name):.3f}", f"{f.value:.3f}", f"{f.low:.3f} to {f.high:.3f}", f.samples]
        for f in fits
    ]
    return table(["constant", "was", "now", "middle half", "samples"], rows, frozenset({"constant"}))
