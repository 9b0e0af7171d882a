"""The simulation against what was measured, and the fit of the cost model's constants to it. Needs no GPU.

python benchmarks/predictions.py            # per cent that each prediction is off
python benchmarks/predictions.py --fit      # constants from the runs marked `fitted` alone, and what all then get

Recordings are not what is fitted: their clocks make a small model's token up to 17 % longer. What is measured here has
all in it, so that only a few constants can be told apart; hops are scaled as one, but for attention's, which comes from
a recording, as `sample_us` does. Gauss-Newton on the relative errors, each constant held near its value by TRUST.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np

from mpk_spec.planner import plan
from mpk_spec.planner.cost import CostModel, cost_model
from mpk_spec.planner.simulate import simulate
from mpk_spec.schema import load_spec
from mpk_spec.tuner.space import with_rules

CEILING_GBPS = {"h100": 3137.0, "h200": 4592.0}  # of most machines of RUNS, measured beside them
HOPS = ("data_hop_us", "norm_hop_us", "merge_hop_us")
FITTED = ("busy_look_bytes", "kept_us", "pair_us", "refill_us", "attend_us", "kv_block_us", "kv_pair_us")
ROOM = 0.01  # relative error that counts as much as a constant that is TRUST off
TRUST = 0.25  # of the logarithm
STEP, MOST = 0.1, 0.3  # of the logarithm: to tell a slope, and in one round


@dataclass(frozen=True)
class Run:
    """Milliseconds a token: on one H200 the kernel of step 29 in decode.md, 2026-12-01, on two that of step 25,
    2026-11-30; on H100s that of step 16, 2026-11-25. See h100.md, h200.md and tensor_parallel.md. gbps: the ceiling
    measured beside it, if it is another. copies: bytes of each (`weight_chunk`), if a rule said so. The constants now
    in use were fitted to step 24."""

    target: str
    spec: str
    size: str
    ms: float
    position: int = 128
    tp: int = 1
    fitted: bool = False
    gbps: float | None = None
    copies: int | None = None

    @property
    def name(self) -> str:
        degree = f", tp {self.tp}" if self.tp > 1 else ""
        copies = f", copies of {self.copies // 1024} KiB" if self.copies else ""
        return f"{self.target} {self.spec} {self.size} at {self.position}{degree}{copies}"


RUNS = (
    Run("h200", "smollm2", "135m", 0.282, fitted=True, gbps=4696),
    Run("h200", "qwen3", "0.6b", 0.432, fitted=True, gbps=4590),
    Run("h200", "llama3", "1b", 0.586, gbps=4692), Run("h200", "qwen3", "1.7b", 0.835, gbps=4687),
    Run("h200", "qwen3", "8b", 3.417, fitted=True, gbps=4593),
    Run("h200", "qwen3", "8b", 3.558, position=4096, gbps=4578),
    Run("h200", "qwen3", "8b", 4.377, position=32768, fitted=True, gbps=4687),
    Run("h200", "qwen3", "32b", 14.345, fitted=True, gbps=4590),
    Run("h200", "qwen3", "0.6b", 0.486, copies=8192), Run("h200", "qwen3", "8b", 3.830, copies=8192),
    Run("h200", "qwen3", "8b", 1.900, tp=2), Run("h200", "qwen3", "32b", 7.731, tp=2),
    Run("h100", "smollm2", "135m", 0.284), Run("h100", "qwen3", "0.6b", 0.505), Run("h100", "llama3", "1b", 0.828),
    Run("h100", "qwen3", "1.7b", 1.158), Run("h100", "qwen3", "8b", 4.998),
    Run("h100", "qwen3", "8b", 5.236, position=4096), Run("h100", "qwen3", "8b", 6.863, position=32768),
    Run("h100", "qwen3", "32b", 20.94),
)  # fmt: skip


@cache
def planned(run: Run):
    context = 512 if run.position < 512 else run.position + 256
    spec = load_spec(run.spec)
    if run.copies:
        spec = with_rules(spec, {"*": {"weight_chunk": run.copies}})
    return plan(spec, size=run.size, target=run.target, context=context, tp=run.tp, verified=False)


def predicted_ms(run: Run, constants: dict[str, float] | None = None) -> float:
    """With the run's own ceiling."""
    known = {"stream_gbps": run.gbps or CEILING_GBPS[run.target], **(constants or {})}
    return simulate(planned(run), context=run.position, cost=cost_model(run.target, known)).ms


def constants_of(logs: np.ndarray, model: CostModel) -> dict[str, float]:
    """`logs`: the logarithm of the factor of all hops, then of each of FITTED."""
    factors = np.exp(logs)
    hops = {name: float(getattr(model, name) * factors[0]) for name in HOPS}
    return hops | {name: float(getattr(model, name) * f) for name, f in zip(FITTED, factors[1:], strict=True)}


def fit(rounds: int = 5) -> dict[str, float]:
    runs, model = [run for run in RUNS if run.fitted], cost_model("h200")
    measured, logs = np.array([run.ms for run in runs]), np.zeros(1 + len(FITTED))
    with ProcessPoolExecutor() as pool:
        for _ in range(rounds):
            tried = [logs, *(logs + STEP * one for one in np.eye(len(logs)))]
            jobs = [(run, constants_of(x, model)) for x in tried for run in runs]
            ms = np.array(list(pool.map(predicted_ms, *zip(*jobs, strict=True)))).reshape(len(tried), len(runs))
            errors = np.log(ms / measured)
            slopes = ((errors[1:] - errors[0]) / STEP).T
            a = np.vstack([slopes / ROOM, np.eye(len(logs)) / TRUST])
            b = np.concatenate([-errors[0] / ROOM, -logs / TRUST])
            logs = logs + np.clip(np.linalg.lstsq(a, b, rcond=None)[0], -MOST, MOST)
    return constants_of(logs, model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true")
    found = fit() if parser.parse_args().fit else {}
    for name, value in found.items():
        print(f"{name} = {value:.3f}")
    print("\n| run | measured, ms | predicted | off by | |\n|---|---:|---:|---:|---|")
    for run in RUNS:
        ms = predicted_ms(run, found)
        print(f"| {run.name} | {run.ms:.3f} | {ms:.3f} | {ms / run.ms - 1:+.1%} | {'fitted' if run.fitted else ''} |")


if __name__ == "__main__":
    main()
