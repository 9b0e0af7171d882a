"""`mpk-spec profile`: where each microsecond of a token goes on this machine's GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpk_spec.cli.options import Size, Weights

if TYPE_CHECKING:
    from mpk_spec.planner.simulate import Simulation
    from mpk_spec.profiler.clock import Times
    from mpk_spec.runtime.cuda_backend import CudaBackend

ROOM = 16  # positions past the context and the recorded tokens, for those before and after


def command(
    model: Annotated[
        str,
        typer.Argument(metavar="SPEC", help="A spec (name or file) or a checkpoint (folder, .gguf, hub:OWNER/NAME)."),
    ],
    size: Size = None,
    weights: Weights = None,
    context: Annotated[
        int, typer.Option("-c", "--context", min=16, metavar="N", help="Positions in the cache while it is measured.")
    ] = 128,
    tokens: Annotated[int, typer.Option(min=1, max=256, metavar="N", help="Tokens to record.")] = 4,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write a trace for ui.perfetto.dev there.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the profile as JSON.")] = False,
) -> None:
    """Record what every task of a few tokens waited for and did, beside what the simulation predicts.

    Runs the kernel's profiling build, which reads the clocks at every task and is a little slower. Needs a GPU.
    """
    from mpk_spec.planner.plan_io import write_aside
    from mpk_spec.profiler.chrome import chrome_trace
    from mpk_spec.profiler.report import page, profile_of

    backend, times, predicted = recorded(model, size, weights, context, tokens)
    profile = profile_of(times, predicted)
    if output is not None:
        write_aside(output, chrome_trace(backend.plan, backend.emitted.step, times))
        print(f"trace: {output}, for ui.perfetto.dev", file=sys.stderr)
    print(json.dumps(profile.data(), indent=2) if as_json else page(profile))


def recorded(
    model: str, size: str | None, weights: str | None, context: int, tokens: int
) -> tuple[CudaBackend, Times, Simulation]:
    """The backend, the times of `tokens` + 1 steps, and what the simulation says of one."""
    from mpk_spec.cli.progress import progress
    from mpk_spec.planner.cost import cost_model, read_calibration
    from mpk_spec.planner.simulate import simulate
    from mpk_spec.profiler.clock import common_clock
    from mpk_spec.profiler.run import record

    with progress() as report:
        backend = _open(model, size, weights, context, tokens, report)
        report("recording", 0, 0)
        times = common_clock(record(backend, context, tokens))
    plan = backend.plan
    predicted = simulate(plan, context=context, cost=cost_model(plan.target, read_calibration(plan.target)))
    return backend, times, predicted


def _open(model: str, size: str | None, weights: str | None, context: int, tokens: int, report) -> CudaBackend:
    """Built to record times, for a context with room for what is recorded."""
    from mpk_spec.cli.target import open_target
    from mpk_spec.runtime.cuda_backend import CudaBackend
    from mpk_spec.runtime.cuda_probe import PROFILE
    from mpk_spec.runtime.select import plan_for_gpu

    target = open_target(model, report, size=size, weights=weights)
    room = -(-(context + tokens + ROOM) // 64) * 64
    plan = plan_for_gpu(target.spec, target.size, target.checkpoint, room)
    return CudaBackend(plan, target.checkpoint, report, defines=(PROFILE,))
