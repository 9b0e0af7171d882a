"""The kinds of checks that a spec can write under `checks:`, and those that every spec gets.

**One new kind = one parameter model + one function.** A function gets the spec's `Fixtures` and its parameters and says
what was expected and what came out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from mpk_spec.errors import MpkSpecError, Problem, SpecError, did_you_mean
from mpk_spec.ops.base import without_rounding
from mpk_spec.schema.models import Section
from mpk_spec.testing.fixtures import Fixtures, WeightsMissing

EXACT = 1e-4  # largest logit error, relative to the largest logit, between two float32 runs of one model
EXACT_POSITIONS = 256


@dataclass(frozen=True)
class Outcome:
    """What a check found. `reason`: why it failed or was skipped, where the numbers do not say it."""

    expected: str
    got: str
    verdict: Literal["pass", "fail", "skip"]
    reason: str = ""


def judged(expected: object, got: object, passed: bool, reason: str = "") -> Outcome:
    return Outcome(str(expected), str(got), "pass" if passed else "fail", "" if passed else reason)


@dataclass(frozen=True)
class Kind:
    """A kind of check. `parameters` is what it may be given in the YAML file."""

    name: str
    parameters: type[Section]
    run: Callable[[Fixtures, Any], Outcome]


KINDS: dict[str, Kind] = {}


def kind(parameters: type[Section]) -> Callable:
    """Registers a function under its own name."""

    def register(function: Callable[[Fixtures, Any], Outcome]) -> Callable:
        KINDS[function.__name__] = Kind(function.__name__, parameters, function)
        return function

    return register


def guarded(run: Callable[[], Outcome]) -> Outcome:
    """`run()`; an error that is meant for a person makes a failed check, weights that are not here a skipped one."""
    try:
        return run()
    except WeightsMissing as missing:
        return Outcome("", "", "skip", missing.message)
    except MpkSpecError as error:
        return Outcome("", "an error", "fail", str(error))


# ---- what a plan says


class Equal(Section):
    size: str = Field(description="one of the spec's sizes")
    equal: int = Field(description="the number it must be")


class PerRank(Equal):
    tp: int = Field(default=1, ge=1, le=8, description="ranks")


class PerDegree(Section):
    size: str = Field(description="one of the spec's sizes")
    tp: dict[int, int] = Field(min_length=1, description="ranks: how many sums over them in one step")


class Applied(Section):
    size: str = Field(description="one of the spec's sizes")
    target: str = Field(default="h100", description="the GPU")
    tp: int = Field(default=1, ge=1, le=8, description="ranks")
    equal: Literal["all"] | list[str] = Field(description="'all', or the names of the fusions that apply")


@kind(Equal)
def parameters(fixtures: Fixtures, given: Equal) -> Outcome:
    from mpk_spec.planner.weights import count_parameters

    plan = fixtures.plan(given.size)
    found = count_parameters(plan.weights, max(s.layers for s in plan.states.values()))
    return judged(given.equal, found, found == given.equal)


@kind(PerRank)
def bytes_per_token(fixtures: Fixtures, given: PerRank) -> Outcome:
    from mpk_spec.planner.weights import weight_bytes

    found = weight_bytes(fixtures.plan(given.size, tp=given.tp))
    return judged(given.equal, found, found == given.equal)


@kind(PerDegree)
def all_reduces(fixtures: Fixtures, given: PerDegree) -> Outcome:
    found = {tp: fixtures.plan(given.size, tp=tp).all_reduces for tp in given.tp}
    return judged(_degrees(given.tp), _degrees(found), found == given.tp)


def _degrees(counts: dict[int, int]) -> str:
    return ", ".join(f"tp {tp}: {count}" for tp, count in counts.items())


@kind(Applied)
def fusions_applied(fixtures: Fixtures, given: Applied) -> Outcome:
    wanted = list(fixtures.spec.fusions) if given.equal == "all" else given.equal
    applied = fusions_of(fixtures.plan(given.size, given.target, given.tp), fixtures.spec)
    missing = [name for name in fixtures.spec.fusions if name in wanted and name not in applied]
    surplus = [name for name in applied if name not in wanted]
    reason = "; ".join(
        f"{what}: {', '.join(names)}" for what, names in (("not applied", missing), ("applied", surplus)) if names
    )
    return judged(", ".join(wanted), ", ".join(applied), not missing and not surplus, reason)


def _address(node) -> str:
    """The operator of the spec that a node does a part of."""
    return node.name.removesuffix(".partial") if node.op == "argmax_partial" else node.name


def fusions_of(plan, spec) -> list[str]:
    """The fusions of which all operators (that this config has) are computed together in the decode step.

    A linear in K splits leaves what follows it to the group that adds the splits up, `NAME.reduce`: still together. A
    sample is where its first stage is: the second needs all of the first.
    """
    groups = []
    for template in plan.steps["decode"].templates:
        together: dict[str, set[str]] = {}
        for group in template.groups:
            together.setdefault(group.name.removesuffix(".reduce"), set()).update(map(_address, group.nodes))
        groups += together.values()
    present = {name for names in groups for name in names}

    def applied(fusion) -> bool:
        members = {m for m in fusion.of if m in present}
        host = spec.fusions[fusion.into].of if fusion.into else ()
        members |= {m for m in host if m in present}
        return bool(members) and any(members <= names for names in groups)

    return [name for name, fusion in spec.fusions.items() if applied(fusion)]


# ---- what its numbers say


class Numeric(Section):
    size: str = Field(description="one of the spec's sizes")
    weights: str = Field(
        default="random:0", pattern="^(checkpoint|random:[0-9]+)$", description="checkpoint, or random:SEED"
    )
    positions: int = Field(default=256, ge=1, description="teacher-forced positions")
    tp: int = Field(default=1, ge=1, le=8, description="ranks")
    at_most: float | int = Field(description="our distance from float32 over that of Hugging Face in bf16, KL mean")


class Planted(Section):
    size: str = Field(description="one of the spec's sizes")
    drop: list[str] = Field(min_length=1, description="operators, as in attention.qn, or values.rope; each on its own")
    must_fail: str = Field(description="the kl_ratio check that must notice each")


@kind(Numeric)
def kl_ratio(fixtures: Fixtures, given: Numeric) -> Outcome:
    ratio = ratio_of(fixtures, given, fixtures.spec)
    return judged(f"at most {given.at_most:.2f}", f"{ratio:.3f}", ratio <= given.at_most)


def ratio_of(fixtures: Fixtures, given: Numeric, spec) -> float:
    """KL mean of a plan of `spec` (perhaps a changed one) over that of Hugging Face in bf16."""
    from mpk_spec.testing.defects import Defect
    from mpk_spec.testing.ours import open_ours

    yardstick = fixtures.yardstick(given.size, given.weights, given.positions)
    checkpoint = fixtures.checkpoint(given.size, given.weights)
    changed = None if spec is fixtures.spec else Defect("dropped", "", spec=lambda _: spec)
    length = max(map(len, yardstick.ids))
    with yardstick.threads():
        ours = open_ours(fixtures.spec, given.size, checkpoint, "cpu", length, given.tp, changed)
        return yardstick.judge(ours).kl_ratio


@kind(Planted)
def planted(fixtures: Fixtures, given: Planted) -> Outcome:
    from mpk_spec.testing.defects import drop_operators

    limits = numeric_check(fixtures.spec, given.must_fail).model_copy(update={"size": given.size})
    ratios = {
        name: ratio_of(fixtures, limits, drop_operators(fixtures.spec, addresses(fixtures.spec, name)))
        for name in given.drop
    }
    unnoticed = [name for name, ratio in ratios.items() if ratio <= limits.at_most]
    shown = ", ".join(f"{ratio:.4g} without {name}" for name, ratio in ratios.items())
    return judged(f"more than {limits.at_most:.2f}", shown, not unnoticed, f"unnoticed: {', '.join(unnoticed)}")


def addresses(spec, name: str) -> list[tuple[str, str]]:
    """The operators that `attention.qn`, a top-level `h`, or `values.rope` (all ropes with these parameters) means."""
    from mpk_spec.testing.defects import operators

    first, _, second = name.rpartition(".")
    known = operators(spec)
    if first == "values":
        return [at for at, op in known.items() if op.op == "rope" and op.parameters == second]
    return [at for at in known if at == (first or "layers", second)]


def numeric_check(spec, name: str) -> Numeric | None:
    """The kl_ratio check of that name, None where there is none."""
    check = spec.checks.get(name)
    if check is None or check.kind != "kl_ratio":
        return None
    return Numeric.model_validate(check.parameters)


# ---- what every spec must do


def plans(fixtures: Fixtures, size: str) -> Outcome:
    plan = fixtures.plan(size)
    tasks = sum(len(g.tasks) for s in plan.steps["decode"].stages for g in _groups(plan, s))
    return Outcome("a proved plan", f"proved, {tasks} tasks a token", "pass")


def _groups(plan, stage):
    return plan.steps["decode"].templates[stage.template].groups


def equals_huggingface(fixtures: Fixtures, size: str, tp: int) -> Outcome:
    """The plan's arithmetic without its roundings is the model's, up to the order of float32 sums."""
    import torch

    from mpk_spec.testing.defects import Defect
    from mpk_spec.testing.ours import open_ours

    yardstick = fixtures.yardstick(size, "random:0", EXACT_POSITIONS)
    ids, truth = yardstick.ids[0], yardstick.truth[0]
    exact = Defect("unrounded", "the spec's own roundings left out", spec=unrounded)
    with without_rounding(), yardstick.threads():
        ours = open_ours(fixtures.spec, size, fixtures.checkpoint(size, "random:0"), "cpu", len(ids), tp, exact)
        error = (ours.logits(ids) - truth).abs().max().item() / truth.abs().max().item()
    found = f"{error:.1e}" if torch.tensor(error).isfinite() else "not a number"
    return judged(f"relative error of logits at most {EXACT:.0e}", found, error <= EXACT)


def unrounded(spec):
    """Without the roundings that the spec writes in its operators: in float32 Hugging Face does not do them either."""
    from mpk_spec.testing.defects import change_operators

    def change(at, op) -> dict[str, str]:
        texts = {field: getattr(op, field) for field in op.model_fields_set}
        return {f: t.replace("round_bf16(", "(") for f, t in texts.items() if isinstance(t, str) and "round_bf16(" in t}

    return change_operators(spec, change)


# ---- reading them


def read_checks(spec) -> dict[str, tuple[Kind, Section]]:
    """Kind and parameters of all the spec's checks, by name. Raises SpecError with every mistake in them."""
    found, problems = {}, []
    for name in spec.checks:
        try:
            found[name] = read_parameters(spec, name)
        except SpecError as error:
            problems += error.problems
    if problems:
        raise SpecError(problems)
    return found


def read_parameters(spec, name: str) -> tuple[Kind, Section]:
    """Kind and parameters of one check. Raises SpecError with every mistake in them."""
    from pydantic import ValidationError

    from mpk_spec.schema.translate import translated

    check = spec.checks[name]
    path = ("checks", name)
    found = KINDS.get(check.kind)
    if found is None:
        at = (*path, "check") if "check" in spec.tree.at(path).data() else path
        on = "value" if at != path else "key"
        message = f"unknown check '{check.kind}'"
        raise SpecError(spec.problem(at, message, did_you_mean(check.kind, KINDS, "checks"), on=on))
    try:
        given = found.parameters.model_validate(check.parameters)
    except ValidationError as error:
        problems = [problem for _, problem in translated(error, found.parameters, spec.tree, path)]
        unknown = [problem for problem in problems if problem.message.startswith("unknown key")]
        raise SpecError(unknown or problems) from None  # a key that is missing may be the one misspelt
    problems = list(_unknown_names(spec, path, given))
    if problems:
        raise SpecError(problems)
    return found, given


def _unknown_names(spec, path: tuple, given: Section) -> list[Problem]:
    """What a check refers to exists."""
    from mpk_spec.testing.defects import operators

    found = []
    if isinstance(given, Planted):
        if numeric_check(spec, given.must_fail) is None:
            ratios = [n for n, check in spec.checks.items() if check.kind == "kl_ratio"]
            hint = did_you_mean(given.must_fail, ratios, "kl_ratio checks")
            found.append(spec.problem((*path, "must_fail"), f"there is no kl_ratio check '{given.must_fail}'", hint))
        known = [f"{block}.{key}" if block != "layers" else key for block, key in operators(spec)]
        known += [f"values.{name}" for name in spec.values]
        for index, name in enumerate(given.drop):
            if name not in known:
                hint = did_you_mean(name, known, "operators and values")
                found.append(spec.problem((*path, "drop", index), f"there is no '{name}' to drop", hint))
            elif not addresses(spec, name):
                message = f"'{name}' cannot be dropped: no rope takes it as its parameters"
                found.append(spec.problem((*path, "drop", index), message))
    if isinstance(given, Applied) and given.equal != "all":
        for index, name in enumerate(given.equal):
            if name not in spec.fusions:
                hint = did_you_mean(name, spec.fusions, "fusions")
                found.append(spec.problem((*path, "equal", index), f"unknown fusion '{name}'", hint))
    return found
