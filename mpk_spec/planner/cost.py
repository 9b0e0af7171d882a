"""What a plan's pieces cost: named constants per target, and the bytes and microseconds of one task.

Every constant says where it comes from: *measured* (the project's H100 and H200 figures), *data sheet*, or *assumed*. A
machine that was measured overrides them with a file (`calibration_file`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from math import ceil
from pathlib import Path
from typing import Any

from mpk_spec.errors import UserError, did_you_mean
from mpk_spec.planner.plan import Group, Plan, Step, Task
from mpk_spec.planner.targets import Target, find_target

KIB = 1024


@dataclass(frozen=True)
class CostModel:
    """Constants of one target. Times in microseconds, rates in GB/s (10^9 bytes per second), sizes in bytes."""

    target: str
    stream_gbps: float
    """Streaming-read ceiling of all SMs together; measured on H100 (3150) and H200 (4600), else from `targets`."""
    num_sms: int
    hop_us: float
    """One event, from the producer's signal to the consumer's seeing it; measured: 0.66 (H100), 0.62 (H200)."""
    data_hop_us: float
    """Values that cross as data, from their being stored to a reader's having seen and prepared all; see `targets`."""
    peer_hop_us: float
    """One flag to a peer GPU through its pointer; measured: 1.23 (two H200s)."""
    peer_gbps: float = 363.0
    """Writes to a peer, both directions at once; measured on two H200s."""
    reduce_us: float = 0.4
    """Sum a task's partial results over warps and store them; the part of the measured 1.4 that is no signal."""
    signal_us: float = 1.0
    """Barrier of the block and `red.release`; measured: "each boundary costs about 1 us to signal"."""
    signaller: bool = True
    """Whether a warp of its own signals while the workers go on, as the kernel has it."""
    activation_us: float = 1.0
    """Load a task's activations after its event, or where all values that cross as data are there; measured."""
    activation_free_bytes: int = 24 * KIB
    """Activations that the time above covers: batch 1 of the widest row (12288 bf16) in that measurement."""
    activation_gbps: float = 40.0
    """Rate of one SM for activations beyond those, from L2 while it computes; assumed (5.3 TB/s over 132 SMs)."""
    start_us: float = 0.1
    """Fetch a task's description and turn to it; assumed."""
    refill_us: float = 0.8
    """From a freed ring stage to its next bytes' arrival: one trip to memory; assumed."""
    chunk_us: float = 0.08
    """Per bulk copy: wait for its barrier and release its stage; assumed."""
    consume_gbps: float = 80.0
    """Rate at which one SM reads its ring into tensor cores; assumed. Dot products without
    tensor cores are about 36 at K = 4096 and 27 at K = 2048 (fitted to measurements without event waits)."""
    efficiency: float = 0.6
    """Part of the data sheet's tensor throughput that a task reaches; assumed; matters for prefill only."""
    tflops: float = 989.0
    """bf16 tensor throughput of all SMs; data sheet."""
    kv_block_us: float = 0.3
    """Scores, softmax and sum over one block of one KV head, for all its query heads; assumed."""
    kv_trip_us: float = 1.0
    """One dependent trip to memory, for each KV block that no loader streamed ahead; assumed: a naive attention took
    8-9 us a layer, with five of them."""
    kv_ahead: bool = True
    """Whether the loader streams the KV of earlier positions ahead of the step's events, as the design has it."""
    row_op_us: float = 0.5
    """Arithmetic of a task that streams nothing (a norm, a reduction, an argmax slice); assumed."""
    spread: float = 0.025
    """Difference in speed between the two groups of SMs; measured on one H100."""
    chance: float = 0.05
    """How far a task's stream may run ahead or lag by chance (DRAM refresh, neighbours), as a part of its time, drawn
    from a fixed hash; fitted to the measured 8B steps with rings of 98 and 172 KB, with and without attention."""
    catch_up: float = 1.25
    """How much more than its even part of the bandwidth an SM can draw while others wait; assumed."""

    @property
    def peer_data_hop_us(self) -> float:
        """`data_hop_us` of values that peers send too; assumed: longer by as much as a flag of theirs is."""
        return self.data_hop_us + max(0.0, self.peer_hop_us - self.hop_us)

    @property
    def sm_gbps(self) -> float:
        """One SM's even part of the stream."""
        return self.stream_gbps / self.num_sms


def cost_model(target: str | Target, overrides: dict[str, Any] | None = None) -> CostModel:
    """The constants of a target, with `overrides` (as of `read_calibration`) on top.

    Raises UserError for an unknown target or an unknown constant.
    """
    machine = find_target(target) if isinstance(target, str) else target
    model = CostModel(
        target=machine.name,
        stream_gbps=machine.stream_gbps,
        num_sms=machine.num_sms,
        hop_us=machine.hop_us,
        data_hop_us=machine.data_hop_us,
        peer_hop_us=machine.peer_hop_us,
        tflops=machine.tflops_bf16,
    )
    if machine.name == "cpu":
        model = replace(model, **CPU)
    known = {f.name for f in fields(CostModel)} - {"target"}
    for key in overrides or {}:
        if key not in known:
            raise UserError(f"unknown constant '{key}' in the calibration of {machine.name}", did_you_mean(key, known))
    return replace(model, **(overrides or {}))


CPU = {
    "reduce_us": 10.0, "signal_us": 0.0, "activation_us": 10.0, "activation_gbps": 10.0, "start_us": 5.0,
    "refill_us": 0.1, "chunk_us": 0.0, "consume_gbps": 40.0, "kv_block_us": 10.0, "kv_trip_us": 0.0,
    "row_op_us": 20.0, "spread": 0.0, "chance": 0.0,
}  # fmt: skip
"""The reference runs tasks as torch calls: tens of microseconds each, no events; all assumed."""


def calibration_file(target: str) -> Path:
    """Where measured constants of this machine's GPU are kept: a JSON object of `CostModel` fields."""
    from mpk_spec.paths import cache_dir

    return cache_dir() / "calibration" / f"{target}.json"


def read_calibration(target: str) -> dict[str, Any] | None:
    """The measured constants, None where there are none. Raises UserError for a file that is not one."""
    path = calibration_file(target)
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as trouble:
        raise UserError(f"{path} cannot be read as a calibration: {trouble}", "delete it or measure again") from None
    numbers = isinstance(found, dict) and all(isinstance(v, int | float) for v in found.values())
    if not numbers:
        raise UserError(f"{path} is no calibration: want an object of numbers", "delete it or measure again")
    return found


@dataclass(frozen=True)
class TaskCost:
    """What one task needs, beside its place in the schedule. Microseconds on one SM, bytes from memory."""

    weight_bytes: float
    kv_bytes: float
    stream_bytes: float  # those of them that flow through the ring
    fetch_us: float  # memory trips after the event, for what no loader streams
    activation_us: float
    compute_us: float
    finish_us: float  # reduce, store
    signal_us: float


def task_cost(plan: Plan, step: Step, group: Group, task: Task, cost: CostModel, context: int) -> TaskCost:
    """The `TaskCost` of a task with `context` positions in the cache."""
    attention = next((node for node in group.nodes if node.op == "attention"), None)
    blocks, kv_bytes = kv_of(plan, step, task, attention.values.get("window"), context) if attention else (0, 0.0)
    weights, chunks = task.load_bytes * _share(plan, step, group, task), task.load_chunks
    ahead = kv_bytes if cost.kv_ahead else 0.0
    compute = chunks * cost.chunk_us + (weights + ahead) / (cost.consume_gbps * 1e3)
    compute += _extra_activations(plan, step, group, task, cost, context)
    compute += task.flops / (cost.tflops * cost.efficiency / cost.num_sms * 1e6) + blocks * cost.kv_block_us
    if not chunks and not blocks:
        compute += cost.row_op_us
    fetch = 0.0 if cost.kv_ahead else blocks * cost.kv_trip_us + kv_bytes / (cost.sm_gbps * 1e3)
    return TaskCost(
        weights,
        kv_bytes,
        weights + ahead,
        fetch,
        cost.activation_us,
        compute,
        _finish(plan, step, task, cost),
        cost.signal_us if task.signals else 0.0,
    )


def kv_of(plan: Plan, step: Step, task: Task, window: int | None, context: int) -> tuple[int, float]:
    """(blocks, bytes) of the cache that a task reads, all sequences of the step together; `window`: positions seen."""
    blocks = bytes_ = 0
    sequences = plan.batch if step.kind != "prefill" else 1
    for span in task.reads:
        state = plan.states.get(span.tensor)
        if state is None:
            continue
        splits = max(1, state.extent // state.kv_heads)
        seen = ceil(min(context, window or context) / state.kv_block)
        mine = sum(len(range(unit % splits, seen, splits)) for unit in range(span.lo, span.hi)) * sequences
        blocks += mine
        bytes_ += mine * state.kv_block * state.head_dim * 2 * DTYPE_BYTES[state.dtype]
    return blocks, float(bytes_)


DTYPE_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "i32": 4, "fp8_e4m3": 1}


def experts_of(plan: Plan, group: Group) -> int:
    """How many experts the group's weights are stacked over, 0 where they are not."""
    names = [name for node in group.nodes for name in node.weights.values()]
    return next((plan.weights[n].full_shape[0] for n in names if n in plan.weights and plan.weights[n].stack), 0)


def _share(plan: Plan, step: Step, group: Group, task: Task) -> float:
    """The part of an expert task's bytes that a step reads: tokens choose experts, some the same, all as likely.

    A task with a slot `k` works for one chosen expert in a row; one without does all of them.
    """
    experts = experts_of(plan, group)
    if not experts:
        return 1.0
    routed = _routed(plan, group)
    distinct = experts * (1 - (1 - routed / experts) ** step.tokens)
    slots = max(1, group.grid[1] // group.split_k)
    if slots == 1 or task.k is None:
        return distinct / min(experts, routed * step.tokens)
    return distinct / slots if distinct > slots else min(1.0, max(0.0, distinct - task.k[0]))


def _routed(plan: Plan, group: Group) -> int:
    """Experts per token: the `k` of the routing that the group reads."""
    routes = {i for node in group.nodes for i in node.inputs}
    for step in plan.steps.values():
        for template in step.templates:
            for other in template.groups:
                for node in other.nodes:
                    if node.op == "top_k" and node.output in routes:
                        return int(node.values["k"])
    return 1


def _extra_activations(plan: Plan, step: Step, group: Group, task: Task, cost: CostModel, context: int) -> float:
    """Time for the activations beyond the first: K tile by K tile, so it hides behind the stream if that is slower."""
    loaded = sum(
        (span.hi - span.lo)
        * DTYPE_BYTES[plan.tensors[span.tensor].dtype]
        * _copies(plan, span.tensor)
        * _live(plan, group, span.tensor, context)
        for span in task.reads
        if span.tensor in plan.tensors
    )
    extra = max(0, loaded * step.tokens - cost.activation_free_bytes)
    return extra / (cost.activation_gbps * 1e3)


def _live(plan: Plan, group: Group, tensor: str, context: int) -> float:
    """The part of a tensor that is read: of an attention's splits those that saw a position."""
    merge = next((n for n in group.nodes if n.op == "attention_merge" and tensor in n.inputs), None)
    if merge is None:
        return 1.0
    splits, block = merge.values["kv_splits"], next(iter(plan.states.values())).kv_block
    return min(splits, context // block + 1) / splits


def _copies(plan: Plan, tensor: str) -> int:
    """How many values a reader loads for each feature: every rank's addend of a sum in one shot."""
    found = plan.tensors[tensor]
    return plan.tp if found.inbox and found.shares == "all" else 1


def _finish(plan: Plan, step: Step, task: Task, cost: CostModel) -> float:
    """Reduce and store, to the peers too where the tensor is an inbox."""
    sent = 0
    for span in task.writes:
        tensor = plan.tensors.get(span.tensor)
        if tensor is not None and tensor.inbox:
            size = (span.hi - span.lo) * DTYPE_BYTES[tensor.dtype] * step.tokens
            sent += size * (plan.tp - 1) / (1 if tensor.shares == "all" else plan.tp)
    return cost.reduce_us + sent / (cost.peer_gbps / cost.num_sms * 1e3)


def sum_us(cost: CostModel, ranks: int, features: int, tokens: int, two_shots: bool) -> float:
    """From float32 addends on every rank to their sum, with a residual, in the registers of those that read it."""
    size = features * tokens * 4
    sent = (ranks - 1) / (cost.peer_gbps * 1e3)
    if not two_shots:
        loaded = max(0, size * (ranks + 1) - cost.activation_free_bytes)
        return size * sent + cost.peer_hop_us + loaded / (cost.activation_gbps * 1e3)
    between = cost.start_us + cost.activation_us + cost.row_op_us + cost.reduce_us + cost.signal_us
    loaded = max(0, size - cost.activation_free_bytes)
    return 2 * (size * sent / ranks + cost.peer_hop_us) + between + loaded / (cost.activation_gbps * 1e3)
