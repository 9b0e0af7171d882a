"""`mpk-spec tune --calibrate`: a cost model that predicts what this machine's GPU does."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpk_spec.planner.cost import CostModel
    from mpk_spec.planner.plan import Plan
    from mpk_spec.profiler.calibrate import Fit
    from mpk_spec.profiler.clock import Times

REPEATS = 3  # launches of the kernel that reads no clocks


@dataclass(frozen=True)
class Measured:
    """times: with the clocks read. us: of a token without them. gbps: the ceiling of memory."""

    plan: Plan
    times: Times
    us: float
    gbps: float


def fit_constants(
    model: str, size: str | None, weights: str | None, context: int, tokens: int, stream_gbps: float | None,
    as_json: bool,
) -> None:  # fmt: skip
    """A profile, the constants that fit it, what is left of them without clocks, and how well they predict.

    stream_gbps: the ceiling, measured if None.
    """
    from mpk_spec.planner.cost import cost_model, read_calibration
    from mpk_spec.planner.simulate import simulate
    from mpk_spec.profiler.calibrate import fit, save, without_clocks
    from mpk_spec.profiler.report import path, profile_of

    found = measured(model, size, weights, context, tokens, stream_gbps)
    target = found.plan.target
    known = (read_calibration(target) or {}) | {"stream_gbps": found.gbps}

    def predicted(constants: dict[str, float]):
        return simulate(found.plan, context=context, cost=cost_model(target, known | constants))

    before = profile_of(found.times, predicted({}))
    fits = fit(before.steps)
    clocked = profile_of(found.times, predicted({one.name: one.value for one in fits}))
    share = without_clocks(fits, lambda constants: predicted(constants).us, found.us)
    final = [replace(one, value=one.value * share) for one in fits]
    kept = save(target, final, stream_gbps=round(found.gbps, 1))
    if as_json:
        print(json.dumps({one.name: one.value for one in final} | {"stream_gbps": found.gbps}, indent=2))
        return
    now = predicted({one.name: one.value for one in final})
    print(page(fits, share, before.predicted.cost), end="\n\n")
    print(f"with clocks read at every task a token takes {before.us / 1e3:.4f} ms; 'recorded' predicts that:")
    print(path(clocked), end="\n\n")
    print(
        f"without them it takes {found.us / 1e3:.4f} ms, predicted {before.predicted.ms:.4f} ms before and "
        f"{now.ms:.4f} ms now,\nwith {100 * share:.0f} % of what was recorded; the ceiling is {found.gbps:.0f} GB/s"
    )
    print(kept)


def measured(
    model: str, size: str | None, weights: str | None, context: int, tokens: int, stream_gbps: float | None
) -> Measured:
    """On this machine's GPU."""
    from mpk_spec.cli.profile import planned
    from mpk_spec.cli.progress import progress
    from mpk_spec.perf.ceiling import measure_ceiling
    from mpk_spec.perf.clock import time_decode
    from mpk_spec.planner.targets import find_target
    from mpk_spec.profiler.clock import common_clock
    from mpk_spec.profiler.run import record
    from mpk_spec.runtime.cuda_backend import CudaBackend
    from mpk_spec.runtime.cuda_device import free_gpu, gpu_alone
    from mpk_spec.runtime.cuda_probe import PROFILE

    with progress() as report, gpu_alone():
        plan, checkpoint = planned(model, size, weights, context, tokens, report)
        if stream_gbps is None:
            report("measuring the ceiling of memory", 0, 0)
            stream_gbps = measure_ceiling(find_target(plan.target)).gbps
            free_gpu()
        clocked = CudaBackend(plan, checkpoint, report, defines=(PROFILE,))
        report("recording", 0, 0)
        (raw,) = record(clocked, context, tokens)
        report("timing the kernel", 0, 0)
        plain = CudaBackend(plan, checkpoint, share=clocked)
        ms = time_decode(plain, context, tokens, REPEATS).kernel_ms
        plain.close()
        clocked.close()
    return Measured(plan, common_clock(*raw), ms * 1e3, stream_gbps)


def page(fits: list[Fit], share: float, cost: CostModel) -> str:
    """A table: constant, as it was, as it is now, as recorded, the middle half of the samples."""
    from mpk_spec.planner.report import table

    rows = [
        [f.name, f"{getattr(cost, f.name):.3f}", f"{f.value * share:.3f}", f"{f.value:.3f}",
         f"{f.low:.3f} to {f.high:.3f}", f.samples]
        for f in fits
    ]  # fmt: skip
    return table(["constant", "was", "now", "recorded", "middle half", "samples"], rows, frozenset({"constant"}))
