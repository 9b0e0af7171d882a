"""The chain of passes: bind, fuse, schedule, lower, tile, events, memory, assign. `plan` adds the proof."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mpk_spec.errors import SpecError
from mpk_spec.ops.base import TensorType
from mpk_spec.planner.assign import assign
from mpk_spec.planner.bind import bind
from mpk_spec.planner.events import StageOrder, connect, enter
from mpk_spec.planner.fuse import Fused, FusedSection, fuse
from mpk_spec.planner.lower import Lowered, lower
from mpk_spec.planner.memory import place
from mpk_spec.planner.model import Model
from mpk_spec.planner.plan import Packing, Plan, Stage, Step, Template, Tensor, Weight
from mpk_spec.planner.schedule import CHUNK_BYTES, Scheduler, linear_rows
from mpk_spec.planner.targets import Target
from mpk_spec.planner.tile import FIXED_SMEM, ROW_TILE, chunk_bytes, outputs, smem_bytes, tile
from mpk_spec.schema import Spec

FEEDS = {"token_ids": "next_ids"}


@dataclass(frozen=True)
class Request:
    """What a plan is asked for. `chunk`: tokens of a prefill step; `draft`: tokens that a verify step checks."""

    size: str
    target: Target
    tp: int
    batch: int
    context: int
    chunk: int
    draft: int
    steps: tuple[str, ...]

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
    sections = fuse(spec, model)
    known = {op.name for s in model.sections for op in s.ops} | {g.name for s in sections for g in s.groups}
    lowered: dict[str, list[_Section]] = {}
    problems: list = []
    ring, chunk = _ring(request, sections, model)
    for kind in request.steps:
        scheduler = Scheduler(
            spec, model, request.target, request.size, request.batch, request.context, kind, ring, problems
        )
        lowered[kind] = [_lower_section(s, model, scheduler) for s in sections]
        known |= {i.group.name for s in lowered[kind] for i in s.items}
        problems += _strangers(spec, scheduler, known)
    if problems:
        raise SpecError(problems)
    drafts = [_draft(kind, request, model, lowered[kind]) for kind in request.steps]
    tensors, arenas = _place(spec, model, lowered, drafts, request)
    splits = _kv_splits(lowered, model)
    states = {n: replace(s, extent=s.kv_heads * splits.get(n, 1)) for n, s in model.states.items()}
    first = lowered[request.steps[0]]
    return Plan(
        name=f"{spec.name}-{request.size}", spec=spec.name, size=request.size, target=request.target.name, tp=request.tp,
        batch=request.batch, context=request.context, num_sms=request.target.num_sms, config=model.config,
        architecture=architecture, steps={d.kind: _step(d, request) for d in drafts}, tensors=tensors,
        weights=model.weights, packings=_packings(first, model), states=states, arena_bytes=arenas, feeds=dict(FEEDS),
        notes=tuple(n for s in sections for n in s.notes), schedule=_resolved(first), ring_bytes=ring * chunk,
        chunk_bytes=chunk, prefixes=tuple(spec.model.prefixes), ignore=(*spec.model.ignore, *_tied_away(spec, model)),
        all_reduces=model.all_reduces,
    )  # fmt: skip


@dataclass
class _Section:
    """Lowered groups of a section; `first` those of layer 0."""

    fused: FusedSection
    items: list[Lowered]
    first: list[Lowered]


def _lower_section(section: FusedSection, model: Model, scheduler: Scheduler) -> _Section:
    items = lower(section.groups, model, scheduler)
    return _Section(section, items, lower(section.first, model, scheduler) if section.first else items)


def _ring(request: Request, sections: list[FusedSection], model: Model) -> tuple[int, int]:
    """(stages, bytes of a stage): as many of the largest chunk as the widest task's activations leave room for."""
    tokens = max(request.tokens(k) for k in request.steps)
    groups = [g for s in sections for g in s.groups]
    widest = max((smem_bytes(g, model, tokens) for g in groups), default=FIXED_SMEM)
    chunk = max((chunk_bytes(g, model) for g in groups if g.kind == "linear"), default=CHUNK_BYTES)
    return max(1, (request.target.smem_bytes - widest) // chunk), chunk


def _strangers(spec: Spec, scheduler: Scheduler, known: set[str]) -> list:
    """Rules that apply here and set groups that this plan does not have."""
    found = []
    for group, settings in scheduler.asked.items():
        if group != "*" and group not in known:
            path = next(iter(settings.values()))[1][:-1]
            hint = f"groups here: {', '.join(sorted(known))}"
            found.append(
                spec.problem(
                    path, f"this rule matches nothing: there is no group '{group}' in this plan", hint, on="key"
                )
            )
    return found


def _kv_splits(lowered: dict[str, list[_Section]], model: Model) -> dict[str, int]:
    """How each state is divided for its attention."""
    found: dict[str, int] = {}
    for sections in lowered.values():
        appends = {
            o.output: o.op.state for s in sections for i in s.items for o in i.group.ops if o.op.role == "append"
        }
        for section in sections:
            for item in section.items:
                if item.group.kind == "attention":
                    found[model.cache_state[item.group.body[0].inputs[1]]] = item.settings.kv_splits
    return found


def _draft(kind: str, request: Request, model: Model, sections: list[_Section]) -> _Drafted:
    tokens = request.tokens(kind)
    splits = _kv_splits({kind: sections}, model)
    inboxes = frozenset(v for s in sections for i in [*s.items, *s.first] for v in _inboxes(i.group, model))
    made: dict[str, tuple[str, StageOrder]] = {}
    stages = []
    for section in sections:
        base = section.fused.section
        for layer in range(base.layers) if base.layers else [None]:
            items = section.first if layer == 0 else section.items
            key = f"{base.name}/{layer == 0 and section.first is not section.items}/{_layer_key(items, layer)}"
            if key not in made:
                groups = [tile(item.group, item.settings, model, layer, tokens, splits) for item in items]
                name = base.name if layer is None else f"{base.name}.{layer}"
                made[key] = (name, connect(groups, request.tp, inboxes if request.tp > 1 else frozenset()))
            stages.append((layer, *made[key]))
    return _Drafted(kind, tokens, stages)


def _layer_key(items: list[Lowered], layer: int | None) -> str:
    return repr([op.at(layer) for i in items for op in i.group.ops if op.per_layer])


def _inboxes(group: Fused, model: Model) -> list[str]:
    """Partial values that this group adds up over ranks."""
    return [
        op.inputs[0]
        for op in group.ops
        if op.op.op in ("all_reduce", "argmax_reduce") and model.types[op.inputs[0]].partial
    ]


def _place(spec: Spec, model: Model, lowered, drafts: list[_Drafted], request: Request):
    """Tensors of all steps, with the room that the largest step needs."""
    stored: dict[str, TensorType] = {}
    inboxes: set[str] = set()
    for sections in lowered.values():
        for section in sections:
            for item in [*section.items, *section.first]:
                stored |= {v: model.types[v] for v in outputs(item.group, model)}
                inboxes |= set(_inboxes(item.group, model)) if request.tp > 1 else set()
    tensors = {name: _tensor(spec, model, name, kind, name in inboxes, request) for name, kind in stored.items()}
    read_elsewhere = _crossing(drafts)
    # peers write inboxes while this rank still reads what lay there before: inboxes share bytes with nothing
    kept = model.carries | set(FEEDS.values()) | read_elsewhere | inboxes | (stored.keys() & {"logits"})
    tokens = max(d.tokens for d in drafts)
    orders = {id(order): order for d in drafts for _, _, order in d.stages}
    return place(tensors, orders.values(), frozenset(kept), tokens, request.tp)


def _tensor(spec: Spec, model: Model, name: str, kind: TensorType, inbox: bool, request: Request) -> Tensor:
    decl = spec.tensors.get(name)
    wanted = (decl.placement if decl and decl.placement else spec.tensor_default.placement) or "auto"
    placement = "nvshmem" if inbox else "cuda"
    if wanted == "host" or (wanted == "nvshmem" and request.tp > 1):
        placement = wanted
    shape = (kind.routed, *kind.shape) if kind.routed else kind.shape
    extent = kind.features * model.slots.get(name, 1)
    return Tensor(name, shape, "f32" if inbox else kind.dtype, extent, placement, inbox, bool(kind.routed))


def _crossing(drafts: list[_Drafted]) -> set[str]:
    """Tensors that are read in another stage than they are written in."""
    found: set[str] = set()
    for draft in drafts:
        for _, _, order in draft.stages:
            wrote = {s.tensor for g in order.groups for t in g.tasks for s in t.writes}
            found |= {s.tensor for g in order.groups for t in g.tasks for s in t.reads} - wrote
    return found


def _step(draft: _Drafted, request: Request) -> Step:
    """Stages with their entry waits, equal ones sharing a template."""
    templates: list[Template] = []
    numbers: dict[tuple, int] = {}
    stages: list[Stage] = []
    exits = draft.stages[-1][2].exits
    for layer, name, order in draft.stages:
        key = (id(order), exits)
        if key not in numbers:
            groups = enter(order, exits)
            queues, loads = assign(groups, request.target.num_sms)
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
                    -(-k // max(1, round(ROW_TILE * k * 2 / CHUNK_BYTES))),
                )
                assert linear_rows(group, model) > 0
    return tuple(found.values())


def _tied_away(spec: Spec, model: Model) -> list[str]:
    """Names of tied weights: a checkpoint may still hold the copy that is not read."""
    return [spec.weights[n].from_ for n, w in model.weights.items() if w.source != spec.weights[n].from_]


def _resolved(sections: list[_Section]) -> dict[str, dict[str, Any]]:
    return {i.group.name: i.settings.as_rule(i.group.kind) for s in sections for i in s.items}
