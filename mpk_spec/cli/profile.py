"""`mpk-spec profile`: where each microsecond of a token goes on this machine's GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpk_spec.cli.options import Ranks, Size, Unbuilt, Weights
from mpk_spec.errors import UserError

if TYPE_CHECKING:
    from mpk_spec.planner.plan import Plan
    from mpk_spec.planner.simulate import Simulation
    from mpk_spec.profiler.clock import Times
    from mpk_spec.runtime.cuda_backend import CudaBackend
    from mpk_spec.weights import Checkpoint

ROOM = 16  # positions past the context and the recorded tokens, for those before and after


def command(
    model: Unbuilt,
    size: Size = None,
    weights: Weights = None,
    tp: Ranks = None,
    context: Annotated[
        int, typer.Option("-c", "--context", min=16, metavar="N", help="Positions in the cache while it is measured.")
    ] = 128,
    tokens: Annotated[int, typer.Option(min=1, max=256, metavar="N", help="Tokens to record.")] = 4,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="Write a trace for ui.perfetto.dev there; .gz compresses it."
        ),
    ] = None,
    layer: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Write only layer N of one token, and what is around it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the profile as JSON.")] = False,
) -> None:
    """Record what every task of a few tokens waited for and did, beside what the simulation predicts, and what memory
    was asked for meanwhile.

    Runs the kernel's profiling build, which reads the clocks at every task and is 2 to 25 % slower, most of all where
    tasks are short: small models. Needs a GPU. Of several ranks also what their sums cost beyond what the weights
    hide; the trace has every rank's SMs.
    """
    from mpk_spec.files import check_place
    from mpk_spec.profiler.chrome import chrome_trace, write_trace
    from mpk_spec.profiler.report import report
    from mpk_spec.runtime.select import choose_degree

    if layer is not None and output is None:
        raise typer.BadParameter("says what -o FILE is to hold, and there is no -o", param_hint="--layer")
    if output is not None:
        check_place(output)
    backend, ranks, predicted = recorded(model, size, weights, context, tokens, choose_degree(tp), layer)
    ranks, clocks, data, shown = report(ranks, predicted)
    if output is not None:
        write_trace(output, chrome_trace(backend.plan, backend.emitted.step, ranks, clocks, layer))
        print(f"trace: {output}, for ui.perfetto.dev", file=sys.stderr)
    print(json.dumps(data, indent=2) if as_json else shown)


def recorded(
    model: str, size: str | None, weights: str | None, context: int, tokens: int, tp: int = 1, layer: int | None = None
) -> tuple[CudaBackend, list[Times], Simulation]:
    """The backend, every rank's times of `tokens` + 1 steps by its own clock, and what the simulation says of one.

    The other ranks' processes have ended by then. Raises UserError, before anything runs, if there is no `layer`.
    """
    from mpk_spec.cli.progress import progress
    from mpk_spec.planner.simulate import predict
    from mpk_spec.profiler.clock import common_clock
    from mpk_spec.profiler.run import record
    from mpk_spec.runtime.cuda_device import gpu_alone
    from mpk_spec.runtime.cuda_probe import PROFILE
    from mpk_spec.runtime.parallel_backend import open_kernel

    with progress() as report, gpu_alone():
        plan, checkpoint = planned(model, size, weights, context, tokens, report, tp, layer)
        backend = open_kernel(plan, checkpoint, report, defines=(PROFILE,))
        report("recording", 0, 0)
        times = [common_clock(*raw) for raw in record(backend, context, tokens)]
        backend.close()
    return backend, times, predict(backend.plan, context=context)


def planned(
    model: str, size: str | None, weights: str | None, context: int, tokens: int, report, tp: int = 1,
    layer: int | None = None,
) -> tuple[Plan, Checkpoint]:  # fmt: skip
    """For this machine's GPU and a context with room for what is recorded."""
    from mpk_spec.cli.target import open_target
    from mpk_spec.profiler.chrome import check_layer
    from mpk_spec.runtime.select import plan_for_gpu

    target = open_target(model, report, size=size, weights=weights)
    if target.build is not None:
        raise UserError("a build records no times", "profile SPEC --size NAME compiles a kernel that does")
    room = -(-(context + tokens + ROOM) // 64) * 64
    plan = plan_for_gpu(target.spec, target.size, target.checkpoint, room, tp)
    if layer is not None:
        check_layer(plan, layer)
    return plan, target.checkpoint
