"""What rules for `*` say of the whole kernel: how far ahead a loader may run, how values cross between SMs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpk_spec.planner.cost import cost_model, layer_bytes
from mpk_spec.schema.models import WHOLE_KERNEL

if TYPE_CHECKING:
    from mpk_spec.planner.fuse import Fused
    from mpk_spec.planner.schedule import Scheduler

IN_FLIGHT_BYTES = (48 * 1024, 64 * 1024)  # what is chosen from: the best of what was measured
IN_FLIGHT_LOOKING_BYTES = 32 * 1024  # 16 or 48 cost Qwen3-8B 1 % on an H200
PREFETCH_BYTES = 128 * 1024  # of each SM into L2 while its ring is full


@dataclass(frozen=True)
class WholeKernel:
    """Bytes of each SM. in_flight: copied to its ring at once; in_flight_looking: the same while its workers look for
    values; prefetch: brought into L2 while the ring is full.

    crossing: "event", "data" or "auto", see `planner.crossing`.
    """

    in_flight: int
    in_flight_looking: int
    prefetch: int
    crossing: str


def resolve_whole_kernel(
    schedulers: Iterable[Scheduler], layers: Iterable[Sequence[Fused]], chunk: int, slots: int
) -> WholeKernel:
    """What holds for a plan with a ring of `slots` chunks, in all its steps. layers: of each step a layer's groups.

    What cannot be goes to the schedulers' problems.
    """
    found = [(s, _of(s, hops(layer), chunk, slots)) for s, layer in zip(schedulers, layers, strict=True)]
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


def hops(layer: Sequence[Fused]) -> int:
    """How often values cross between SMs in a layer, one after the other: its groups, those side by side once."""
    depth: dict[str, int] = {}
    for group in layer:
        depth |= dict.fromkeys(group.inner, 1 + max((depth.get(value, 0) for value in group.inputs), default=0))
    return max(depth.values(), default=0)


def _of(scheduler: Scheduler, hops: int, chunk: int, slots: int) -> WholeKernel:
    target, ring = scheduler.target, slots * chunk
    share = max(chunk, target.l2_bytes // target.num_sms)
    layer = layer_bytes(scheduler.model.weights) / target.num_sms
    cost = cost_model(target)
    usual = min(IN_FLIGHT_BYTES, key=lambda in_flight: cost.layer_us(layer, hops, in_flight))
    in_flight = _whole_chunks(scheduler, "in_flight", usual, chunk, (chunk, ring), f"the ring's {ring}")
    # A layer that fits the ring is there long before its values are.
    looking = min(in_flight, IN_FLIGHT_LOOKING_BYTES) if layer > ring else in_flight
    return WholeKernel(
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


def _usual_prefetch(scheduler: Scheduler, ring: int) -> int:
    """None with several ranks, where it costs 1 % (Qwen3-8B, two H200s), and none where a layer's cache, half full,
    is more than the rings hold: SMs that are done with theirs would take from the others' rate (Qwen3-8B at 32768:
    0.9 %)."""
    model = scheduler.model
    cached = sum(s.kv_heads * 2 * s.row_bytes * s.batch * s.context / 2 for s in model.states.values())
    return PREFETCH_BYTES if model.tp == 1 and cached / scheduler.target.num_sms <= ring else 0


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
