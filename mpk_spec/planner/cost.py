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
from mpk_spec.planner.plan import DTYPE_BYTES, Group, Plan, Step, Task
from mpk_spec.planner.targets import Target, find_target
from mpk_spec.planner.task_shape import Looks, looks, looks_of, loop_of
from mpk_spec.planner.weights import layer_bytes

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
    peer_hop_us: float
    """One flag to a peer GPU through its pointer; measured: 1.23 (two H200s)."""
    data_hop_us: float = 0.51
    """Values that cross as data, from the last one's being stored to its being seen by the last of its readers, ready
    for its tensor cores; or from a reader's SM being free, if that is later. Of values that are taken as they are;
    fitted, as all that is called so: to milliseconds a token of five models and contexts on an H200, see
    benchmarks/decode.md (`mpk-spec tune --calibrate` fits them to one model's recording)."""
    norm_hop_us: float = 0.785
    """The same of rows that are normalised: sums over warps and a barrier more."""
    merge_hop_us: float = 0.84
    """The same of an attention's splits, which are merged."""
    attend_hop_us: float = 1.6
    """The same of an attention's own queries and keys, which are turned; from recordings of Qwen3-8B, less what reading
    the clocks adds."""
    busy_look_bytes: float = 10900.0
    """Weights on their way to an SM that values wait behind, where a layer does not fit the ring; fitted. They take as
    long as memory needs for them: longer on an H100 than on an H200."""
    look_gbps: float = 40.0
    """Beside those, for all bytes that one SM looks at; assumed (5.3 TB/s of L2 over 132 SMs), and what was measured
    between narrow and wide rows."""
    peer_gbps: float = 363.0
    """Writes to a peer, both directions at once; measured on two H200s."""
    reduce_us: float = 0.26
    """Sum a task's partial results over warps and store them; fitted."""
    signal_us: float = 1.0
    """Barrier of the block and `red.release`; measured: "each boundary costs about 1 us to signal"."""
    signaller: bool = True
    """Whether a warp of its own signals while the workers go on, as the kernel has it."""
    activation_us: float = 1.0
    """Load a task's activations after its event; measured."""
    activation_free_bytes: int = 24 * KIB
    """Activations that the time above covers: batch 1 of the widest row (12288 bf16) in that measurement."""
    activation_gbps: float = 40.0
    """Rate of one SM for activations beyond those, from L2 while it computes; assumed (5.3 TB/s over 132 SMs)."""
    start_us: float = 0.1
    """Fetch a task's description and turn to it; assumed."""
    refill_us: float = 1.19
    """From a freed ring stage to its next bytes' arrival, memory having been idle; fitted. The wait for weights of
    Qwen3-8B's o_add, whose ring is too small for it, said 1.6 with 48 KiB in flight (an H100 and an H200)."""
    pair_us: float = 0.278
    """Per pair of chunks that a linear's inner loop takes at once, or a single one, beside reading bytes; fitted."""
    kept_us: float = 0.186
    """The same of a group whose tasks keep their sums in registers; fitted."""
    turn_us: float = 0.1
    """For another chunk of K: its activations, and the sums so far of all its pairs; assumed."""
    block_us: float = 0.2
    """For another block of tiles of the same task: the results of the one before; fitted."""
    consume_gbps: float = 225.0
    """Rate at which one SM reads its ring into tensor cores: 128 bytes a cycle of 1755 MHz; data sheet. Dot products
    without tensor cores are about 36 at K = 4096 and 27 at K = 2048 (fitted to measurements without event waits)."""
    efficiency: float = 0.6
    """Part of the data sheet's tensor throughput that a task reaches; assumed; matters for prefill only."""
    tflops: float = 989.0
    """bf16 tensor throughput of all SMs; data sheet."""
    attend_us: float = 0.455
    """Of an attention's task, whatever it reads: the sums of its warps together; fitted."""
    kv_block_us: float = 0.455
    """One block of one KV head, for all its query heads, beside its coming through the ring; fitted."""
    kv_pair_us: float = 0.7
    """The same of two, which a task takes at once; measured on an H200."""
    row_op_us: float = 0.5
    """Arithmetic of a task that streams nothing (a norm, a reduction, an argmax slice); assumed."""
    sample_us: float = 6.5
    """The task that ends a step: from its values seen to the next id's and the next step's description being stored;
    from recordings of Qwen3-8B, less what reading the clocks adds."""
    memory_us: float = 1.01
    """From an SM's asking memory for weights to their coming while all ask: what it takes in that time must be on its
    way. With `stream_share` fitted to 32, 48 and 64 KiB in flight, 84, 97.4 and 100 % of an H200's rate."""
    in_flight_us: float = 2.3
    """What comes to an SM in this time is kept on its way while its weights are worked on: more than `memory_us`, so
    that the rate is kept while others wait. Measured: with 80 KiB instead of 64 on an H200 Qwen3-32B is 0.8 %
    faster, narrower models are no slower; 64 KiB on an H100."""
    spread: float = 0.025
    """Difference in speed between the two groups of SMs; measured on one H100. None was found on an H200."""
    chance_us: float = 0.22
    """How far a task that streams for a microsecond may run ahead or lag by chance (DRAM refresh, neighbours), drawn
    from a fixed hash; it grows with the square root of that time. Measured: a standard deviation of 0.13 us by that
    rule, whether a task takes 8, 20, 42 or 113 us (8B and 32B on an H200, from layer to layer)."""
    catch_up: float = 1.25
    """How much more than its even part of the bandwidth an SM can draw while others wait; assumed."""

    def hop_of(self, looks: Looks) -> float:
        """From values stored, or an SM free, to all of them seen and prepared, if they are few and nothing is in their
        way: see `beside_hop_us`. Of peers' values see `peer_us`."""
        hops = {"plain": self.data_hop_us, "norm": self.norm_hop_us, "merge": self.merge_hop_us}
        return hops.get(looks, self.attend_hop_us)

    @property
    def peer_us(self) -> float:
        """What values of peers take longer; assumed: as much as a flag of theirs does."""
        return max(0.0, self.peer_hop_us - self.hop_us)

    def stream_share(self, in_flight: int) -> float:
        """The part of memory's rate that is reached with so many bytes in flight in each SM."""
        needed = self.memory_us * self.sm_gbps * 1e3
        return (1 + (needed / in_flight) ** 5) ** -0.2

    def in_flight(self, chunk: int) -> int:
        """Bytes on their way to each SM while its weights are worked on, in whole chunks of so many bytes."""
        return ceil(self.in_flight_us * self.sm_gbps * 1e3 / chunk) * chunk

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
        peer_hop_us=machine.peer_hop_us,
        tflops=machine.tflops_bf16,
    )
    model = replace(model, **OF_TARGET.get(machine.name, {}))
    known = {f.name for f in fields(CostModel)} - {"target"}
    for key in overrides or {}:
        if key not in known:
            raise UserError(f"unknown constant '{key}' in the calibration of {machine.name}", did_you_mean(key, known))
    return replace(model, **(overrides or {}))


OF_TARGET: dict[str, dict[str, float]] = {
    "h200": {"spread": 0.0},
    # The reference runs tasks as torch calls: tens of microseconds each, no events; all assumed.
    "cpu": {
        "reduce_us": 10.0, "signal_us": 0.0, "activation_us": 10.0, "activation_gbps": 10.0, "start_us": 5.0,
        "data_hop_us": 0.0, "norm_hop_us": 0.0, "merge_hop_us": 0.0, "attend_hop_us": 0.0,
        "refill_us": 0.1, "pair_us": 0.0, "kept_us": 0.0, "turn_us": 0.0, "block_us": 0.0, "consume_gbps": 40.0,
        "attend_us": 0.0, "kv_block_us": 10.0, "kv_pair_us": 20.0, "row_op_us": 20.0, "sample_us": 20.0, "spread": 0.0,
        "chance_us": 0.0,
    },
}  # fmt: skip
"""What differs from the constants above. What was measured on this machine lies in `calibration_file`."""


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
    look_us: float  # of a task that looks at values: from the last one stored to all seen and prepared
    activation_us: float  # of others, after their events
    compute_us: float
    finish_us: float  # reduce, store
    signal_us: float

    @property
    def streamed(self) -> float:
        """What flows through the ring."""
        return self.weight_bytes + self.kv_bytes


def task_cost(plan: Plan, step: Step, group: Group, task: Task, cost: CostModel, context: int) -> TaskCost:
    """The `TaskCost` of a task with `context` positions in the cache."""
    attention = next((node for node in group.nodes if node.op == "attention"), None)
    blocks, kv_bytes = kv_of(plan, step, task, attention.values.get("window"), context) if attention else (0, 0.0)
    weights, loop = task.load_bytes * _share(plan, step, group, task), loop_of(plan, group, task)
    compute = loop.pairs * cost.pair_us + loop.turns * cost.turn_us + loop.blocks * cost.block_us
    compute += loop.kept * cost.kept_us
    compute += weights / (cost.consume_gbps * 1e3)
    compute += task.flops / (cost.tflops * cost.efficiency / cost.num_sms * 1e6)
    if blocks:  # a split of an attention without any does nothing
        compute += cost.attend_us + kv_blocks_us(blocks, cost)
    elif ends_step(group):
        compute += cost.sample_us
    elif not attention and not task.load_chunks:
        compute += cost.row_op_us
    looked = looks(step, task)
    if not looked:
        compute += _extra_activations(plan, step, group, task, cost, context)
    return TaskCost(
        weights,
        kv_bytes,
        look_us(plan, group, task, cost, context) if looked else 0.0,
        cost.activation_us,
        compute,
        _finish(plan, step, task, cost),
        cost.signal_us if task.signals else 0.0,
    )


def ends_step(group: Group) -> bool:
    """Whether its one task samples, and so ends a step."""
    return any(node.op in ("sample", "argmax_reduce") for node in group.nodes)


def look_us(plan: Plan, group: Group, task: Task, cost: CostModel, context: int) -> float:
    """From values stored to seen and prepared, of a task that looks at them."""
    return cost.hop_of(looks_of(group)) + beside_hop_us(plan, group, task, cost, context)


def beside_hop_us(plan: Plan, group: Group, task: Task, cost: CostModel, context: int) -> float:
    """What a look takes beside its hop: the bytes looked at, and weights on their way."""
    busy = layer_bytes(plan.weights) / plan.num_sms > plan.ring_stages * plan.copy_bytes
    behind = cost.busy_look_bytes / cost.sm_gbps if busy else 0.0
    return (loaded_bytes(plan, group, task, context) / cost.look_gbps + behind) / 1e3


def kv_blocks_us(blocks: int, cost: CostModel) -> float:
    """Of an attention's task, besides `attend_us`."""
    pairs, one = divmod(blocks, 2)
    return pairs * cost.kv_pair_us + one * cost.kv_block_us


def kv_of(plan: Plan, step: Step, task: Task, window: int | None, context: int) -> tuple[int, float]:
    """(blocks, bytes) of the cache that a task reads, all sequences of the step together; `window`: positions seen.

    The block that the new position belongs to counts, though nothing may be cached of it yet.
    """
    blocks = bytes_ = 0
    sequences = plan.batch if step.kind != "prefill" else 1
    for span in task.reads:
        state = plan.states.get(span.tensor)
        if state is None:
            continue
        splits = max(1, state.extent // state.kv_heads)
        cached = min(context, window or context)
        seen = ceil(min(context + 1, plan.context, window or plan.context) / state.kv_block)
        mine = [block for unit in range(span.lo, span.hi) for block in range(unit % splits, seen, splits)]
        positions = sum(max(0, min(state.kv_block, cached - block * state.kv_block)) for block in mine)
        blocks += len(mine) * sequences
        bytes_ += positions * sequences * 2 * state.row_bytes
    return blocks, float(bytes_)


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
    extra = max(0, loaded_bytes(plan, group, task, context) * step.tokens - cost.activation_free_bytes)
    return extra / (cost.activation_gbps * 1e3)


def loaded_bytes(plan: Plan, group: Group, task: Task, context: int) -> float:
    """Activations of one token that a task reads."""
    return sum(
        (span.hi - span.lo)
        * DTYPE_BYTES[plan.tensors[span.tensor].dtype]
        * _copies(plan, span.tensor)
        * _live(plan, group, span.tensor, context)
        for span in task.reads
        if span.tensor in plan.tensors
    )


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
