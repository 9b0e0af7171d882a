"""How two plans differ, in words."""

from __future__ import annotations

from collections.abc import Iterator

from mpk_spec.planner.plan import Group, Plan
from mpk_spec.planner.report import operators, times
from mpk_spec.planner.simulate import Simulation, simulate

HEAD = ("spec", "size", "target", "tp", "batch", "context", "num_sms", "ring_bytes", "chunk_bytes",
        "weight_chunk_bytes", "order", "in_flight_bytes", "in_flight_looking_bytes", "prefetch_bytes", "crossing",
        "all_reduces")  # fmt: skip
FIELDS = ("task", "grid", "block", "split_k", "kv_splits", "stages", "partition", "launch", "smem_bytes")


def diff(a: Plan, b: Plan) -> str:
    """Lines `what: a -> b`, by group and field, then totals and predicted times; one line for equal plans."""
    if a.to_json() == b.to_json():
        return "the plans are the same\n"
    lines = [f"{key}: {getattr(a, key)} -> {getattr(b, key)}" for key in HEAD if getattr(a, key) != getattr(b, key)]
    for kind in dict.fromkeys([*a.steps, *b.steps]):
        lines += _steps(a, b, kind)
    lines += _tensors(a, b)
    lines += [f"note: {mark} {note}" for mark, note in _notes(a, b)]
    return "\n".join(lines or ["only the order of tasks or their events differ"]) + "\n"


def _steps(a: Plan, b: Plan, kind: str) -> Iterator[str]:
    if kind not in a.steps or kind not in b.steps:
        yield f"{kind}: only in {'the second' if kind in b.steps else 'the first'}"
        return
    if len(a.steps[kind].stages) != len(b.steps[kind].stages):
        yield f"{kind}: {len(a.steps[kind].stages)} -> {len(b.steps[kind].stages)} stages"
    ours, theirs = _groups(a, kind), _groups(b, kind)
    for name in dict.fromkeys([*ours, *theirs]):
        if name not in theirs:
            yield f"{kind} {name}: gone ({operators(ours[name])})"
        elif name not in ours:
            yield f"{kind} {name}: new ({operators(theirs[name])})"
        else:
            changes = list(_fields(ours[name], theirs[name]))
            if changes:
                yield f"{kind} {name}: {', '.join(changes)}"
    yield from _times(simulate(a, kind), simulate(b, kind), kind)


def _groups(plan: Plan, kind: str) -> dict[str, Group]:
    """By name; those of a template other than the first that has the name as `name in TEMPLATE`, where they differ."""
    found: dict[str, Group] = {}
    for template in plan.steps[kind].templates:
        for group in template.groups:
            if group.name not in found:
                found[group.name] = group
            elif next(_fields(found[group.name], group), None):
                found[f"{group.name} in {template.name}"] = group
    return found


def _fields(a: Group, b: Group) -> Iterator[str]:
    values = [(name, getattr(a, name), getattr(b, name)) for name in FIELDS]
    values.append(("operators", operators(a), operators(b)))
    values.append(("tasks", len(a.tasks), len(b.tasks)))
    values.append(("bytes", sum(t.load_bytes for t in a.tasks), sum(t.load_bytes for t in b.tasks)))
    values.append(("waits", sum(len(t.waits) for t in a.tasks), sum(len(t.waits) for t in b.tasks)))
    for name, ours, theirs in values:
        if ours != theirs:
            yield f"{name} {_shown(ours)} -> {_shown(theirs)}"


def _shown(value: object) -> str:
    return times(value) if isinstance(value, tuple) else str(value)


def _times(a: Simulation, b: Simulation, kind: str) -> Iterator[str]:
    if round(a.bytes) != round(b.bytes):
        yield f"{kind} bytes per step: {a.bytes:.0f} -> {b.bytes:.0f} ({b.bytes / a.bytes - 1:+.1%})"
    if f"{a.ms:.3f}" != f"{b.ms:.3f}":
        yield f"{kind} predicted: {a.ms:.3f} -> {b.ms:.3f} ms ({b.us / a.us - 1:+.1%})"


TENSOR_FIELDS = ("shape", "dtype", "placement", "inbox", "shares", "bytes")


def _tensors(a: Plan, b: Plan) -> Iterator[str]:
    for name in dict.fromkeys([*a.tensors, *b.tensors]):
        if name not in a.tensors or name not in b.tensors:
            yield f"buffer {name}: {'new' if name in b.tensors else 'gone'}"
            continue
        ours, theirs = a.tensors[name], b.tensors[name]
        changed = [f"{key} {_shown(x)} -> {_shown(y)}" for key in TENSOR_FIELDS
                   if (x := getattr(ours, key)) != (y := getattr(theirs, key))]  # fmt: skip
        if changed:
            yield f"buffer {name}: {', '.join(changed)}"


def _notes(a: Plan, b: Plan) -> Iterator[tuple[str, str]]:
    yield from (("-", n) for n in a.notes if n not in b.notes)
    yield from (("+", n) for n in b.notes if n not in a.notes)
