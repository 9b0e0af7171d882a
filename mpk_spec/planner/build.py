"""The chain of passes: bind, fuse, schedule, lower, tile, events, memory, assign. `plan` adds the proof."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mpk_spec.errors import Problem, SpecError
from mpk_spec.planner.assign import assign
from mpk_spec.planner.bind import bind
from mpk_spec.planner.cost import cost_model
from mpk_spec.planner.crossing import Crossing, cross_as_data, in_turns
from mpk_spec.planner.events import StageOrder, connect, enter
from mpk_spec.planner.fuse import FusedSection, fuse
from mpk_spec.planner.lower import Lowered, lower
from mpk_spec.planner.memory import place
from mpk_spec.planner.model import Model
from mpk_spec.planner.plan import Group, Packing, Plan, Stage, Step, Template, Tensor, Weight
from mpk_spec.planner.schedule import CHUNK_BYTES, Scheduler, in_two_shots, linear_rows
from mpk_spec.planner.shots import choose_shots, inboxes, lone_sums
from mpk_spec.planner.sums import sums_into_readers
from mpk_spec.planner.targets import Target
from mpk_spec.planner.tile import FIXED_SMEM, ROW_TILE, chunk_bytes, chunk_columns, outputs, renamed, smem_bytes, tile
from mpk_spec.planner.unfuse import Cut, cut_fusions, left_of, notes
from mpk_spec.planner.whole_kernel import resolve_whole_kernel, weight_chunk
from mpk_spec.schema import Spec


@dataclass(frozen=True)
class Request:
    """What a plan is asked for. `chunk`: tokens of a prefill step; `draft`: tokens that a verify step checks.

    `told`: all tasks of a step's first layer wait for the end of the step before, whether or not that seems needed.
    """

    size: str
    target: Target
    tp: int
    batch: int
    context: int
    chunk: int
    draft: int
    steps: tuple[str, ...]
    told: bool = False

    def tokens(self, kind: str) -> int:
        return {
            "decode": self.batch,
            "prefill": self.chunk,
            "mixed": self.batch + self.chunk,
            "verify": self.batch * (self.draft + 1),
        }[kind]


@dataclass
class _Drafted:
    """One step before memory and queues."""

    kind: str
    tokens: int
    stages: list[tuple[int | None, str, StageOrder]]  # (layer, template name, order)


def build(spec: Spec, architecture: str, config: dict[str, Any], request: Request) -> Plan:
    """Raises SpecError with positions for everything that cannot be planned."""
    model = bind(spec, config, tp=request.tp, batch=request.batch, context=request.context)
    problems: list[Problem] = []
    early = [_scheduler(kind, spec, model, request, 1, problems) for kind in request.steps]
    model.weight_chunk = weight_chunk(early[0])
    cuts = cut_fusions(spec, model, early)
    if problems:
        raise SpecError(problems)
    sections = fuse(left_of(spec, cuts), model, {name: cut.at for name, cut in cuts.items()})
    sections = sums_into_readers(_summed(sections, spec, model, request, problems), model)
    ring, chunk = _ring(request, sections, model)
    lowered: dict[str, _Lowering] = {}
    schedulers: list[Scheduler] = []
    for kind in request.steps:
        scheduler = _scheduler(kind, spec, model, request, ring, problems)
        schedulers.append(scheduler)
        lowered[kind] = _lowering(sections, scheduler)
    slots = _slots(lowered, ring)
    whole = resolve_whole_kernel(schedulers, chunk, slots)
    splits = _kv_splits(spec, lowered, problems)
    _check_sums(spec, lowered[request.steps[0]], problems)
    if problems:
        raise SpecError(problems)
    drafts = [_draft(kind, request, lowered[kind], splits) for kind in request.steps]
    tensors, kept = _tensors(spec, lowered, request)
    crossing = _cross(
        spec,
        {d.kind: _step(d, request, whole.order) for d in drafts},
        tensors,
        model,
        request,
        schedulers[0],
        whole.crossing,
    )
    tensors, arenas = _place(tensors, kept, crossing, drafts, request)
    states = {n: replace(s, extent=s.kv_heads * splits.get(n, 1)) for n, s in model.states.items()}
    first = lowered[request.steps[0]].sections
    return Plan(
        name=f"{spec.name}-{request.size}", spec=spec.name, size=request.size, target=request.target.name,
        tp=request.tp, batch=request.batch, context=request.context, num_sms=request.target.num_sms,
        config=model.config, architecture=architecture, steps=crossing.steps, tensors=tensors,
        weights=model.weights, packings=_packings(first, model), states=states, arena_bytes=arenas, feeds=_feeds(model),
        notes=(*notes(spec, cuts), *(n for s in sections for n in s.notes), _crossing_note(crossing)),
        schedule=_resolved(first, cuts), ring_bytes=slots * chunk,
        chunk_bytes=chunk, weight_chunk_bytes=whole.weight_chunk, order=whole.order, in_flight_bytes=whole.in_flight,
        in_flight_looking_bytes=whole.in_flight_looking, prefetch_bytes=whole.prefetch,
        crossing="data" if crossing.turns else "event",
        prefixes=tuple(spec.model.prefixes), ignore=(*spec.model.ignore, *_tied_away(spec, model)),
        all_reduces=model.all_reduces,
    )  # fmt: skip


def _scheduler(kind: str, spec: Spec, model: Model, request: Request, ring: int, problems: list) -> Scheduler:
    own = replace(model, types=dict(model.types), slots={})
    where = (request.target, request.size, request.batch, request.context)
    return Scheduler(spec, own, *where, kind, request.tokens(kind), ring, problems)


def _summed(sections: list[FusedSection], spec: Spec, model: Model, request: Request, problems: list):
    """The sections with a note for each sum over ranks; `model.two_shots` says which take two shots."""
    schedulers = [_scheduler(kind, spec, model, request, 1, problems) for kind in request.steps]
    choices = choose_shots(sections, schedulers, cost_model(request.target))
    model.two_shots = frozenset(c.part for c in choices if c.two_shots)
    made = [{o.output for o in s.section.ops} for s in sections]
    return [
        replace(s, notes=[*s.notes, *(c.note for c in choices if c.part in own)])
        for s, own in zip(sections, made, strict=True)
    ]


@dataclass
class _Section:
    """Lowered groups of a section; `first` those of layer 0."""

    fused: FusedSection
    items: list[Lowered]
    first: list[Lowered]


@dataclass
class _Lowering:
    """One step kind: its sections, and a model with the types that its splits made."""

    model: Model
    sections: list[_Section]


def _lowering(sections: list[FusedSection], scheduler: Scheduler) -> _Lowering:
    model, done = scheduler.model, []
    for section in sections:
        items = lower(section.groups, model, scheduler)
        done.append(_Section(section, items, lower(section.first, model, scheduler) if section.first else items))
    known = {i.group.name for s in done for i in [*s.items, *s.first]}
    scheduler.problems += scheduler.strangers(known)
    return _Lowering(model, done)


def _ring(request: Request, sections: list[FusedSection], model: Model) -> tuple[int, int]:
    """(stages, bytes of a stage): as many of the largest chunk (of weights, or a block's keys) as the widest task's
    activations leave room for."""
    tokens = max(request.tokens(k) for k in request.steps)
    groups = [g for s in sections for g in s.groups]
    widest = max((smem_bytes(g, model, tokens) for g in groups), default=FIXED_SMEM)
    chunk = max((chunk_bytes(g, model) for g in groups if g.kind == "linear"), default=CHUNK_BYTES)
    chunk = max([chunk, *(s.kv_block * s.row_bytes for s in model.states.values())])
    return max(1, (request.target.smem_bytes - widest) // chunk), chunk


def _slots(lowered: dict[str, _Lowering], ring: int) -> int:
    """Of the ring, which all tasks share: what the group with the most `stages` asks for."""
    items = [i for lowering in lowered.values() for s in lowering.sections for i in [*s.items, *s.first]]
    return max((i.settings.stages for i in items if i.group.kind == "linear"), default=ring)


def _kv_splits(spec: Spec, lowered: dict[str, _Lowering], problems: list) -> dict[str, int]:
    """How each state is divided for its attention: alike in all steps, or a row's sum would depend on its step."""
    found: dict[str, tuple[int, str, str]] = {}
    for kind, lowering in lowered.items():
        for item in (i for s in lowering.sections for i in [*s.items, *s.first] if i.group.kind == "attention"):
            state, splits = lowering.model.cache_state[item.group.body[0].inputs[1]], item.settings.kv_splits
            other, group, step = found.setdefault(state, (splits, item.group.name, kind))
            if splits != other:
                problems.append(
                    spec.problem(
                        ("state", state),
                        f"'{item.group.name}' of the {kind} step divides state '{state}' into {splits} splits, "
                        f"'{group}' of the {step} step into {other}",
                        "pin one 'kv_splits' for both: the order of a row's sum must not depend on the step",
                        on="key",
                    )
                )
    return {state: splits for state, (splits, _, _) in found.items()}


def _draft(kind: str, request: Request, lowering: _Lowering, splits: dict[str, int]) -> _Drafted:
    tokens, model = request.tokens(kind), lowering.model
    items = [i for s in lowering.sections for i in [*s.items, *s.first]]
    exchanged = {v for i in items for v in inboxes(i.group, model)}
    exchanged = {v + copy for v in exchanged for copy in ("", *COPIES)} | _gathered(items, model)
    exchanged = frozenset(exchanged) if request.tp > 1 else frozenset()
    made: dict[str, tuple[str, StageOrder]] = {}
    stages = []
    carried: dict[str, str] = {}  # where the layers' result lies after them, if not under its own name
    for section in lowering.sections:
        base, turns, lone = section.fused.section, section.fused.alternates, _lone_sums(section, model)
        for layer in range(base.layers) if base.layers else [None]:
            items = section.first if layer == 0 else section.items
            copy = _copy(layer, base.layers) if lone else ""
            summed = _carried_sum(section, model)
            first = layer == 0 and (summed or section.first is not section.items)
            variant = (copy, turns and layer % 2, first)
            key = f"{base.name}/{variant}/{_layer_key(items, layer)}"
            if key not in made:
                groups = [tile(item.group, item.settings, model, layer, tokens, splits) for item in items]
                groups = [_turned(g, turns, layer) for g in groups] if turns else groups
                groups = [_from_sum(g, summed, layer) for g in groups] if summed else groups
                for old, new in [*carried.items(), *((v, v + copy) for v in lone if copy)]:
                    groups = [renamed(g, old, new) for g in groups]
                name = base.name if layer is None else f"{base.name}.{layer}"
                made[key] = (name, connect(groups, request.tp, exchanged))
            stages.append((layer, *made[key]))
        if turns and base.layers % 2:
            carried[turns] = turns + OTHER
        if _carried_sum(section, model):
            carried[base.name] = base.name + SUM
    return _Drafted(kind, tokens, stages)


COPIES = (".1", ".2")
OTHER = ".other"
SUM = ".sum"


def _carried_sum(section: _Section, model: Model) -> str | None:
    """The carried value, where it is a sum in two shots: the ranks write it into a buffer of its own."""
    last = section.items[-1].group
    name = section.fused.section.name
    return name if in_two_shots(last, model) and last.ops[-1].output == name else None


def _from_sum(group: Group, carried: str, layer: int) -> Group:
    """Layer 0 reads the carried value where the embedding left it, all others where the layer before summed it."""
    makes = group.nodes[0].op == "all_reduce" and group.nodes[-1].output == carried
    return renamed(group, carried, carried + SUM) if layer or makes else group


def _gathered(items: list[Lowered], model: Model) -> set[str]:
    """Sums in two shots, as their buffers are called."""
    return {
        v + SUM if v in model.carries else v
        for v in (i.group.ops[-1].output for i in items if in_two_shots(i.group, model))
    }


def _turned(group: Group, carried: str, layer: int) -> Group:
    """Even layers read the carried value under its name and write the other buffer, odd ones the other way round."""
    if layer % 2:
        group = renamed(group, carried, carried + OTHER)
    return renamed(group, f"{carried}.next", carried if layer % 2 else carried + OTHER)


def _lone_sums(section: _Section, model: Model) -> list[str]:
    """Inboxes of a layer that need another copy in the next layer, see `lone_sums`."""
    if not section.fused.section.layers or model.tp == 1:
        return []
    return lone_sums(tuple(i.group for i in section.items), model)


def _copy(layer: int, layers: int) -> str:
    """Neighbouring layers differ, and the last one from the first one, which follows it in the next step."""
    number = 2 if layer == layers - 1 and layer % 2 == 0 and layer else layer % 2
    return ("", *COPIES)[number]


def _check_sums(spec: Spec, lowering: _Lowering, problems: list) -> None:
    """A step with one sum over ranks would write the next step's parts while a slow rank still reads this step's."""
    model = lowering.model
    groups = [(i.group, s.fused.section.layers or 1) for s in lowering.sections for i in s.items]
    summed = [v for group, times in groups for v in inboxes(group, model) * times]
    if model.tp == 1 or len(summed) > 1:
        return
    said, hint = f"nothing is split over the {model.tp} ranks: each would compute everything", "plan for one rank"
    if summed:
        said = f"only '{summed[0]}' is exchanged between ranks: nothing keeps a fast rank out of the next step"
        hint = "split what the layers multiply by as well"
    problems.append(spec.problem(("shard", "tp"), said, hint, on="key"))


def _layer_key(items: list[Lowered], layer: int | None) -> str:
    return repr([op.at(layer) for i in items for op in i.group.ops if op.per_layer])


def _feeds(model: Model) -> dict[str, str]:
    """The next step's input and what this step's sample calls it."""
    return {"token_ids": next(o.output for s in model.sections for o in s.ops if o.op.op == "sample")}


def _cross(
    spec: Spec, steps: dict[str, Step], tensors: dict[str, Tensor], model: Model, request: Request,
    scheduler: Scheduler, wanted: str,
) -> Crossing:  # fmt: skip
    """As data where that is possible and not ruled out. SpecError where it is asked for and cannot be."""
    if request.target.name == "cpu" and wanted != "data":
        return Crossing(steps, refused="on the CPU tasks run one after the other")
    crossing = cross_as_data(steps, tensors, model.states, () if request.told else _feeds(model))
    if crossing.refused and wanted == "data":
        said = f"values cannot cross as data here: {crossing.refused}"
        raise SpecError(spec.problem(scheduler.pins("*")["crossing"][1], said, "write 'auto' or 'event'"))
    return Crossing(steps, refused="a rule says so") if wanted == "event" and not crossing.refused else crossing


def _crossing_note(crossing: Crossing) -> str:
    if crossing.refused:
        return f"values cross between SMs by events: {crossing.refused}"
    return f"{', '.join(sorted(crossing.turns))}: cross between SMs as data in steps of one token"


def _tensors(spec: Spec, lowered: dict[str, _Lowering], request: Request) -> tuple[dict[str, Tensor], set[str]]:
    """Tensors of all steps, with the room that the largest step needs; and those that outlive their stage."""
    tensors: dict[str, Tensor] = {}
    kept: set[str] = set()
    for lowering in lowered.values():
        model = lowering.model
        items = [i for s in lowering.sections for i in [*s.items, *s.first]]
        exchanged = {v for i in items for v in inboxes(i.group, model)} if request.tp > 1 else set()
        gathered = _gathered(items, model)
        for name in (v for i in items for v in outputs(i.group, model)):
            made = _tensor(spec, model, name, _shares(name, exchanged, gathered, model), request)
            tensors[name] = max(tensors.get(name, made), made, key=lambda t: t.extent)
        copied = {v for s in lowering.sections for v in _lone_sums(s, model)}
        copies = {v + copy: replace(tensors[v], name=v + copy) for v in copied for copy in COPIES}
        tensors |= copies
        for name in gathered:
            tensors[name] = replace(_tensor(spec, model, name.removesuffix(SUM), "gathered", request), name=name)
        exchanged |= copies.keys() | gathered
        for turns in (s.fused.alternates for s in lowering.sections if s.fused.alternates):
            tensors.pop(f"{turns}.next", None)
            tensors[turns] = _tensor(spec, model, turns, None, request)
            tensors[turns + OTHER] = replace(tensors[turns], name=turns + OTHER)
            kept.add(turns + OTHER)
        # peers write inboxes while this rank still reads what lay there before: inboxes share bytes with nothing
        kept |= {*model.carries, *exchanged, *_feeds(model).values()}
        kept |= {o.inputs[0] for i in items for o in i.group.ops if o.op.op == "argmax_partial"}
    return tensors, kept


def _place(tensors: dict[str, Tensor], kept: set[str], crossing: Crossing, drafts: list[_Drafted], request: Request):
    """Where tensors lie; those that cross as data behind the others, where they share bytes with nothing."""
    tokens = max(d.tokens for d in drafts)
    orders = {id(order): order for d in drafts for _, _, order in d.stages}
    plain = {name: t for name, t in tensors.items() if name not in crossing.turns}
    placed, arenas = place(plain, orders.values(), frozenset(kept | _crossing(drafts)), tokens, request.tp)
    turning, arenas = in_turns(tensors, crossing.turns, arenas, tokens, request.tp)
    return placed | turning, arenas


def _shares(name: str, exchanged: set[str], gathered: set[str], model: Model) -> str | None:
    """`Tensor.shares` of an inbox, None for what is none."""
    if name in gathered:
        return "gathered"
    if name in exchanged:
        return "scattered" if name in model.two_shots else "all"
    return None


def _tensor(spec: Spec, model: Model, name: str, shares: str | None, request: Request) -> Tensor:
    inbox = shares is not None
    kind = model.types[name]
    decl = spec.tensors.get(model.origins.get(name, name)) or spec.tensors.get(name)
    wanted = (decl.placement if decl else None) or spec.tensor_default.placement or "auto"
    if inbox and decl and decl.placement in ("cuda", "host"):
        raise SpecError(
            spec.problem(
                ("tensors", model.origins.get(name, name), "placement"),
                f"'{name}' is summed over {request.tp} ranks: each writes its part into the others' memory",
                "write 'nvshmem' or 'auto'",
            )
        )
    placement = "nvshmem" if inbox else "cuda"
    if not inbox and (wanted == "host" or (wanted == "nvshmem" and request.tp > 1)):
        placement = wanted
    shape = (kind.routed, *kind.shape) if kind.routed else kind.shape
    extent = kind.features * model.slots.get(name, 1)
    dtype = "f32" if inbox and shares != "gathered" else kind.dtype
    return Tensor(name, shape, dtype, extent, placement, inbox, shares or "all", bool(kind.routed))


def _crossing(drafts: list[_Drafted]) -> set[str]:
    """Tensors that are read in another stage than they are written in."""
    found: set[str] = set()
    for draft in drafts:
        for _, _, order in draft.stages:
            wrote = {s.tensor for g in order.groups for t in g.tasks for s in t.writes}
            found |= {s.tensor for g in order.groups for t in g.tasks for s in t.reads} - wrote
    return found


def _step(draft: _Drafted, request: Request, order_of_sms: str) -> Step:
    """Stages with their entry waits, equal ones sharing a template."""
    templates: list[Template] = []
    numbers: dict[tuple, int] = {}
    stages: list[Stage] = []
    exits = draft.stages[-1][2].exits
    for layer, name, order in draft.stages:
        key = (id(order), exits)
        if key not in numbers:
            groups = enter(order, exits)
            queues, loads = assign(groups, request.target.num_sms, order_of_sms)
            numbers[key] = len(templates)
            templates.append(Template(name, groups, dict(order.events), queues, loads))
        stages.append(Stage(numbers[key], layer))
        exits = order.exits
    return Step(draft.kind, draft.tokens, tuple(templates), tuple(stages))


def _packings(sections: list[_Section], model: Model) -> tuple[Packing, ...]:
    found = {}
    for section in sections:
        for item in section.items:
            group = item.group
            if group.kind == "linear":
                k = model.types[group.body[0].inputs[0]].features
                weights: Sequence[Weight] = [model.weights[o.weights["weight"]] for o in group.body]
                found[group.name] = Packing(
                    group.name,
                    tuple(w.name for w in weights),
                    group.pack_layout,
                    group.pack_groups,
                    ROW_TILE,
                    chunk_columns(k, model.weight_chunk),
                )
                assert linear_rows(group, model) > 0
    return tuple(found.values())


def _tied_away(spec: Spec, model: Model) -> list[str]:
    """Names of tied weights: a checkpoint may still hold the copy that is not read."""
    return [spec.weights[n].from_ for n, w in model.weights.items() if w.source != spec.weights[n].from_]


def _resolved(sections: list[_Section], cuts: dict[str, Cut]) -> dict[str, dict[str, Any]]:
    found = {i.group.name: i.settings.as_rule(i.group.kind) for s in sections for i in s.items}
    return found | {name: found.get(name, {}) | {"fuse": cut.fuse} for name, cut in cuts.items()}
