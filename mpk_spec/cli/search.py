"""The search of `mpk-spec tune`, from the command line's words to the printed rules."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpk_spec.errors import UserError, VerdictFailed

if TYPE_CHECKING:
    from mpk_spec.cli.target import Target
    from mpk_spec.planner.plan import Plan
    from mpk_spec.tuner.search import Gain, Search, Trial
    from mpk_spec.tuner.space import Rules


@dataclass(frozen=True)
class Asked:
    """What is searched, how it is measured, and for how many seconds (None: until the end)."""

    model: str
    size: str | None
    weights: str | None
    context: int
    tokens: int
    limit: float | None
    output: Path | None
    as_json: bool


def search(asked: Asked) -> None:
    """Prints what was tried, the best, and its rules; then VerdictFailed where candidates computed wrong numbers."""
    from mpk_spec.cli.progress import progress
    from mpk_spec.cli.target import open_target
    from mpk_spec.files import check_place
    from mpk_spec.runtime.cuda_device import gpu_alone
    from mpk_spec.runtime.select import target_here

    if asked.output is not None:
        check_place(asked.output)
    with gpu_alone():
        _, gpu = target_here()
    with progress() as report:
        target = open_target(asked.model, report, size=asked.size, weights=asked.weights)
        if target.build is not None or target.size is None:
            raise UserError(
                f"rules are written for a size that a spec names, '{asked.model}' is none", "tune SPEC --size NAME"
            )
        if asked.output is not None and asked.output.resolve() == target.spec.path.resolve():
            raise UserError(f"{asked.output} is the spec itself", "a file that extends it is written: name another")
        run = _search_of(asked, target, gpu.name, report)
        best = run.run()
        gain = run.confirm(best) if best.rules else None
    print(f"measurements: {run.journal.path}", file=sys.stderr)
    rules = best.rules if gain and gain.is_real else None
    if rules is not None and asked.output is not None:
        _write(asked, target, best, [f"On {gpu.name}: {_gained(gain, asked.context)}."])
    data = result(run, best, gain)
    print(json.dumps(data, indent=2) if asked.as_json else page(run, best, gain, asked))
    wrong = [t for t in run.trials if t.measured is not None and not t.measured.right]
    if wrong:
        raise VerdictFailed(
            f"{len(wrong)} of {len(run.trials)} candidates failed or computed wrong numbers (never chosen)"
        )


def _search_of(asked: Asked, target: Target, gpu: str, report) -> Search:
    from mpk_spec.perf.bench import Settings
    from mpk_spec.tuner.gpu import GpuMeasurer
    from mpk_spec.tuner.journal import journal_of
    from mpk_spec.tuner.search import Search

    planned = planner(target, Settings(asked.context, asked.tokens).room(target.checkpoint.config))
    baseline = planned({})
    measurer = GpuMeasurer(baseline, _opener(target, report), _yardstick(target, report), asked.context, asked.tokens)
    journal = journal_of(baseline, gpu, str(target.checkpoint.source), asked.context, asked.tokens)
    return Search(target.spec, planned, measurer, journal, _say, asked.limit)


def planner(target: Target, cache: int) -> Callable[[Rules], Plan]:
    """The plan under some rules for this machine's GPU; raises for what the planner or the kernel refuses."""
    from mpk_spec.emit.source import emit
    from mpk_spec.runtime.select import plan_for_gpu
    from mpk_spec.tuner.space import with_rules

    def planned(rules: Rules) -> Plan:
        made = plan_for_gpu(with_rules(target.spec, rules), target.size, target.checkpoint, cache)
        emit(made)
        return made

    return planned


def _opener(target: Target, report):
    from mpk_spec.runtime.cuda_backend import CudaBackend

    def opened(plan: Plan, share: CudaBackend | None) -> CudaBackend:
        return CudaBackend(plan, target.checkpoint, None if share else report, share=share)

    return opened


def _yardstick(target: Target, report):
    from mpk_spec.testing.yardstick import Yardstick

    return lambda ids, last: Yardstick(target.checkpoint, ids, report, last)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _write(asked: Asked, target: Target, best: Trial, notes: list[str]) -> None:
    from mpk_spec.files import write_aside
    from mpk_spec.tuner.write import extended

    write_aside(asked.output, extended(target.spec, best.plan, best.rules, asked.output, notes))
    _say(f"wrote {asked.output}")


def page(run: Search, best: Trial, gain: Gain | None, asked: Asked) -> str:
    """A table of all candidates, fastest first, the verdict, and the rules unless they went into a file."""
    from mpk_spec.planner.report import table
    from mpk_spec.tuner.space import shown
    from mpk_spec.tuner.write import rule

    rows = [[shown(t.rules), *_cells(run, t)] for t in sorted(run.trials, key=lambda t: t.ms)]
    text = table(["candidate", "ms/token", "change", "output"], rows, frozenset({"candidate", "output"})) + "\n\n"
    if gain is None:
        return text + f"the plan without rules is the best of {len(rows)}: there is nothing to write"
    said = f"best: {shown(best.rules)}: {_gained(gain, asked.context)}"
    if not gain.is_real:
        why = "within the noise" if gain.after < gain.before else "in turn with the plan it is no faster"
        left = f" and {asked.output} is not written" if asked.output else ""
        return text + f"{said}: {why}, so it is not recommended{left}"
    where = f"the rules are in {asked.output}" if asked.output else f"schedule:\n{rule(best.plan, best.rules)}".rstrip()
    return f"{text}{said}\n\n{where}"


def _cells(run: Search, trial: Trial) -> list[str]:
    if trial.measured is None:
        return ["", "", f"refused: {trial.refused}"]
    measured, first = trial.measured, run.trials[0].measured
    output = measured.output if measured.right else f"WRONG: {measured.output}"
    if measured.ms is None:
        return ["", "", output]
    return [f"{measured.ms:.4f}", f"{measured.ms / first.ms - 1:+.2%}", output]


def _gained(gain: Gain, context: int) -> str:
    saved = gain.before - gain.after
    return (
        f"{gain.after:.4f} ms per token at context {context}, {gain.before:.4f} without, "
        f"{abs(saved):.4f} (+-{gain.error:.4f}) or {abs(saved) / gain.before:.2%} {'less' if saved > 0 else 'more'}"
    )


def result(run: Search, best: Trial, gain: Gain | None) -> dict[str, Any]:
    """For `--json`."""
    tried = [
        {"rules": t.rules, "refused": t.refused, "ms": t.measured and t.measured.ms,
         "right": t.measured and t.measured.right, "output": t.measured and t.measured.output}
        for t in run.trials
    ]  # fmt: skip
    confirmed = gain and {
        "before_ms": gain.before,
        "after_ms": gain.after,
        "error_ms": gain.error,
        "real": gain.is_real,
    }
    return {"tried": tried, "best": best.rules, "confirmed": confirmed, "complete": not run.out_of_time}
