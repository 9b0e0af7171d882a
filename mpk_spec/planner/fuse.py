"""Operators -> groups. A group is a body (linears that share an input, or an attention), with a prologue that every
task recomputes and an epilogue on the features that the task made; or row operators alone.

A fusion that the spec names is legal or refused at its line. An `all_reduce` cuts a group in two: what follows it
starts a group of its own, named after it. So does a `sample` that no longer comes right after its linear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from mpk_spec.errors import Problem, SpecError, did_you_mean
from mpk_spec.planner.model import BoundOp, Model, Section
from mpk_spec.schema import ExpressionError, Spec


@dataclass(frozen=True)
class Fused:
    """Operators computed together, in order. `into` of the first layer's instance: see `fuse`."""

    name: str
    ops: tuple[BoundOp, ...]
    pack_layout: str = "concat"
    pack_groups: int = 1
    published: tuple[str, ...] = ()

    @property
    def body(self) -> tuple[BoundOp, ...]:
        """Its linears, or its attention; empty for row operators alone."""
        return tuple(o for o in self.ops if o.op.role in ("linear", "attention"))

    @property
    def kind(self) -> str:
        if self.body:
            return self.body[0].op.role
        return self.ops[-1].op.role

    @property
    def prologue(self) -> tuple[BoundOp, ...]:
        first = next((n for n, o in enumerate(self.ops) if o in self.body), len(self.ops))
        return self.ops[:first]

    @property
    def epilogue(self) -> tuple[BoundOp, ...]:
        last = max((n for n, o in enumerate(self.ops) if o in self.body), default=len(self.ops) - 1)
        return self.ops[last + 1 :]

    @property
    def keeps_body(self) -> bool:
        """Whether its tasks store what its linears make, for want of an epilogue or for one that leaves it there."""
        return self.kind == "linear" and all(o.op.keeps_input for o in self.epilogue)

    @property
    def inner(self) -> frozenset[str]:
        return frozenset(o.output for o in self.ops)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Values that come from other groups, in order of first use."""
        made: set[str] = set()
        found: dict[str, None] = {}
        for op in self.ops:
            found |= {i: None for i in op.inputs if i not in made}
            made.add(op.output)
        return tuple(found)


@dataclass
class FusedSection:
    """A section's groups in program order; `first` differs in layer 0 where something is fused into it."""

    section: Section
    groups: tuple[Fused, ...]
    first: tuple[Fused, ...] | None = None
    notes: list[str] = field(default_factory=list)
    alternates: str | None = None
    """The carried value, where a group reads and writes it: layers then read one buffer and write another in turn."""


def fuse(spec: Spec, model: Model, cut: Mapping[str, tuple] | None = None) -> list[FusedSection]:
    """Applies the spec's fusions. Raises SpecError for each that is illegal.

    cut: where rules say that there should be less of a fusion, by name: they are to blame then.
    """
    problems: list[Problem] = []
    readers, cut = _readers(model), cut or {}
    done = [_fuse_section(spec, model, section, readers, problems, cut) for section in model.sections]
    if problems:
        raise SpecError(problems)
    done = _fuse_into(spec, done, problems, cut)
    if problems:
        raise SpecError(problems)
    return [_apart(s, model) for s in done]


def _apart(section: FusedSection, model: Model) -> FusedSection:
    """Calls a layer's result `NAME.next` where one group has both it and the layer's input."""
    name = section.section.name
    own = {o.name for o in section.section.ops}

    def has_both(group: Fused) -> bool:
        return name in group.inputs and any(o.output == name and o.name in own for o in group.ops)

    def apart(group: Fused) -> Fused:
        ops = (replace(o, output=f"{name}.next") if o.output == name and o.name in own else o for o in group.ops)
        return replace(group, ops=tuple(ops))

    if not section.section.layers or not any(map(has_both, section.groups)):
        return section
    model.types[f"{name}.next"] = model.types[name]
    first = tuple(map(apart, section.first)) if section.first else None
    return replace(section, groups=tuple(map(apart, section.groups)), first=first, alternates=name)


def _readers(model: Model) -> dict[str, set[str]]:
    """Which operators read each value; a carried value is also read by the next layer and the head."""
    readers: dict[str, set[str]] = {}
    for section in model.sections:
        for op in section.ops:
            for value in op.inputs:
                readers.setdefault(value, set()).add(op.name)
    return readers


def _fuse_section(
    spec: Spec, model: Model, section: Section, readers, problems: list[Problem], cut: Mapping[str, tuple]
) -> FusedSection:
    by_name = {op.name: op for op in section.ops}
    taken: set[str] = set()
    groups: list[Fused] = []
    notes: list[str] = []
    for name, decl in spec.fusions.items():
        members = [by_name[m] for m in decl.of if m in by_name]
        if not members or decl.into:
            continue
        between = [o for o in section.ops if o.op.op == "all_reduce" and _links(o, members)]
        parts = _cut_at_collectives(name, _ordered(section, [*members, *between]))
        if len(parts) > 1:
            notes.append(f"fusion {name}: cut at {', '.join(o.name for o in between)}: ranks add their parts there")
        for part_name, ops in parts:
            wrong = _illegal(model, ops, readers)
            if wrong:
                at = cut.get(name, ("fusions", name, "of"))
                problems.append(spec.problem(at, f"fusion '{name}' is illegal: {wrong[0]}", wrong[1]))
                break
            packing = _packing(spec, model, name, decl, ops, problems, cut) if part_name == name else ("concat", 1)
            groups.append(Fused(part_name, tuple(ops), *packing, published=_published(ops, readers, model)))
            notes.append(f"fusion {part_name}: applied, {' + '.join(o.op.op for o in ops)}")
        taken |= {o.name for o in [*members, *between]}
    groups += [Fused(op.name, (op,)) for op in section.ops if op.name not in taken]
    ordered, circle = _program_order(section, groups)
    if circle:
        name = next(n for n in circle if n in spec.fusions)
        loop = " -> ".join([*circle, circle[0]])
        at = cut.get(name, ("fusions", name, "of"))
        problems.append(spec.problem(at, f"fusion '{name}' is illegal: groups wait for one another: {loop}"))
    return FusedSection(section, tuple(ordered), notes=notes)


def _links(collective: BoundOp, members: Sequence[BoundOp]) -> bool:
    made = {o.output for o in members}
    return collective.inputs[0] in made and any(collective.output in o.inputs for o in members)


def _ordered(section: Section, ops: Sequence[BoundOp]) -> list[BoundOp]:
    names = {o.name for o in ops}
    return [o for o in section.ops if o.name in names]


def _cut_at_collectives(name: str, ops: list[BoundOp]) -> list[tuple[str, list[BoundOp]]]:
    """A collective starts a new group, unless nothing but rows of the same group comes before it; and what follows one
    is sampled by a group of its own."""
    parts: list[tuple[str, list[BoundOp]]] = [(name, [])]
    for op in ops:
        before = parts[-1][1]
        if before and (op.op.op == "all_reduce" or (op.op.op == "sample" and before[-1].op.op == "all_reduce")):
            parts.append((op.name, []))
        parts[-1][1].append(op)
    return parts


def _packing(
    spec: Spec, model: Model, name: str, decl, ops: Sequence[BoundOp], problems: list[Problem], cut: Mapping[str, tuple]
):
    """(layout, groups of rows); notes what the group's weights do not allow."""
    if decl.pack is None:
        return "concat", 1
    linears = [o for o in ops if o.op.role == "linear"]
    rows = {o.name: model.weights[o.weights["weight"]].shape[-2] for o in linears}
    groups, path = 1, ("fusions", name, "pack", "groups")
    if decl.pack.groups is not None:
        try:
            names = {n: model.dims[n] for n in decl.pack.groups.names if n in model.dims}
            groups = decl.pack.groups.evaluate({"config": model.config, **names})
        except ExpressionError as error:
            problems.append(spec.problem(path, error.message, error.hint, inside=(error.offset, error.length)))
            return "concat", 1
    uneven = [n for n, size in rows.items() if not _is_count(groups) or size % groups]
    gated = any(o.op.op == "gated_act" for o in ops)
    if name in cut and (not linears or (decl.pack.layout == "interleave" and not gated)):
        lacks = "linears, whose weights could be packed" if not linears else "gated_act, whose weights are interleaved"
        said = f"what this leaves of fusion '{name}' has no {lacks}"
        problems.append(spec.problem(cut[name], said, "keep it, or write 'fuse: false'"))
    elif not linears:
        problems.append(
            spec.problem(path[:3], f"fusion '{name}' has no linears whose weights could be packed", on="key")
        )
    elif uneven:
        problems.append(
            spec.problem(path, f"{rows[uneven[0]]} rows of '{uneven[0]}' do not divide into {groups} groups")
        )
    elif decl.pack.layout == "interleave" and not gated:
        problems.append(
            spec.problem(
                (*path[:3], "layout"),
                f"fusion '{name}' has no gated_act, whose two weights 'interleave' is for",
                "write 'concat'",
            )
        )
    elif groups > 1 and gated:
        problems.append(
            spec.problem(path, "the rows of a gated_act's weights are not packed in groups", "leave it out")
        )
    else:
        return decl.pack.layout, groups
    return "concat", 1


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _published(ops: Sequence[BoundOp], readers, model: Model) -> tuple[str, ...]:
    """Prologue values that operators outside the group read."""
    fused = Fused("", tuple(ops))
    names = {o.name for o in ops}
    if not fused.body:
        return ()
    return tuple(o.output for o in fused.prologue if o.op.role != "append" and readers.get(o.output, set()) - names)


def _illegal(model: Model, ops: Sequence[BoundOp], readers) -> tuple[str, str | None] | None:
    """Why these operators cannot be one group (and what would work), or None."""
    if not ops:
        return None
    fused, names = Fused("", tuple(ops)), {o.name for o in ops}
    roles = {o.op.role for o in fused.body}
    if len(roles) > 1:
        return "a group has one kind of body, this one has a linear and an attention", "fuse them apart"
    if fused.body and fused.kind == "linear":
        feeds = {o.inputs[0] for o in fused.body}
        if len(feeds) > 1:
            return (
                f"its linears read different values ({', '.join(sorted(feeds))})",
                "linears fuse when they share their input",
            )
    for before, op in pairwise(ops):
        linked = set(op.inputs) & {o.output for o in ops} or set(op.inputs) & set(before.inputs)
        if not linked and op.op.role != "attention" and not any(op.output in o.inputs for o in ops):
            return f"'{op.name}' has nothing to do with the rest of it", None
    for op in fused.prologue if fused.body else ops[:-1]:
        kind = fused.kind if fused.body else "row"
        if kind not in op.op.prologue_of and not (kind == "row" and op.op.epilogue_of):
            body = f"'{fused.body[0].name}'" if fused.body else "the rest"
            return f"'{op.name}' ({op.op.op}) cannot be recomputed before {body} ({kind})", None
    for op in fused.epilogue if fused.body else ():
        if fused.kind not in op.op.epilogue_of:
            return (
                f"'{op.name}' ({op.op.op}) cannot follow '{fused.body[-1].name}' ({fused.kind}) in one task",
                "it needs more of the row than one task makes" if op.op.op == "rmsnorm" else None,
            )
        if op.op.op == "sample" and (len(fused.body) > 1 or fused.epilogue != (op,)):
            return f"'{op.name}' (sample) is fused with nothing but the linear that makes its logits", None
    if fused.epilogue or not fused.body:
        for op in [*fused.body, *fused.epilogue[:-1]] if fused.body else ops[:-1]:
            outside = readers.get(op.output, set()) - names
            if outside:
                return (
                    f"'{op.output}' is also read by '{sorted(outside)[0]}'",
                    "only the last value of a group leaves it",
                )
    return None


def _program_order(section: Section, groups: Sequence[Fused]) -> tuple[list[Fused], list[str]]:
    """Groups after those whose values they read; ties as the operators stand in the spec. And a circle of groups that
    wait for one another, if there is one."""
    position = {op.name: n for n, op in enumerate(section.ops)}
    maker = {op.output: g.name for g in groups for op in g.ops}
    carried = {
        o.output
        for o in section.ops
        if any(o.output in p.inputs for p in section.ops if position[p.name] <= position[o.name])
    }
    waiting = sorted(groups, key=lambda g: max(position[o.name] for o in g.ops))
    done: list[Fused] = []
    placed: set[str] = set()
    needed: dict[str, set[str]] = {}
    while waiting:
        for group in waiting:
            needed[group.name] = {maker[i] for i in group.inputs if i in maker and i not in carried} - {group.name}
            if needed[group.name] <= placed:
                break
        else:
            return list(groups), _circle(needed, placed)
        waiting.remove(group)
        done.append(group)
        placed.add(group.name)
    return done, []


def _circle(needed: dict[str, set[str]], placed: set[str]) -> list[str]:
    """Names that wait for one another, following from any of them what it waits for."""
    trail = [next(n for n in needed if n not in placed)]
    while trail.count(trail[-1]) == 1:
        trail.append(min(needed[trail[-1]] - placed))
    return trail[trail.index(trail[-1]) : -1]


def _fuse_into(
    spec: Spec, sections: list[FusedSection], problems: list[Problem], cut: Mapping[str, tuple]
) -> list[FusedSection]:
    """`{of: [x], into: qkv}`: the operators of an earlier section become prologue of the first layer's `qkv`."""
    for name, decl in spec.fusions.items():
        if not decl.into:
            continue
        source = next((s for s in sections if any(o.name in decl.of for g in s.groups for o in g.ops)), None)
        target = next((s for s in sections if any(g.name == decl.into for g in s.groups)), None)
        if source is None or target is None:
            known = [g.name for s in sections for g in s.groups]
            problems.append(
                spec.problem(
                    ("fusions", name, "into"),
                    f"there is no group '{decl.into}'",
                    did_you_mean(decl.into, known, "groups"),
                )
            )
            continue
        moved = tuple(o for g in source.groups for o in g.ops if o.name in decl.of)
        host = next(g for g in target.groups if g.name == decl.into)
        earlier = target.groups[: target.groups.index(host)]
        allowed = bool(host.body) and all(host.kind in o.op.prologue_of for o in moved)  # rows publish nothing
        allowed &= not any(o.output in g.inputs for o in moved for g in earlier)
        if not allowed or target.section.layers is None or moved[-1].output not in host.inputs:
            problems.append(
                spec.problem(
                    cut.get(decl.into, ("fusions", name, "into")),
                    f"'{moved[-1].name}' cannot be computed inside '{decl.into}'",
                    "it must be the first group of the layers that reads it"
                    + ("" if host.body else ", and have a linear")
                    + (f"; or write '{name}: {{fuse: false}}' too" if decl.into in cut else ""),
                )
            )
            continue
        # other groups of the first layer (the residual) read the value too, so that it is published by shares
        fused = replace(host, ops=(*moved, *host.ops), published=(*host.published, moved[-1].output))
        first = tuple(fused if g is host else g for g in target.groups)
        left = tuple(g for g in source.groups if not any(o in moved for o in g.ops))
        sections[sections.index(source)] = replace(source, groups=left)
        sections[sections.index(target)] = replace(
            target, first=first, notes=[*target.notes, f"fusion {name}: applied in layer 0"]
        )
    return [s for s in sections if s.groups]
