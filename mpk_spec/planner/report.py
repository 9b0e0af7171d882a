"""A plan in words and tables: what it consists of, what it should cost, why it is so, and how two plans differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mpk_spec.planner.plan import Group, Plan, Step, Template
from mpk_spec.planner.targets import find_target

if TYPE_CHECKING:
    from mpk_spec.planner.simulate import GroupTime, Simulation
    from mpk_spec.planner.verify import Proof


def summary(plan: Plan, simulation: Simulation, proof: Proof | None = None, empty: Simulation | None = None) -> str:
    """The whole report of a plan. `empty`: the same step simulated with little in the cache, for a second figure."""
    parts = [
        _header(plan, simulation, empty),
        _groups(plan, simulation),
        _critical(simulation),
        _balance(simulation),
        _buffers(plan),
    ]
    if proof is not None:
        parts.append(proof.summary())
    return "\n\n".join(parts) + "\n"


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], left: frozenset[str] = frozenset()) -> str:
    """Aligned columns; those in `left` to the left, the others to the right."""
    cells = [list(headers), *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[n]) for row in cells) for n in range(len(headers))]
    lines = []
    for row in cells:
        padded = (c.ljust(w) if h in left else c.rjust(w) for c, w, h in zip(row, widths, headers, strict=True))
        lines.append("  ".join(padded).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _header(plan: Plan, simulation: Simulation, empty: Simulation | None) -> str:
    step, target = simulation.step, find_target(plan.target)
    tasks = sum(len(g.tasks) for s in step.stages for g in step.templates[s.template].groups)
    events = sum(len(step.templates[s.template].events) for s in step.stages)
    many = f", {step.tokens} tokens" if step.tokens > 1 else ""
    lines = [
        f"{plan.spec} {plan.size} on {target.title} ({plan.target}): tp {plan.tp}, batch {plan.batch}, "
        f"context {plan.context}",
        *_cut_fusions(plan),
        f"{step.kind} step{many}: {len(step.stages)} stages, {tasks} tasks, {events} events on {plan.num_sms} SMs, "
        f"ring {size(plan.ring_bytes)} in chunks of {size(plan.chunk_bytes)}",
        f"reads {gb(simulation.weight_bytes)} of weights and {gb(simulation.kv_bytes)} of KV per step"
        + (" and rank" if plan.tp > 1 else ""),
        _predicted(simulation),
    ]
    if empty is not None:
        lines.append(_predicted(empty))
    return "\n".join(lines)


def _cut_fusions(plan: Plan) -> list[str]:
    """Which fusions rules leave out; nothing where they do not."""
    cut = {name: rule["fuse"] for name, rule in plan.schedule.items() if "fuse" in rule}
    said = [f"{name} but for {' and '.join(left)}" if left else name for name, left in cut.items()]
    return [f"without fusions: {', '.join(said)}"] if said else []


def _predicted(simulation: Simulation) -> str:
    return (
        f"predicted {simulation.ms:.3f} ms per step with {simulation.context} positions in the cache, "
        f"{simulation.percent:.1f} % of the ceiling (floor {simulation.floor_ms:.3f} ms at "
        f"{simulation.cost.stream_gbps:.0f} GB/s): {simulation.tokens_per_second:.0f} tokens/s"
    )


GROUP_HEADERS = ("group", "task", "grid", "block", "tasks", "split_k", "kv_splits", "stages", "launch", "waits",
                 "events", "MB", "us", "operators")  # fmt: skip
LEFT = frozenset({"group", "task", "grid", "block", "launch", "operators", "name", "dtype", "placement", "shares with"})


def _groups(plan: Plan, simulation: Simulation) -> str:
    """One table per template that differs: the repeating layer, what comes before it, the head."""
    step = simulation.step
    times = {(t.stage, t.name): t for t in simulation.groups}
    parts = []
    for number, template in enumerate(step.templates):
        rows = [_group_row(group, times.get((template.name, group.name))) for group in template.groups]
        parts.append(f"{_runs(step, number, template)}\n{table(GROUP_HEADERS, rows, LEFT)}")
    return "\n\n".join(parts)


def _runs(step: Step, number: int, template: Template) -> str:
    """'stage y.1, layers 1-35': which stages a template makes."""
    layers = [s.layer for s in step.stages if s.template == number and s.layer is not None]
    if not layers:
        return f"stage {template.name}"
    whole = layers == list(range(layers[0], layers[-1] + 1))
    shown = f"{layers[0]}-{layers[-1]}" if whole and len(layers) > 1 else ", ".join(map(str, layers))
    return f"stage {template.name}, layer{'s' if len(layers) > 1 else ''} {shown}"


def _group_row(group: Group, time: GroupTime | None) -> list[object]:
    waits = max((len(t.waits) for t in group.tasks), default=0)
    events = len({e for t in group.tasks for e in t.signals})
    return [
        group.name, group.task, times(group.grid), times(group.block), len(group.tasks), group.split_k,
        group.kv_splits, group.stages, group.launch, waits, events,
        f"{time.stream_bytes / 1e6:.1f}" if time else "-", f"{time.span_us:.1f}" if time else "-", operators(group),
    ]  # fmt: skip


def operators(group: Group) -> str:
    """The fused operators in order, those of one block together: 'attention.(h q k v)'."""
    runs: list[tuple[str, list[str]]] = []
    for node in group.nodes:
        block, _, name = node.name.partition(".")
        if not name:
            block, name = "", node.name
        if not runs or runs[-1][0] != block:
            runs.append((block, []))
        runs[-1][1].append(name)
    shown = []
    for block, names in runs:
        inner = " ".join(names) if len(names) == 1 or not block else f"({' '.join(names)})"
        shown.append(f"{block}.{inner}" if block else inner)
    return " ".join(shown)


def _critical(simulation: Simulation) -> str:
    """Where the critical path goes, by group."""
    found: dict[str, dict[str, float]] = {}
    for (group, what), us in simulation.critical.items():
        found.setdefault(group, {})[what] = us
    order = list(dict.fromkeys(t.name for t in simulation.groups))
    rows = []
    for name in sorted(found, key=order.index):
        parts = [found[name].get(what, 0.0) for what in ("data", "work", "hop")]
        rows.append([name, *(f"{p:.0f}" for p in parts), f"{sum(parts) / simulation.us:.1%}"])
    title = "critical path in us: the stream (data), arithmetic and signals (work), events or values on their way (hop)"
    return f"{title}\n{table(('group', 'data', 'work', 'hop', 'of step'), rows, LEFT)}"


def _balance(simulation: Simulation) -> str:
    loads = simulation.sm_bytes
    mean = sum(loads) / len(loads)
    line = f"bytes per SM: {mb(min(loads))} to {mb(max(loads))} MB, mean {mb(mean)}"
    if mean:
        line += f" (the fullest has {max(loads) / mean - 1:.1%} more than the mean)"
    busy = simulation.utilisation
    return f"{line}\nSMs work {min(busy):.0%} to {max(busy):.0%} of the time, mean {sum(busy) / len(busy):.0%}"


def _buffers(plan: Plan) -> str:
    rows = []
    for tensor in plan.tensors.values():
        shared = [
            o.name
            for o in plan.tensors.values()
            if o is not tensor
            and o.placement == tensor.placement
            and o.offset < tensor.offset + tensor.bytes
            and tensor.offset < o.offset + o.bytes
        ]
        placement = f"{tensor.placement} inbox" if tensor.inbox else tensor.placement
        placement += f", {tensor.shares}" if tensor.shares != "all" else ""
        placement += f", {tensor.turns} copies" if tensor.turns > 1 else ""
        rows.append([tensor.name, times(tensor.shape), tensor.dtype, placement, tensor.offset, tensor.bytes,
                     ", ".join(shared)])  # fmt: skip
    for state in plan.states.values():
        shape = (state.layers, state.batch, state.context, state.kv_heads, 2, state.head_dim)
        total = 1
        for axis in shape:
            total *= axis
        rows.append([state.name, times(shape), state.dtype, "cuda", "-", total * 2, ""])
    arenas = ", ".join(f"{size(n)} {name}" for name, n in plan.arena_bytes.items())
    headers = ("name", "shape", "dtype", "placement", "offset", "bytes", "shares with")
    return f"buffers ({arenas})\n{table(headers, rows, LEFT)}"


def explain(plan: Plan) -> str:
    """Why the plan is as it is: every fusion, every choice."""
    lines = [f"{plan.name} on {plan.target}, tp {plan.tp}, batch {plan.batch}", "", "choices"]
    lines += [f"  {note}" for note in plan.notes] or ["  none noted"]
    lines += ["", "schedule (pin it with --pin)"]
    lines += [f"  {_scalar(name)}: {_flow(rule)}" for name, rule in {"*": _whole_kernel(plan), **plan.schedule}.items()]
    return "\n".join(lines) + "\n"


def pin(plan: Plan) -> str:
    """The resolved schedule as rules of the spec language: with them, a spec gives this plan again."""
    kinds = {kind: _rules(plan, step) for kind, step in plan.steps.items()}
    alike = all(rules == next(iter(kinds.values())) for rules in kinds.values())
    when = {"target": plan.target, "size": plan.size, "tp": plan.tp, "batch": plan.batch}
    lines = ["schedule:"]
    for kind, rules in kinds.items():
        lines += rule_lines(when if alike else {**when, "step": kind}, {"*": _whole_kernel(plan)} | rules)
        if alike:
            break
    return "\n".join(lines) + "\n"


def _whole_kernel(plan: Plan) -> dict[str, Any]:
    """What rules for `*` alone can say."""
    loader = {key: getattr(plan, f"{key}_bytes") for key in ("in_flight", "in_flight_looking", "prefetch")}
    return {"weight_chunk": plan.weight_chunk_bytes, "order": plan.order, **loader, "crossing": plan.crossing}


def rule_lines(when: dict[str, Any], settings: dict[str, dict[str, Any]]) -> list[str]:
    """An item of `schedule`, settings by group."""
    groups = [f"      {_scalar(name)}: {_flow(rule)}" for name, rule in settings.items()]
    return [f"  - when: {_flow(when)}", "    set:", *groups]


def _rules(plan: Plan, step: Step) -> dict[str, dict[str, Any]]:
    """Settings by group of one step; a group that several templates have is set once."""
    found: dict[str, dict[str, Any]] = {}
    for template in step.templates:
        for group in template.groups:
            keys = plan.schedule.get(group.name, {"grid", "block", "stages", "launch", "partition"})
            rule = {key: getattr(group, key) for key in keys if hasattr(group, key)}
            rule |= {key: plan.schedule[group.name][key] for key in keys if key not in rule}
            found.setdefault(group.name, {k: list(v) if isinstance(v, tuple) else v for k, v in rule.items()})
    found |= {name: rule for name, rule in plan.schedule.items() if rule.keys() == {"fuse"}}
    return {name: found[name] for name in [*(n for n in plan.schedule if n in found), *found]}


def _flow(data: dict[str, Any]) -> str:
    """A YAML flow mapping of scalars and lists of numbers."""
    return "{" + ", ".join(f"{k}: {_scalar(v)}" for k, v in data.items()) + "}"


def _scalar(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    plain = isinstance(value, int) or str(value).replace(".", "a").replace("_", "a").isidentifier()
    return str(value) if plain else f'"{value}"'


def times(axes: Sequence[int]) -> str:
    return "x".join(map(str, axes))


def size(count: float) -> str:
    """Bytes for people."""
    for unit, step in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= step:
            return f"{count / step:.4g} {unit}"
    return f"{count:.0f} bytes"


def gb(count: float) -> str:
    """Bytes read, in powers of ten like a memory's bandwidth."""
    unit, step = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6)) if count >= s), ("kB", 1e3))
    return f"{count / step:.3f} {unit}"


def mb(count: float) -> str:
    return f"{count / 1e6:.2f}"
