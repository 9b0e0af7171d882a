"""Fusions that rules of the schedule leave out, whole (`fuse: false`) or but for some of their operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpk_spec.planner.model import Model
    from mpk_spec.planner.schedule import Scheduler
    from mpk_spec.schema import Spec

IN_ONE = {"append", "attention"}  # the kernel appends to the cache where it attends
Fuse = bool | tuple[str, ...]


@dataclass(frozen=True)
class Cut:
    """What is left of a fusion, None for all of it gone; `at`: where a rule says so."""

    of: tuple[str, ...] | None
    at: tuple

    @property
    def fuse(self) -> bool | list[str]:
        """In the spec's own words."""
        return False if self.of is None else list(self.of)


def cut_fusions(spec: Spec, model: Model, schedulers: Sequence[Scheduler]) -> dict[str, Cut]:
    """The fusions that rules cut, alike in all steps. What cannot be goes to the schedulers' problems."""
    found: dict[str, Cut] = {}
    for name in spec.fusions:
        first = _asked(schedulers[0], name)
        for other in schedulers[1:]:
            if _asked(other, name)[0] != first[0]:
                _refuse_steps(name, schedulers[0], other)
        kept, at = first
        if kept is not True:
            found[name] = Cut(kept or None, at)
            _check(spec, model, name, found[name], schedulers[0])
    for name, decl in spec.fusions.items():
        host = found.get(decl.into)
        if host is not None and host.of is None and name not in found:
            found[name] = host
            kept, at = schedulers[0].pins(name).get("fuse", (None, ()))
            if kept is True and at[3] == name:
                said = f"fusion '{name}' goes into '{decl.into}', which a rule leaves out"
                schedulers[0].problems.append(spec.problem(at, said, f"leave out both, or keep '{decl.into}'"))
    return {name: found[name] for name in spec.fusions if name in found}


def left_of(spec: Spec, cuts: Mapping[str, Cut]) -> Spec:
    """The spec with what is left of its fusions."""
    left = {n: f.model_copy(update={"of": list(cuts[n].of or ())}) if n in cuts else f for n, f in spec.fusions.items()}
    return replace(spec, fusions={n: f for n, f in left.items() if f.of})


def notes(spec: Spec, cuts: Mapping[str, Cut]) -> list[str]:
    """For `plan --explain`."""
    said = []
    for name, cut in cuts.items():
        host = spec.fusions[name].into
        if cut.of is not None:
            said.append(f"fusion {name}: of it only {' + '.join(cut.of)}, as a rule says")
        elif host in cuts and cuts[host].of is None:
            said.append(f"fusion {name}: left out with {host}, into which it goes")
        else:
            said.append(f"fusion {name}: left out, as a rule says")
    return said


def inseparable(spec: Spec, fusion: str) -> list[str]:
    """Operators of a fusion that the CUDA kernel has no tasks of their own for."""
    ops: dict[str, Any] = {f"{name}.{key}": op for name, block in spec.blocks.items() for key, op in block.items()}
    roles = {member: getattr(ops.get(member), "role", None) for member in spec.fusions[fusion].of}
    return [member for member, role in roles.items() if role in IN_ONE] if set(roles.values()) >= IN_ONE else []


def _asked(scheduler: Scheduler, name: str) -> tuple[Fuse, tuple]:
    """True: the whole fusion; False: none of it; else what is left, in its own order. And where that is said."""
    fuse, at = scheduler.pins(name).get("fuse", (True, ()))
    of = scheduler.spec.fusions[name].of
    kept = tuple(o for o in of if o in fuse) if isinstance(fuse, list) else fuse
    return kept == tuple(of) or kept, at


def _refuse_steps(name: str, first: Scheduler, other: Scheduler) -> None:
    at = _asked(other, name)[1] or _asked(first, name)[1]
    said = f"fusion '{name}' differs between the {first.step} and the {other.step} step"
    hint = "one kernel serves all steps: leave 'step' out of this rule's 'when'"
    first.problems.append(first.spec.problem(at, said, hint))


def _check(spec: Spec, model: Model, name: str, cut: Cut, scheduler: Scheduler) -> None:
    kept, one = cut.of or (), inseparable(spec, name)
    if cut.at[3] == name and not any(o.name in spec.fusions[name].of for s in model.sections for o in s.ops):
        said = f"this rule matches nothing: there are no operators of fusion '{name}' in this plan"
        scheduler.problems.append(spec.problem(cut.at, said))
    elif scheduler.target.name != "cpu" and not set(one) <= set(kept):
        said = f"the CUDA kernel has one task for {' and '.join(map(repr, one))}"
        works = ", ".join(o for o in spec.fusions[name].of if o in {*one, *kept})
        scheduler.problems.append(spec.problem(cut.at, said, f"write '{name}: {{fuse: [{works}]}}'"))
