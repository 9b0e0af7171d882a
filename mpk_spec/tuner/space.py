"""What a search may set: for each knob the values that make sense for a plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mpk_spec.planner.targets import find_target
from mpk_spec.planner.unfuse import inseparable

if TYPE_CHECKING:
    from mpk_spec.planner.plan import Group, Plan
    from mpk_spec.schema import Spec

Rules = dict[str, dict[str, Any]]  # settings by group, as under a schedule rule's `set`
KV_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
KV_MERGE = ("auto", "fused", "apart")
KIB = 1024
WEIGHT_CHUNK = tuple(n * KIB for n in (8, 12, 16))
WHOLE_KERNEL: dict[str, tuple[Any, ...]] = {
    "in_flight": tuple(n * KIB for n in (32, 48, 64, 80, 96)),
    "in_flight_looking": tuple(n * KIB for n in (16, 32, 48)),
    "prefetch": tuple(n * KIB for n in (0, 64, 128, 256)),
    "crossing": ("event", "data"),
    "order": ("balanced", "in_turn"),
}


@dataclass(frozen=True)
class Knob:
    """Settings of one group that are chosen together: each choice is a map as under the group's name."""

    group: str
    name: str
    choices: tuple[dict[str, Any], ...]


def knobs(plan: Plan, spec: Spec) -> list[Knob]:
    """All of a plan of `spec` for the GPU: limits of the loader and its ring, how values cross, which SM gets which
    task, grids of linears (most bytes first), bytes of a copy, fusions, splits and who merges them.

    The last four come last: to judge them takes the truth, which is the longest wait of a search.
    """
    groups = _groups(plan)
    attention = [g for g in groups if g.task == "attention"]
    linears = sorted((g for g in groups if g.task == "linear"), key=lambda g: -sum(t.load_bytes for t in g.tasks))
    found = [Knob("*", key, tuple({key: n} for n in values)) for key, values in WHOLE_KERNEL.items()]
    found.append(Knob("*", "stages", tuple({"stages": n} for n in _stages(plan))))
    found += [Knob(g.name, "grid", tuple(_grids(plan, g.name))) for g in linears]
    found.append(Knob("*", "weight_chunk", tuple({"weight_chunk": n} for n in WEIGHT_CHUNK)))
    found += [Knob(name, "fuse", ({"fuse": True}, {"fuse": inseparable(spec, name) or False})) for name in spec.fusions]
    for key, values in (("kv_splits", KV_SPLITS), ("kv_merge", KV_MERGE)):
        found += [Knob(g.name, key, tuple({key: n} for n in values)) for g in attention]
    return found


def _groups(plan: Plan) -> list[Group]:
    """Of the decode step, each name once."""
    templates = plan.steps["decode"].templates
    return list({g.name: g for t in reversed(templates) for g in reversed(t.groups)}.values())[::-1]


def _stages(plan: Plan) -> list[Any]:
    """Chunks of the ring: as many as there is room for, and three quarters and half of those."""
    widest = max(g.smem_bytes for s in plan.steps.values() for t in s.templates for g in t.groups)
    most = (find_target(plan.target).smem_bytes - widest) // plan.chunk_bytes
    return ["auto", *dict.fromkeys(max(1, most * part // 4) for part in (3, 2))]


def _grids(plan: Plan, group: str) -> Iterator[dict[str, Any]]:
    """Tasks of a linear: one per SM; as few as take no longer than that; a row tile more or less for the longest task;
    the most that divide the tiles evenly, unless half of the SMs would idle."""
    from mpk_spec.emit.layout import lay_out

    part, sms = lay_out(plan).packed[group], plan.num_sms
    tiles = -(-part.rows // part.tile_rows)
    longest = -(-tiles // sms)
    counts = {min(tiles, sms), *[d for d in range(sms, sms // 2, -1) if tiles % d == 0][:1]}
    counts |= {-(-tiles // n) for n in (longest - 1, longest, longest + 1) if n > 0}
    for count in sorted(counts):
        yield {"grid": [count, 1, 1], "partition": "balanced" if tiles % count else "even"}


def with_choice(rules: Rules, knob: Knob, choice: dict[str, Any]) -> Rules:
    """`rules` with one knob set otherwise. A fusion that is left out has no other settings."""
    own = {} if choice.get("fuse") is False else rules.get(knob.group, {})
    return {**rules, knob.group: {**own, **choice}}


def with_rules(spec: Spec, rules: Rules) -> Spec:
    """The spec with one more rule, which wins over its own."""
    from mpk_spec.schema.models import Rule

    return replace(spec, schedule=[*spec.schedule, Rule.model_validate({"set": rules})]) if rules else spec


def shown(rules: Rules) -> str:
    """In a line: `attend kv_splits 4, qkv grid 128, o_add fuse false`."""
    words = []
    for group, settings in rules.items():
        owner = "" if group == "*" else f"{group} "
        for key, value in settings.items():
            if key != "partition":
                words.append(f"{owner}{key} {_shown(key, value)}")
    return ", ".join(words) or "as planned"


def _shown(key: str, value: Any) -> str:
    if key == "grid":
        return str(value[0])
    if isinstance(value, list):
        return " + ".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
