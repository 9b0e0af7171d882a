"""The plan: what the kernel executes, the reference executes, the profiler names and the verifier proves.

Three levels. *Kernel*: `Group`, one fused operator over whole tensors. *Block*: `Task`, one piece of a group that one
SM computes, with the spans it reads and writes. *Thread*: `Group.task`, the CUDA template, with its tile constants.

A step is a sequence of `Stage`s; each instantiates a `Template` (a layer's groups, events and queues) for one layer, so
that 80 equal layers are written down once and a layer that differs is its own template.

Spans are one-dimensional: `[lo, hi)` in the *extent* of a tensor. For an activation the extent is the features of one
token (`heads * head_dim` flattened; every task covers all tokens of the step). For the KV cache it is
`kv_heads * kv_splits`, where split `s` holds the positions whose block of `kv_block` is `s` modulo `kv_splits`.
For split results it is `splits * features`, for values routed through a claim pool `experts * features`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

PLAN_VERSION = 2
StepKind = Literal["decode", "prefill", "mixed", "verify"]
Placement = Literal["cuda", "nvshmem", "host"]
DTYPE_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "i32": 4, "fp8_e4m3": 1, "int4": 0.5}  # of tensors and of stored weights


@dataclass(frozen=True)
class Span:
    """`[lo, hi)` of a tensor's extent."""

    tensor: str
    lo: int
    hi: int


@dataclass(frozen=True)
class Wait:
    """Wait until `event` of the stage `stage` places back (0: this one, -1: the one before) has `count` signals.

    The stage before a step's first is the last of the step before it. `data`: what its signallers wrote and this task
    reads crosses as data: in a step of one token the task looks at the values, and this wait is for the same event of
    the write before, where there is one: of the layer before, or of the step before if it is written after the layers
    (see `planner.crossing.further_back`).
    """

    event: str
    count: int
    stage: int = 0
    data: bool = False


@dataclass(frozen=True)
class Task:
    """One piece of a group.

    `out` is the span of the group's output that it computes, `k` the part of the summed axis (K split, KV split).
    `load_bytes` of weights flow through the shared-memory ring in `load_chunks` pieces, in the order of the queue. What
    an attention reads of the cache, as many bytes as the position says, is not counted.
    """

    index: int
    out: tuple[int, int]
    reads: tuple[Span, ...]
    writes: tuple[Span, ...]
    k: tuple[int, int] | None = None
    waits: tuple[Wait, ...] = ()
    signals: tuple[str, ...] = ()
    load_bytes: int = 0
    load_chunks: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Node:
    """One operator in a group. `values` holds its evaluated expressions; layers that differ have other templates."""

    name: str
    op: str
    inputs: tuple[str, ...]
    output: str
    weights: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    width: int = 0
    """Features of its output (of one routed row, where it has one row per chosen expert)."""
    granule: int = 1
    """How many neighbouring features of its output are computed together (a head, a whole row)."""


@dataclass(frozen=True)
class Group:
    """A fused operator. `nodes` are in order of computation; the last one's output is what tasks partition."""

    name: str
    task: str
    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    tasks: tuple[Task, ...]
    split_k: int = 1
    kv_splits: int = 1
    stages: int = 1
    partition: Literal["even", "balanced"] = "even"
    launch: Literal["static", "dynamic"] = "static"
    smem_bytes: int = 0
    published: tuple[str, ...] = ()
    """Prologue values that later groups need too: task `t` writes its share of them."""


@dataclass(frozen=True)
class Template:
    """The groups of one stage. `queues[sm]` lists (group, task) in the order the SM's workers run them, `loads[sm]` the
    order in which its loader streams the weights of those that have some. (group, -1) means "claim tasks of this
    dynamic group until none is left".
    """

    name: str
    groups: tuple[Group, ...]
    events: dict[str, int]
    queues: tuple[tuple[tuple[int, int], ...], ...]
    loads: tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True)
class Stage:
    template: int
    layer: int | None = None


@dataclass(frozen=True)
class Step:
    """All of one token step of one kind."""

    kind: StepKind
    tokens: int
    templates: tuple[Template, ...]
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Tensor:
    """An activation. `shape` follows the tokens axis; `extent` is what spans count in.

    It lies at `offset` (bytes) of its placement's arena. `partial`: each rank holds an addend and
    `inbox` says that the buffer has one slot per rank.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    extent: int
    placement: Placement = "cuda"
    inbox: bool = False
    shares: Literal["all", "scattered", "gathered"] = "all"
    """What ranks write into each other's inbox. all: their whole addend, into their slot. scattered: of it the share of
    the features that the inbox's owner adds up. gathered: the sum of the share that they added up themselves; there are
    no slots then. Tasks' spans are all ranks' together: a rank's task works on the part of them in its own share."""
    routed: bool = False
    """One row per (token, chosen expert): `shape[0]` is the number of choices."""
    offset: int = 0
    bytes: int = 0
    """Of all its copies."""
    turns: int = 1
    """Copies that writes take turns with: one where events announce its values, two where they cross as data."""
    per: Literal["layer", "step"] = "layer"
    """What a write to it happens once in, where it has two copies."""

    @property
    def slots(self) -> bool:
        """Whether each rank has a slot of its own."""
        return self.inbox and self.shares != "gathered"


@dataclass(frozen=True)
class Weight:
    """A weight as one rank holds it. `source` may contain {i} (layer) and {e} (expert).

    `shape` is the rank's; `full_shape` the checkpoint's (with the stacked expert axis first where there is one).
    `split` is the axis a rank holds a part of (None: all of it), `parts` into how many, and each part is held by
    `ranks_per_part` ranks. `pad` rows beyond the checkpoint's are zero.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    full_shape: tuple[int, ...]
    dtype: str = "bf16"
    per_layer: bool = False
    stack: str | None = None
    split: int | None = None
    parts: int = 1
    ranks_per_part: int = 1
    pad: int = 0
    once: bool = False
    """An addend of a sum over ranks: rank 0 holds it, the others zeros."""
    kind: str = "linear"
    offset: float = 0.0
    storage: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Packing:
    """How a fusion's weights lie in memory: rows of its linears, alternating in `groups` groups, cut into tiles."""

    group: str
    weights: tuple[str, ...]
    layout: Literal["concat", "interleave"]
    groups: int
    tile_rows: int
    tile_k: int


@dataclass(frozen=True)
class State:
    """The KV cache: per layer and sequence, pages of `page` positions; one head's K and V of a page lie together."""

    name: str
    kv_heads: int
    head_dim: int
    layers: int
    context: int
    batch: int
    dtype: str = "bf16"
    page: int = 64
    kv_block: int = 64
    extent: int = 0

    @property
    def row_bytes(self) -> int:
        """Of one position's key, or value, of one KV head."""
        return self.head_dim * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Plan:
    """Everything that one rank's kernel needs; all ranks run the same plan."""

    name: str
    spec: str
    size: str
    target: str
    tp: int
    batch: int
    context: int
    num_sms: int
    config: dict[str, Any]
    architecture: str
    steps: dict[str, Step]
    tensors: dict[str, Tensor]
    weights: dict[str, Weight]
    packings: tuple[Packing, ...]
    states: dict[str, State]
    arena_bytes: dict[str, int]
    feeds: dict[str, str]
    """Step inputs and the tensor of the step before that they come from: {"token_ids": "next_ids"}."""
    notes: tuple[str, ...] = ()
    """Choices and their reasons, for `plan --explain`."""
    schedule: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The resolved schedule of every group, for `plan --pin`; and `fuse` of each fusion that a rule cuts."""
    ring_bytes: int = 0
    chunk_bytes: int = 0
    weight_chunk_bytes: int = 16 * 1024
    """Of one copy of weights, at most; `chunk_bytes` are the largest of all, a block's keys too."""
    order: Literal["balanced", "in_turn"] = "balanced"
    """Which SM gets which task, see `planner.assign`."""
    in_flight_bytes: int = 48 * 1024
    """Of copies that an SM's loader has on their way at once."""
    in_flight_looking_bytes: int = 48 * 1024
    """The same while the SM's workers look for values."""
    prefetch_bytes: int = 128 * 1024
    """That an SM's loader brings into L2 while its ring is full; 0: none."""
    crossing: Literal["event", "data"] = "event"
    """How the layers' values get from SM to SM in a step of one token, see `planner.crossing`."""
    prefixes: tuple[str, ...] = ("",)
    """Prefixes under which a checkpoint may publish its tensors."""
    ignore: tuple[str, ...] = ()
    """Patterns of checkpoint tensors that are left unread on purpose."""
    all_reduces: int = 0
    """Sums over ranks in one step."""
    version: int = PLAN_VERSION

    def to_json(self) -> str:
        """Deterministic JSON: the same plan gives the same bytes."""
        return _adapter().dump_json(self, indent=None).decode()

    @staticmethod
    def from_json(text: str) -> Plan:
        """Inverse of `to_json`. Raises pydantic.ValidationError; `load_plan` turns that into a UserError."""
        return _adapter().validate_json(text)

    @property
    def ring_stages(self) -> int:
        """Copies that the ring holds, each in a stage of `chunk_bytes`."""
        return self.ring_bytes // self.chunk_bytes if self.chunk_bytes > 0 else 0

    @property
    def copy_bytes(self) -> int:
        """Of one copy of weights, at most: less than a stage where a block's keys need more."""
        return min(self.chunk_bytes, self.weight_chunk_bytes)

    @property
    def key(self) -> str:
        """A hash of the whole plan, the name of its cache entries."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


@cache
def _adapter():
    from pydantic import TypeAdapter

    return TypeAdapter(Plan)
