"""`mpk-spec plan`: the proved plan of a spec as a table, JSON, a schedule or a picture, or compared with another."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpk_spec.errors import UserError

if TYPE_CHECKING:
    from mpk_spec.planner.cost import CostModel
    from mpk_spec.planner.plan import Plan
    from mpk_spec.planner.simulate import Simulation
    from mpk_spec.planner.verify import Proof

STEPS = ("decode", "prefill", "mixed", "verify")
EARLY = 128  # positions in the cache of the second prediction, as after a short prompt


@dataclass(frozen=True)
class Asked:
    """What plans are made for; None: not said."""

    size: str | None
    target: str | None
    tp: int | None
    batch: int | None
    context: int | None
    step: str

    def refuse_beside(self, plan_file: str) -> None:
        """A plan was made for one target and size: asking for another beside it is a mistake."""
        given = [name for name in ("size", "target", "tp", "batch", "context") if getattr(self, name) is not None]
        if given:
            raise UserError(f"{plan_file} is a plan already: --{given[0]} has no place beside it")


def command(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="A spec (name, file), a checkpoint, or a plan (.json).")],
    size: Annotated[
        str | None, typer.Option(metavar="NAME", help="A size of the spec; default: its first real one.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="NAME", help="a100, h100 (default), h200, b200, rtx4090, cpu.")
    ] = None,
    tp: Annotated[int | None, typer.Option(metavar="N", help="Tensor-parallel degree, 1 (default) to 8.")] = None,
    batch: Annotated[
        int | None, typer.Option(metavar="N", help="Sequences decoded together, 1 (default) to 16.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(metavar="N", help="Positions of the KV cache; default: 4096 at most.")
    ] = None,
    step: Annotated[str, typer.Option(metavar="KIND", help="decode, prefill, mixed or verify.")] = "decode",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the plan as JSON, which this command reads again.")
    ] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Print why the plan is so: fusions and choices.")] = False,
    pin: Annotated[
        bool, typer.Option("--pin", help="Print the resolved schedule as rules of the spec language.")
    ] = False,
    diff: Annotated[
        str | None,
        typer.Option(metavar="OTHER", help="Print what changes in OTHER: a plan (.json) or SPEC[:SIZE][@TARGET]."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write the plan as JSON.")
    ] = None,
    timeline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the simulated step: .svg, or .json for ui.perfetto.dev.")
    ] = None,
) -> None:
    """Turn a spec into a proved plan: grids, tasks, events, bytes, buffers and predicted time."""
    shown = [name for name, on in (("--json", as_json), ("--explain", explain), ("--pin", pin), ("--diff", diff)) if on]
    if len(shown) > 1:
        raise typer.BadParameter(f"{' and '.join(shown)} each print something else", param_hint=shown[1])
    if timeline is not None and timeline.suffix not in (".svg", ".json"):
        raise typer.BadParameter(f"want FILE.svg or FILE.json, got {timeline}", param_hint="--timeline")
    if step not in STEPS:
        raise typer.BadParameter(f"want {', '.join(STEPS)}, got {step}", param_hint="--step")
    asked = Asked(size, target, tp, batch, context, step)
    plan, proof = get_plan(spec, asked)
    if output is not None:
        from mpk_spec.planner.plan_io import save_plan

        save_plan(plan, output)
        print(f"wrote {output}", file=sys.stderr)
    if timeline is not None:
        _draw(plan, step, timeline)
    print(_text(plan, proof, asked, shown[0] if shown else "", diff), end="")


def _text(plan: Plan, proof: Proof, asked: Asked, shown: str, other: str | None) -> str:
    """What goes to standard output."""
    from mpk_spec.planner import report

    if shown == "--json":
        return plan.to_json() + "\n"
    if shown == "--explain":
        return report.explain(plan)
    if shown == "--pin":
        return report.pin(plan)
    if other is not None:
        from mpk_spec.planner.diff import diff

        return diff(plan, _other(other, asked)[0])
    simulation = _simulate(plan, asked.step)
    early = _simulate(plan, asked.step, EARLY) if plan.context > EARLY else None
    return report.summary(plan, simulation, proof, early)


def get_plan(name: str, asked: Asked) -> tuple[Plan, Proof]:
    """The plan that a command line asks for: read from a file, or made from a spec or for a checkpoint."""
    from mpk_spec.planner.verify import verify

    if Path(name).suffix == ".json":
        from mpk_spec.planner.plan_io import read_plan

        asked.refuse_beside(name)
        plan = read_plan(name)
    else:
        plan = _make(name, asked)
    return plan, verify(plan)


def _make(name: str, asked: Asked) -> Plan:
    """An unproved plan of a spec or for a checkpoint."""
    from mpk_spec.cli.target import first_size, is_checkpoint
    from mpk_spec.planner import plan
    from mpk_spec.schema import load_spec

    given = {"target": asked.target, "tp": asked.tp, "batch": asked.batch, "context": asked.context}
    common = {key: value for key, value in given.items() if value is not None}
    common |= {"steps": tuple(dict.fromkeys(("decode", "prefill", asked.step))), "verified": False}
    if is_checkpoint(name):
        return _of_checkpoint(name, asked, common)
    spec = load_spec(name)
    return plan(spec, size=asked.size or first_size(spec), **common)


def _of_checkpoint(name: str, asked: Asked, common: dict) -> Plan:
    from mpk_spec.cli.progress import progress
    from mpk_spec.cli.target import open_target
    from mpk_spec.planner import plan_for

    with progress() as report:
        found = open_target(name, report, size=asked.size)
    return plan_for(found.checkpoint, found.spec, found.size, **common)


def _other(name: str, asked: Asked) -> tuple[Plan, Proof]:
    """The plan to compare with. What `SPEC[:SIZE][@TARGET]` does not say is as in the first."""
    from mpk_spec.cli.target import is_checkpoint

    if Path(name).suffix == ".json":
        return get_plan(name, Asked(None, None, None, None, None, asked.step))
    if is_checkpoint(name):
        return get_plan(name, asked)
    name, _, target = name.partition("@")
    name, _, size = name.partition(":")
    return get_plan(name, replace(asked, size=size or asked.size, target=target or asked.target))


def _simulate(plan: Plan, step: str, context: int | None = None) -> Simulation:
    from mpk_spec.planner.simulate import simulate

    return simulate(plan, step, context, _constants(plan.target, quiet=context is not None))


def _constants(target: str, quiet: bool) -> CostModel:
    """The target's constants, those measured on this machine where there are some: said on standard error."""
    from mpk_spec.planner.cost import calibration_file, cost_model, read_calibration

    measured = read_calibration(target)
    if measured and not quiet:
        print(f"predicting with the constants measured for {target}: {calibration_file(target)}", file=sys.stderr)
    return cost_model(target, measured)


def _draw(plan: Plan, step: str, path: Path) -> None:
    from mpk_spec.files import write_aside
    from mpk_spec.planner.timeline import chrome_trace, svg

    simulation = _simulate(plan, step, min(EARLY, plan.context))
    write_aside(path, svg(simulation) if path.suffix == ".svg" else chrome_trace(simulation))
    print(f"wrote {path}", file=sys.stderr)
