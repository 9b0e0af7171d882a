"""How many shots each sum over ranks takes: as a rule says at the group that makes the addends, else by the cost model.

One number serves all steps of a plan. Both give the same bits: addends are added up in rank order, the residual last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mpk_spec.planner.cost import CostModel, sum_us
from mpk_spec.planner.fuse import Fused, FusedSection
from mpk_spec.planner.model import Model
from mpk_spec.planner.schedule import SHARE, Scheduler
from mpk_spec.planner.sums import is_sum
from mpk_spec.planner.tile import outputs

WORDS = {"one_shot": "in one shot", "two_shot": "in two shots"}


@dataclass(frozen=True)
class Choice:
    """Of the addends `part`, which the group `maker` makes."""

    part: str
    maker: str
    two_shots: bool
    note: str


def choose_shots(sections: list[FusedSection], schedulers: list[Scheduler], cost: CostModel) -> list[Choice]:
    """A choice for every sum over ranks, none with one rank. What cannot be goes to the schedulers' problems."""
    first, *others = schedulers
    if first.model.tp == 1:
        return []
    found, makers = [], set()
    for section, group, maker in _sums(sections):
        makers.add(maker)
        found.append(_choose(section, group, maker, first, cost))
        wanted = first.pins(maker).get("all_reduce", (None, ()))[0]
        for other in others:
            theirs, at = other.pins(maker).get("all_reduce", (None, ()))
            if theirs != wanted:
                said = f"'all_reduce' is {wanted or 'auto'} in the {first.step} step and {theirs or 'auto'} in the "
                hint = "one kernel serves all steps: leave 'step' out of this rule's 'when'"
                at = at or first.pins(maker)["all_reduce"][1]
                first.problems.append(first.spec.problem(at, f"{said}{other.step} step", hint))
    for group, settings in ((g, s) for rule in first.asked for g, s in rule.items()):
        if "all_reduce" in settings and group not in makers | {"*"}:
            said = f"the ranks do not add up what '{group}' makes"
            hint = f"groups of whose results they do: {', '.join(sorted(makers))}" if makers else "leave it out"
            first.problems.append(first.spec.problem(settings["all_reduce"][1], said, hint))
    return found


def _sums(sections: list[FusedSection]) -> Iterator[tuple[FusedSection, Fused, str]]:
    """(section, group that adds up, name of the group that makes the addends)."""
    for section in sections:
        for group in section.groups:
            for op in group.ops:
                if op.op.op == "all_reduce":
                    makers = (g.name for g in section.groups if any(o.output == op.inputs[0] for o in g.ops))
                    maker = next(makers, None)
                    if maker is not None:
                        yield section, group, maker


def _choose(section: FusedSection, group: Fused, maker: str, scheduler: Scheduler, cost: CostModel) -> Choice:
    model = scheduler.model
    part = next(o.inputs[0] for o in group.ops if o.op.op == "all_reduce")
    name = f"{part}.all_reduce"
    pin, at = scheduler.pins(maker).get("all_reduce", (None, ()))
    wrong = why_not(section, group, model)
    if wrong:
        if pin == "two_shot" and at[3] != "*":
            said = f"what '{maker}' makes cannot be added up in two shots: {wrong}"
            scheduler.problems.append(scheduler.spec.problem(at, said, "nearest that works: one_shot"))
        return Choice(part, maker, False, f"{name}: {WORDS['one_shot']}, since {wrong}")
    one, two = (sum_us(cost, model.tp, model.types[part].features, scheduler.tokens, shots) for shots in (False, True))
    shots = pin or ("two_shot" if two < one else "one_shot")
    note = f"{name}: {WORDS[shots]}; by the cost model one takes {one:.1f} us, two {two:.1f} us"
    return Choice(part, maker, shots == "two_shot", note)


def why_not(section: FusedSection, group: Fused, model: Model) -> str | None:
    """Why a sum cannot be made in two shots."""
    kind = model.types[group.ops[-1].output]
    if not is_sum(group):
        return f"'{group.name}' does more than add up"
    if not section.section.layers:
        return "it is made once, outside of the layers"
    if section.alternates:
        return f"layers take turns with two buffers of '{section.alternates}'"
    if kind.routed or kind.features % (model.tp * SHARE):
        return f"{kind.features} features are no {model.tp} shares of whole vectors of {SHARE}"
    if group.ops[0].inputs[0] in lone_sums(section.groups, model):
        return "no other sum of a layer comes before or after it, which would keep the ranks together"
    return None


def lone_sums(groups: tuple[Fused, ...], model: Model) -> list[str]:
    """Inboxes of a layer that need another copy in the next layer.

    Where one sum over ranks comes after another, they keep the ranks together: nobody writes into an inbox of the next
    layer before all have read this layer's. A sum that no other one comes before or after has no such guard.
    """
    behind: dict[str, set[str]] = {}  # value: the sums that it comes after
    found: list[str] = []
    for group in groups:
        after = set().union(*(behind.get(v, set()) for v in group.inputs))
        found += (sums := inboxes(group, model))
        after |= set(sums)
        for value in outputs(group, model):
            behind[value] = after
    pairs = {(x, z) for x in found for z in behind.get(x, ()) if x != z}
    guarded = {x for pair in pairs for x in pair}
    return [x for x in found if x not in guarded]


def inboxes(group: Fused, model: Model) -> list[str]:
    """Partial values that this group adds up over ranks."""
    return [
        op.inputs[0]
        for op in group.ops
        if op.op.op in ("all_reduce", "argmax_reduce") and model.types[op.inputs[0]].partial
    ]
