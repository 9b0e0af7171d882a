"""Schedule rules and `auto` -> the settings of every group: grid, block, splits, stages, launch.

What `auto` picks comes from a small cost estimate (see `_linear`, `_attention`); what a rule pins is checked here and
refused at its line, with the nearest value that works.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any

from mpk_spec.errors import Problem
from mpk_spec.ops.linear import ROW_TILE
from mpk_spec.planner.fuse import Fused
from mpk_spec.planner.model import BoundOp, Model
from mpk_spec.planner.targets import TARGETS, Target
from mpk_spec.schema import Spec

BLOCK = (384, 1, 1)  # one warpgroup that loads and schedules, two that compute
CHUNK_BYTES = 16 * 1024  # one bulk copy; smaller ones do not reach the ceiling
SPLIT_HOP_US = 2.5  # what an extra reduction costs: reduce, store, signal, see, load
MERGE_US_PER_SPLIT = 0.05
ROW_FEATURES = 64  # features of a row operator that are worth a task


@dataclass(frozen=True)
class Settings:
    """The resolved schedule of one group."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int] = BLOCK
    split_k: int = 1
    kv_splits: int = 1
    stages: int = 1
    partition: str = "even"
    launch: str = "static"

    def as_rule(self, kind: str) -> dict[str, Any]:
        """In the spec's own words, for `plan --pin`."""
        rule: dict[str, Any] = {
            "grid": list(self.grid),
            "block": list(self.block),
            "stages": self.stages,
            "launch": self.launch,
        }
        rule |= {"partition": self.partition} if kind != "attention" else {"kv_splits": self.kv_splits}
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
    ring_stages: int
    problems: list[Problem]

    def __post_init__(self):
        self.asked: dict[str, dict[str, tuple[Any, tuple]]] = {}
        for number, rule in enumerate(self.spec.schedule):
            if self._applies(rule.when):
                for group, settings in rule.set.items():
                    for key, value in settings.model_dump(exclude_unset=True, exclude_none=True).items():
                        self.asked.setdefault(group, {})[key] = (value, ("schedule", number, "set", group, key))

    def _applies(self, when: dict[str, Any]) -> bool:
        here = {"target": self.target.name, "size": self.size, "tp": self.model.tp, "batch": self.batch,
                "context": self.context, "step": self.step}  # fmt: skip
        return all(here[k] in (v if isinstance(v, list) else [v]) for k, v in when.items())

    def pins(self, group: str) -> dict[str, tuple[Any, tuple]]:
        """What rules say of a group: `*` first, its own name after; `auto` is no pin."""
        found = {**self.asked.get("*", {}), **self.asked.get(group, {})}
        return {k: v for k, v in found.items() if v[0] not in ("auto", None)}

    def resolve(self, group: Fused) -> Settings:
        pins = self.pins(group.name)
        kind = group.kind
        block = tuple(self._pin(pins, "block", list(BLOCK)))
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
        launch = self._pin(pins, "launch", "static")
        common = {"block": block, "stages": stages, "launch": launch}
        if kind == "attention":
            return self._attention(group, pins, common)
        self._no_pin(pins, "kv_splits", group, "an attention")
        return self._linear(group, pins, common) if kind == "linear" else self._rows(group, pins, common)

    # one method per kind of body

    def _linear(self, group: Fused, pins, common) -> Settings:
        tiles, k = linear_tiles(group, self.model), self.model.types[group.body[0].inputs[0]].features
        k_tiles = -(-k // 512)
        split = self._pin(pins, "split_k", None)
        if split is None:
            split = self._cheapest_split(group, tiles, k, k_tiles)
        elif k_tiles % split:
            works = [d for d in range(1, k_tiles + 1) if k_tiles % d == 0]
            self._refuse(
                pins,
                "split_k",
                f"{k_tiles} K tiles of 512 do not divide into {split} splits",
                f"{min(works, key=lambda d: abs(d - split))}",
            )
            split = 1
        elif split > 1 and len(group.body) > 1:
            self._refuse(
                pins, "split_k", f"'{group.name}' has {len(group.body)} linears", "1: only a single linear is split"
            )
            split = 1
        slots = self._slots(group, common["launch"])
        most = max(1, min(tiles, self.target.num_sms // split if split > 1 else self.target.num_sms))
        if slots > 1:
            most = max(1, min(tiles, -(-self.target.num_sms // slots)))
        x = self._grid(pins, most, tiles, "row tiles")
        partition = self._partition(pins, tiles, x, "row tiles")
        return Settings((x, split * slots, 1), split_k=split, partition=partition, **common)

    def _slots(self, group: Fused, launch: str) -> int:
        """Claimed experts: tasks per row chunk. A combine in the group needs them all in one task."""
        routed = self.model.types[group.body[0].output].routed
        if not routed or launch != "dynamic" or any(o.op.op == "combine" for o in group.ops):
            return 1
        experts = self.model.weights[group.body[0].weights["weight"]].shape[0]
        return min(experts, routed * self.batch)

    def _cheapest_split(self, group: Fused, tiles: int, k: int, k_tiles: int) -> int:
        if len(group.body) > 1 or self.model.types[group.body[0].output].routed or self.target.name == "cpu":
            return 1
        us_per_tile = ROW_TILE * k * 2 / (self.target.stream_gbps / self.target.num_sms * 1e3)
        costs = {}
        for split in (d for d in range(1, k_tiles + 1) if k_tiles % d == 0):
            busiest = -(-tiles * split // self.target.num_sms)
            costs[split] = busiest * us_per_tile / split + (SPLIT_HOP_US if split > 1 else 0)
        return min(costs, key=lambda s: (costs[s], s))

    def _attention(self, group: Fused, pins, common) -> Settings:
        self._no_pin(pins, "split_k", group, "a linear")
        cache = self.model.types[group.body[0].inputs[1]]
        kv_heads, head_dim = cache.shape
        state = next(iter(self.model.states.values()))
        blocks = -(-state.context // state.kv_block)
        most = max(1, min(blocks, self.target.num_sms // kv_heads))
        splits = self._pin(pins, "kv_splits", None)
        if splits is None:
            bytes_per_head = state.context * head_dim * 4
            rate = self.target.stream_gbps / self.target.num_sms * 1e3
            splits = (
                1
                if self.target.name == "cpu"
                else min(range(1, most + 1), key=lambda s: bytes_per_head / rate / s + s * MERGE_US_PER_SPLIT)
            )
        elif not 1 <= splits <= blocks:
            self._refuse(
                pins,
                "kv_splits",
                f"a context of {state.context} has {blocks} blocks of {state.kv_block}, got {splits} splits",
                str(min(max(splits, 1), blocks)),
            )
            splits = 1
        grid = self._pin(pins, "grid", [kv_heads, splits, 1])
        if list(grid) != [kv_heads, splits, 1]:
            self._refuse(
                pins,
                "grid",
                f"the grid of an attention is [kv_heads, kv_splits, 1] = [{kv_heads}, {splits}, 1], got {list(grid)}",
                f"set 'kv_splits' instead, or [{kv_heads}, {splits}, 1]",
            )
        return Settings((kv_heads, splits, 1), kv_splits=splits, **common)

    def _rows(self, group: Fused, pins, common) -> Settings:
        self._no_pin(pins, "split_k", group, "a linear")
        units = row_units(group, self.model)
        last = group.ops[-1]
        features = self.model.types[last.output].features
        want = max(1, min(self.target.num_sms, units, -(-features // ROW_FEATURES)))
        if last.op.op == "argmax_partial":
            want = units
        x = self._grid(pins, want, units, "parts")
        return Settings((x, 1, 1), partition=self._partition(pins, units, x, "parts"), **common)

    # pins

    def _pin(self, pins, key: str, otherwise):
        return pins[key][0] if key in pins else otherwise

    def _refuse(self, pins, key: str, message: str, nearest: str) -> None:
        if key in pins:
            self.problems.append(self.spec.problem(pins[key][1], message, f"nearest that works: {nearest}"))

    def _no_pin(self, pins, key: str, group: Fused, owner: str) -> None:
        if key in pins and pins[key][1][3] != "*" and pins[key][0] != 1:
            self._refuse(pins, key, f"'{group.name}' has no {key}: it is not {owner}", "leave it out")

    def _grid(self, pins, otherwise: int, units: int, what: str) -> int:
        grid = self._pin(pins, "grid", None)
        if grid is None:
            return otherwise
        if not 1 <= grid[0] <= units:
            self._refuse(
                pins,
                "grid",
                f"{units} {what} cannot make a grid of {grid[0]}",
                f"[{min(max(grid[0], 1), units)}, 1, 1]",
            )
            return otherwise
        return grid[0]

    def _partition(self, pins, units: int, x: int, what: str) -> str:
        asked = self._pin(pins, "partition", None)
        even = units % x == 0
        if asked is None and "grid" in pins and not even:
            works = sorted((d for d in range(1, units + 1) if units % d == 0), key=lambda d: abs(d - x))[:2]
            self._refuse(
                pins,
                "grid",
                f"{units} {what} do not divide evenly into a grid of {x}",
                f"{' or '.join(str(d) for d in sorted(works))}, or 'partition: balanced'",
            )
        if asked == "even" and not even:
            self._refuse(pins, "partition", f"{units} {what} do not divide evenly into a grid of {x}", "balanced")
        return asked or ("even" if even else "balanced")


def linear_granule(group: Fused) -> int:
    """Features of the group's output axis that one row tile makes."""
    gated = any(o.op.op == "gated_act" for o in group.epilogue)
    if gated and group.pack_layout == "interleave":
        return ROW_TILE // len(group.body)
    return ROW_TILE


def linear_rows(group: Fused, model: Model) -> int:
    """The length of the axis that tasks of a linear group divide: concatenated rows, or features where they are gated."""
    sizes = [linear_features(o, model) for o in group.body]
    return sizes[0] if group.epilogue else sum(sizes)


def linear_features(op: BoundOp, model: Model) -> int:
    """Output features of a linear, whatever its K splits and experts make of their storage."""
    return model.weights[op.weights["weight"]].shape[-2]


def linear_tiles(group: Fused, model: Model) -> int:
    return -(-linear_rows(group, model) // linear_granule(group))


def row_units(group: Fused, model: Model) -> int:
    """Parts that the last output of a row group can be cut into."""
    out = model.types[group.ops[-1].output]
    step = group.ops[-1].op.granule(out)
    if step == out.features and group.ops[-1].op.op == "rmsnorm":
        step = gcd(out.features, ROW_TILE)
    return max(1, -(-out.features // step))


def unmatched_rules(spec: Spec, sizes: set[str]) -> list[Problem]:
    """Rules whose `when` no known target, size or degree can meet."""
    known = {"target": set(TARGETS), "size": sizes, "step": {"decode", "prefill", "mixed", "verify"}}
    found = []
    for number, rule in enumerate(spec.schedule):
        for key, value in rule.when.items():
            values = value if isinstance(value, list) else [value]
            if key in known and not set(values) & known[key]:
                found.append(
                    spec.problem(
                        ("schedule", number, "when", key),
                        f"this rule matches nothing: no {key} '{values[0]}'",
                        f"known: {', '.join(sorted(known[key]))}",
                    )
                )
    return found
