"""Sums over ranks: in one shot or in two, and those in one shot go into the products that read them.

In one shot every rank adds up all features, wherever they are read: one hop between SMs less for each sum. A group
that only adds up the ranks' parts (and the residual) becomes prologue of the linear group that reads its result first;
that group's tasks share the work of writing the result down for whoever else reads it. The sum at a layer's end goes
into the first group of the next layer, and after the last layer into the head.

In two shots a group of its own adds up the rank's share of the features and writes the sum to all ranks: one hop
between ranks more, but a reader loads one row instead of one of each rank.
"""

from __future__ import annotations

from dataclasses import replace

from mpk_spec.planner.fuse import Fused, FusedSection
from mpk_spec.planner.model import Model
from mpk_spec.planner.schedule import in_two_shots

Groups = tuple[Fused, ...]


def sums_into_readers(sections: list[FusedSection], model: Model) -> list[FusedSection]:
    """The sections with as few groups of their own for sums as can be; as they are with one rank."""
    if model.tp == 1:
        return sections
    done = [_inside(section, model) for section in sections]
    return [*done[:-2], *_across(*done[-2:], model)] if len(done) > 1 else done


def _inside(section: FusedSection, model: Model) -> FusedSection:
    notes = list(section.notes)
    groups = _merged(section.groups, section.section.name, notes, model)
    first = _merged(section.first, section.section.name, [], model) if section.first else None
    return replace(section, groups=groups, first=first, notes=notes)


def _merged(groups: Groups, carried: str, notes: list[str], model: Model) -> Groups:
    """Every sum but that of the carried value goes into the group that reads it first, if that is a product."""
    done = list(groups)
    for group in groups:
        made = group.ops[-1].output
        readers = [g for g in done if made in g.inputs]
        if not is_sum(group) or made == carried or not readers or readers[0].kind != "linear":
            continue
        if in_two_shots(group, model):
            continue
        host = readers[0]
        published = (made,) if len(readers) > 1 else ()
        done[done.index(host)] = _with(host, group, published)
        done.remove(group)
        notes.append(f"{group.name}: added up by '{host.name}' as it loads its input")
    return tuple(done)


def _across(section: FusedSection, after: FusedSection, model: Model) -> list[FusedSection]:
    """A layer's last sum goes into the next layer's first group and into the group after the layers.

    Not where layers take turns with buffers, or where no other sum keeps the ranks together (see `build`).
    """
    carried, last = section.section.name, section.groups[-1]
    hosts = [next((g for g in s.groups if carried in g.inputs), None) for s in (section, after)]
    sums = [o for g in section.groups for o in g.ops if o.op.op == "all_reduce"]
    if (
        not section.section.layers or section.alternates or len(sums) < 2
        or not is_sum(last) or last.ops[-1].output != carried or in_two_shots(last, model)
        or any(h is None or h.kind != "linear" for h in hosts)
        or sum(carried in g.inputs for g in after.groups) > 1
    ):  # fmt: skip
        return [section, after]
    again, end = hosts
    first = (section.first or section.groups)[:-1]
    published = (carried,) if sum(carried in g.inputs for g in section.groups) > 1 else ()
    groups = tuple(_with(g, last, published) if g is again else g for g in section.groups[:-1])
    note = f"{last.name}: added up by '{again.name}' of the next layer and by '{end.name}' as they load their input"
    tail = tuple(_with(g, last, ()) if g is end else g for g in after.groups)
    return [
        replace(section, groups=groups, first=first, notes=[*section.notes, note]),
        replace(after, groups=tail),
    ]


def is_sum(group: Fused) -> bool:
    """Whether it adds up the ranks' parts and at most a residual, and does nothing else."""
    names = [o.op.op for o in group.ops]
    return names == ["all_reduce"] or (names == ["all_reduce", "add"] and len(group.ops[1].inputs) == 2)


def _with(host: Fused, group: Fused, published: tuple[str, ...]) -> Fused:
    return replace(host, ops=(*group.ops, *host.ops), published=(*host.published, *published))
