"""What rules for `*` say of the whole kernel: how far ahead a loader may run, how values cross between SMs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpk_spec.ops.linear import K_BLOCK, ROW_TILE
from mpk_spec.planner.cost import cost_model
from mpk_spec.planner.schedule import CHUNK_BYTES
from mpk_spec.planner.weights import layer_bytes
from mpk_spec.schema.models import WHOLE_KERNEL

if TYPE_CHECKING:
    from mpk_spec.planner.schedule import Scheduler

IN_FLIGHT_BYTES = 48 * 1024  # where a layer fits the ring, and is there long before its values are
IN_FLIGHT_LOOKING_BYTES = 32 * 1024  # elsewhere; 16 cost Qwen3-8B 1 % on an H200, 48 are the same
PREFETCH_BYTES = 128 * 1024  # of each SM into L2 while its ring is full
LEAST_CHUNK = ROW_TILE * 2 * K_BLOCK * 2  # bytes: two blocks of columns of eight rows of bf16


@dataclass(frozen=True)
class WholeKernel:
    """Bytes of each SM. weight_chunk: one copy of weights, at most; in_flight: copied to its ring at once;
    in_flight_looking: the same while its workers look for values; prefetch: brought into L2 while the ring is full.

    order: "balanced" or "in_turn", see `planner.assign`. crossing: "event", "data" or "auto", see `planner.crossing`.
    """

    weight_chunk: int
    order: str
    in_flight: int
    in_flight_looking: int
    prefetch: int
    crossing: str


def resolve_whole_kernel(schedulers: Iterable[Scheduler], chunk: int, slots: int) -> WholeKernel:
    """What holds for a plan with a ring of `slots` chunks, in all its steps.

    What cannot be goes to the schedulers' problems.
    """
    found = [(scheduler, _of(scheduler, chunk, slots)) for scheduler in schedulers]
    (first, settings), *others = found
    for other, wanted in others:
        for key in WHOLE_KERNEL:
            ours, theirs = getattr(settings, key), getattr(wanted, key)
            pin = (other.pins("*") | first.pins("*")).get(key)
            if ours != theirs and pin:  # else it follows from another that differs
                _, at = pin
                said = f"'{key}' is {ours} in the {first.step} step and {theirs} in the {other.step} step"
                hint = "one kernel serves all steps: leave 'step' out of this rule's 'when'"
                first.problems.append(first.spec.problem(at, said, hint))
    return settings


def _of(scheduler: Scheduler, chunk: int, slots: int) -> WholeKernel:
    target, ring = scheduler.target, slots * chunk
    share = max(chunk, target.l2_bytes // target.num_sms)
    wide = layer_bytes(scheduler.model.weights) / target.num_sms > ring
    usual = cost_model(target).in_flight(chunk) if wide else IN_FLIGHT_BYTES
    in_flight = _whole_chunks(scheduler, "in_flight", usual, chunk, (chunk, ring), f"the ring's {ring}")
    looking = min(in_flight, IN_FLIGHT_LOOKING_BYTES) if wide else in_flight
    _check_chunk(scheduler)
    return WholeKernel(
        weight_chunk(scheduler),
        scheduler.pins("*").get("order", ("balanced", ()))[0],
        in_flight,
        _whole_chunks(
            scheduler, "in_flight_looking", looking, chunk, (chunk, in_flight), f"the {in_flight} of 'in_flight'"
        ),
        _whole_chunks(
            scheduler, "prefetch", _usual_prefetch(scheduler, ring), chunk, (chunk, share),
            f"{share} bytes of L2 for each SM of {target.title}", none=True,
        ),
        scheduler.pins("*").get("crossing", ("auto", ()))[0],
    )  # fmt: skip


def weight_chunk(scheduler: Scheduler) -> int:
    """Bytes of one copy of weights, at most: what a rule says, or what is nearest to it and works."""
    wanted = scheduler.pins("*").get("weight_chunk", (CHUNK_BYTES, ()))[0]
    return min(max(wanted, LEAST_CHUNK), CHUNK_BYTES)


def _check_chunk(scheduler: Scheduler) -> None:
    wanted, at = scheduler.pins("*").get("weight_chunk", (CHUNK_BYTES, ()))
    if wanted != (near := weight_chunk(scheduler)):
        limits = f"at least {LEAST_CHUNK} bytes and at most the {CHUNK_BYTES} that activations have room for"
        said = f"'weight_chunk' is {limits}, got {wanted}"
        scheduler.problems.append(scheduler.spec.problem(at, said, f"nearest that works: {near}"))


def _usual_prefetch(scheduler: Scheduler, ring: int) -> int:
    """None where a layer's cache, half full, is more than the rings hold: SMs that are done with theirs would take from
    the others' rate (Qwen3-8B at 32768: 0.9 %)."""
    cached = sum(s.kv_heads * 2 * s.row_bytes * s.batch * s.context / 2 for s in scheduler.model.states.values())
    return PREFETCH_BYTES if cached / scheduler.target.num_sms <= ring else 0


def _whole_chunks(
    scheduler: Scheduler, key: str, usual: int, chunk: int, limits: tuple[int, int], room: str, none: bool = False
) -> int:
    """`key` as pinned, else `usual` or the nearest that can be. none: 0 is a value too."""
    least, most = limits
    pin = scheduler.pins("*").get(key)
    wanted = pin[0] if pin else usual
    near = min(max(wanted, least), most) // chunk * chunk
    if pin and not least <= wanted <= most and not (none and wanted == 0):
        or_none = "0 (none) or " if none else ""
        said = f"'{key}' is {or_none}at least one chunk of {chunk} bytes and at most {room}, got {wanted}"
        scheduler.problems.append(scheduler.spec.problem(pin[1], said, f"nearest that works: {near}"))
    return 0 if none and wanted == 0 else near
