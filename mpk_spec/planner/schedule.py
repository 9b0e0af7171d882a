"""Schedule rules and `auto` -> the settings of every group: grid, block, splits, stages, launch.

What `auto` picks comes from a small cost estimate (see `_linear`, `kv_splits`); what a rule pins is checked here and
refused at its line, with the nearest value that works.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any

from mpk_spec.errors import Problem
from mpk_spec.ops.linear import INTERLEAVE, ROW_TILE
from mpk_spec.planner.fuse import Fused
from mpk_spec.planner.kv_splits import Attended, cheapest_merge, cheapest_splits
from mpk_spec.planner.model import BoundOp, Model
from mpk_spec.planner.targets import TARGETS, Target
from mpk_spec.planner.weights import layer_bytes
from mpk_spec.schema import Spec

BLOCK = (384, 1, 1)  # one warpgroup that loads and schedules, two that compute
K_TILE = 512  # columns of a weight: what K splits are counted in
CHUNK_BYTES = 16 * 1024  # one bulk copy; smaller ones do not reach the ceiling, larger ones have no room beside them
SHARE = 4  # features of a published value, or of a rank's share of a sum, that go together
ROW_FEATURES = 64  # features of a row operator that are worth a task


@dataclass(frozen=True)
class Settings:
    """The resolved schedule of one group."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int] = BLOCK
    split_k: int = 1
    kv_splits: int = 1
    kv_merge: str | None = None
    stages: int = 1
    partition: str = "even"
    launch: str = "static"
    all_reduce: str | None = None

    def as_rule(self, kind: str) -> dict[str, Any]:
        """In the spec's own words, for `plan --pin`."""
        rule: dict[str, Any] = {
            "grid": list(self.grid),
            "block": list(self.block),
            "stages": self.stages,
            "launch": self.launch,
        }
        rule |= {"partition": self.partition} if kind != "attention" else {"kv_splits": self.kv_splits}
        rule |= {"kv_merge": self.kv_merge} if self.kv_merge else {}
        rule |= {"all_reduce": self.all_reduce} if self.all_reduce else {}
        return rule | ({"split_k": self.split_k} if kind == "linear" else {})


@dataclass
class Scheduler:
    """Resolves groups one by one; `problems` collects pins that cannot work."""

    spec: Spec
    model: Model
    target: Target
    size: str
    batch: int
    context: int
    step: str
    tokens: int
    ring_stages: int
    problems: list[Problem]

    def __post_init__(self):
        self.asked: list[dict[str, dict[str, tuple[Any, tuple]]]] = []  # by rule that applies, then group, then key
        for number, rule in enumerate(self.spec.schedule):
            if self._applies(rule.when):
                said = {g: s.model_dump(exclude_unset=True, exclude_none=True) for g, s in rule.set.items()}
                self.asked.append(
                    {g: {k: (v, ("schedule", number, "set", g, k)) for k, v in s.items()} for g, s in said.items()}
                )

    def _applies(self, when: dict[str, Any]) -> bool:
        here = {"target": self.target.name, "size": self.size, "tp": self.model.tp, "batch": self.batch,
                "context": self.context, "step": self.step}  # fmt: skip
        return all(here[k] in (v if isinstance(v, list) else [v]) for k, v in when.items())

    def pins(self, group: str) -> dict[str, tuple[Any, tuple]]:
        """What rules say of a group, later ones winning; in one rule `*` counts before its name. `auto` is no pin."""
        found: dict[str, tuple[Any, tuple]] = {}
        for rule in self.asked:
            found |= rule.get("*", {}) | rule.get(group, {})
        return {k: (_three(v) if k in ("grid", "block") else v, at) for k, (v, at) in found.items() if v != "auto"}

    def strangers(self, known: set[str]) -> list[Problem]:
        """Rules that apply here and set groups that this plan does not have. A fusion that a later rule leaves out is
        none; that `fuse` finds its fusion is checked before."""
        found = []
        for rule in self.asked:
            for group, settings in rule.items():
                places = [at for key, (_, at) in settings.items() if key != "fuse"]
                fuse, said = self.pins(group).get("fuse", (True, ()))
                if not places or group in known | {"*"} or (fuse is False and said[1] > places[0][1]):
                    continue
                message = f"this rule matches nothing: there is no group '{group}' in this plan"
                hint = "a rule leaves this fusion out; " if fuse is False else ""
                hint += f"groups here: {', '.join(sorted(known))}"
                found.append(self.spec.problem(places[0][:-1], message, hint, on="key"))
        return found

    def resolve(self, group: Fused) -> Settings:
        pins = self.pins(group.name)
        kind = group.kind
        block = self._pin(pins, "block", BLOCK)
        if block[0] % 128 or not 256 <= block[0] <= 1024 or block[1:] != (1, 1):
            self._refuse(
                pins,
                "block",
                f"a block is [threads, 1, 1] with threads a multiple of 128 from 256 to 1024, got {list(block)}",
                f"[{max(256, min(1024, round(block[0] / 128) * 128))}, 1, 1]",
            )
        stages = self._pin(pins, "stages", self.ring_stages)
        if not 1 <= stages <= self.ring_stages:
            self._refuse(pins, "stages", f"the ring has {self.ring_stages} stages, got {stages}", str(self.ring_stages))
        common = {"block": block, "stages": stages, "launch": self._pin(pins, "launch", "static")}
        common["all_reduce"] = shots_of(group, self.model)
        if kind == "attention":
            return self._attention(group, pins, common)
        for key in ("kv_splits", "kv_merge"):
            self._no_pin(pins, key, group, "an attention")
        return self._linear(group, pins, common) if kind == "linear" else self._rows(group, pins, common)

    # one method per kind of body

    def _linear(self, group: Fused, pins, common) -> Settings:
        tiles = linear_tiles(group, self.model)
        slots = self._slots(group, common["launch"])
        split = self._split_k(group, pins, tiles, slots)
        sms = self.target.num_sms
        most = max(1, min(tiles, sms // split if slots == 1 else -(-sms // slots)))
        x = self._grid(pins, most, tiles, "row tiles", split * slots)
        partition = self._partition(pins, tiles, x, "row tiles")
        return Settings((x, split * slots, 1), split_k=split, partition=partition, **common)

    def _split_k(self, group: Fused, pins, tiles: int, slots: int) -> int:
        """K splits: as pinned (a grid's second number says it too), else none."""
        k = self.model.types[group.body[0].inputs[0]].features
        k_tiles = -(-k // K_TILE)
        key = "split_k"
        split = self._pin(pins, "split_k", None)
        if split is None and "grid" in pins and slots == 1 and pins["grid"][0][1] > 1:
            key, split = "grid", pins["grid"][0][1]
        works = [d for d in range(1, k_tiles + 1) if k_tiles % d == 0]
        if split is None:
            return 1  # `auto` never splits: the kernel has no task yet that adds up the parts
        wrong, near = None, 1
        if split > 1 and len(group.body) > 1:
            wrong = f"'{group.name}' has {len(group.body)} linears: K is split for one linear alone"
        elif split > 1 and self.model.types[group.body[0].output].routed:
            wrong = f"'{group.name}' multiplies by experts: K is split for a dense linear"
        elif split not in works:
            near = min(works, key=lambda d: abs(d - split))
            wrong = f"{k_tiles} K tiles of {K_TILE} do not divide into {split} splits"
        if wrong is None:
            return split
        self._refuse(pins, key, wrong, str(near) if key == "split_k" else f"[{pins['grid'][0][0]}, {near}, 1]")
        pins.pop("grid", None)  # it would be refused for the same cause
        return near

    def _slots(self, group: Fused, launch: str) -> int:
        """Claimed experts: tasks per row chunk. A combine in the group needs them all in one task."""
        routed = self.model.types[group.body[0].output].routed
        if not routed or launch != "dynamic" or any(o.op.op == "combine" for o in group.ops):
            return 1
        experts = self.model.weights[group.body[0].weights["weight"]].shape[0]
        return min(experts, routed * self.tokens)

    def _attention(self, group: Fused, pins, common) -> Settings:
        self._no_pin(pins, "split_k", group, "a linear")
        (heads, head_dim), (kv_heads, _) = (self.model.types[i].shape for i in group.body[0].inputs)
        state = self.model.states[self.model.cache_state[group.body[0].inputs[1]]]
        weights = layer_bytes(self.model.weights)
        shape = Attended(heads, kv_heads, head_dim, state.kv_block, state.context, weights)
        blocks = -(-state.context // state.kv_block)
        splits, merge = (self._pin(pins, key, None) for key in ("kv_splits", "kv_merge"))
        if splits is None:
            splits = 1 if self.target.name == "cpu" else cheapest_splits(shape, self.target, merge)
        elif not 1 <= splits <= blocks:
            self._refuse(
                pins,
                "kv_splits",
                f"a context of {state.context} has {blocks} blocks of {state.kv_block}, got {splits} splits",
                str(min(max(splits, 1), blocks)),
            )
            splits = 1
        grid = self._pin(pins, "grid", (kv_heads, splits, 1))
        if grid != (kv_heads, splits, 1):
            self._refuse(
                pins,
                "grid",
                f"the grid of an attention is [kv_heads, kv_splits, 1] = [{kv_heads}, {splits}, 1], got {list(grid)}",
                f"set 'kv_splits' instead, or [{kv_heads}, {splits}, 1]",
            )
        merge = self._merge(pins, shape, splits, merge)
        return Settings((kv_heads, splits, 1), kv_splits=splits, kv_merge=merge, **common)

    def _merge(self, pins, shape: Attended, splits: int, pinned: str | None) -> str | None:
        """Who adds up the splits; None where there is but one."""
        if splits == 1:
            return None
        if pinned == "apart" and splits > shape.most_apart:
            said = f"a task merges at most {shape.most_apart} splits of a head of {shape.head_dim}, here are {splits}"
            self._refuse(pins, "kv_merge", said, "write 'fused', or ask for fewer 'kv_splits'")
        return pinned or ("fused" if self.target.name == "cpu" else cheapest_merge(shape, self.target, splits))

    def _rows(self, group: Fused, pins, common) -> Settings:
        self._no_pin(pins, "split_k", group, "a linear")
        units = row_units(group, self.model)
        last = group.ops[-1]
        features = self.model.types[last.output].features // (self.model.tp if in_two_shots(group, self.model) else 1)
        want = max(1, min(self.target.num_sms, units, -(-features // ROW_FEATURES)))
        if last.op.op in ("argmax_partial", "attention_merge"):
            want = min(self.target.num_sms, units)
        x = self._grid(pins, want, units, "parts", 1)
        return Settings((x, 1, 1), partition=self._partition(pins, units, x, "parts"), **common)

    # pins

    def _pin(self, pins, key: str, otherwise):
        return pins[key][0] if key in pins else otherwise

    def _refuse(self, pins, key: str, message: str, nearest: str) -> None:
        if key in pins:
            hint = f"nearest that works: {nearest}" if nearest[0] in "[0123456789" else nearest
            self.problems.append(self.spec.problem(pins[key][1], message, hint))

    def _no_pin(self, pins, key: str, group: Fused, owner: str) -> None:
        if key in pins and pins[key][1][3] != "*" and pins[key][0] != 1:
            self._refuse(pins, key, f"'{group.name}' has no {key}: it is not {owner}", "leave it out")

    def _grid(self, pins, otherwise: int, units: int, what: str, y: int) -> int:
        """Tasks along the output. An `even` partition with no grid of its own takes the most that divide."""
        grid = self._pin(pins, "grid", None)
        if grid is None:
            even = self._pin(pins, "partition", None) == "even"
            return max(d for d in range(1, otherwise + 1) if units % d == 0) if even else otherwise
        if not 1 <= grid[0] <= units or grid[1:] != (y, 1):
            x = min(max(grid[0], 1), units)
            why = f"{units} {what} cannot make a grid of {grid[0]}"
            if grid[1:] != (y, 1):
                why = f"this grid is [{what}, {y}, 1], got {list(grid)}"
            self._refuse(pins, "grid", why, f"[{x}, {y}, 1]")
            return otherwise
        return grid[0]

    def _partition(self, pins, units: int, x: int, what: str) -> str:
        asked = self._pin(pins, "partition", None)
        even = units % x == 0
        if asked != "balanced" and "grid" in pins and not even and pins["grid"][0][0] == x:
            works = sorted((d for d in range(1, units + 1) if units % d == 0), key=lambda d: abs(d - x))[:2]
            self._refuse(
                pins,
                "grid",
                f"{units} {what} do not divide evenly into a grid of {x}",
                f"{' or '.join(f'[{d}, 1, 1]' for d in sorted(works))}, or 'partition: balanced'",
            )
        return asked or ("even" if even else "balanced")


def _three(dims: list[int]) -> tuple[int, int, int]:
    """Grid or block with what was left out: 1."""
    x, y, z = [*dims, 1, 1][:3]
    return x, y, z


def in_two_shots(group: Fused, model: Model) -> bool:
    """Whether each rank computes its share of the group's result, a sum over ranks, and sends it to the others."""
    return group.ops[0].op.op == "all_reduce" and group.ops[0].inputs[0] in model.two_shots


def shots_of(group: Fused, model: Model) -> str | None:
    """How the ranks add up what the group makes; None where they do not. K splits are added up before."""
    summed = {o.inputs[0] for s in model.sections for o in s.ops if o.op.op == "all_reduce"} if model.tp > 1 else ()
    parts = [o.output for o in group.ops if o.output in summed]
    if not parts or group.ops[0].op.op == "split_k_reduce":
        return None
    return "two_shot" if parts[0] in model.two_shots else "one_shot"


def linear_granule(group: Fused, partition: str) -> int:
    """Features of the group's output axis that tasks do not divide: those of a row tile, where as many tiles for each
    are even."""
    if is_interleaved(group):
        return ROW_TILE // len(group.body) if partition == "even" else INTERLEAVE
    return ROW_TILE if partition == "even" else 1


def is_interleaved(group: Fused) -> bool:
    """Whether rows of the group's linears alternate, and are counted as the features that they are gated to."""
    return any(o.op.op == "gated_act" for o in group.epilogue) and group.pack_layout == "interleave"


def linear_rows(group: Fused, model: Model) -> int:
    """The length of the axis that tasks of a linear group divide: rows of all, or features where they are gated."""
    sizes = [linear_features(o, model) for o in group.body]
    return sizes[0] if group.epilogue else sum(sizes)


def linear_features(op: BoundOp, model: Model) -> int:
    """Output features of a linear, whatever its K splits and experts make of their storage."""
    return model.weights[op.weights["weight"]].shape[-2]


def linear_tiles(group: Fused, model: Model) -> int:
    return -(-linear_rows(group, model) // linear_granule(group, "even"))


def row_units(group: Fused, model: Model) -> int:
    """Parts that the last output of a row group can be cut into."""
    out = model.types[group.ops[-1].output]
    if in_two_shots(group, model):
        return out.features // model.tp // SHARE
    step = group.ops[-1].op.granule(out)
    if step == out.features and group.ops[-1].op.op == "rmsnorm":
        step = gcd(out.features, ROW_TILE)
    return max(1, -(-out.features // step))


def unmatched_rules(spec: Spec, sizes: set[str]) -> list[Problem]:
    """Rules whose `when` no known target, size or degree can meet."""
    known: dict[str, set] = {
        "target": set(TARGETS),
        "size": sizes,
        "step": {"decode", "prefill", "mixed", "verify"},
        "tp": set(range(1, 9)),
        "batch": set(range(1, 17)),
    }
    found = []
    for number, rule in enumerate(spec.schedule):
        for key, value in rule.when.items():
            values = value if isinstance(value, list) else [value]
            if key in known and not set(values) & known[key]:
                found.append(
                    spec.problem(
                        ("schedule", number, "when", key),
                        f"this rule matches nothing: no {key} '{values[0]}'",
                        f"known: {', '.join(map(str, sorted(known[key])))}",
                    )
                )
    return found
