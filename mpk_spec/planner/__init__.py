"""Spec + configuration + target -> Plan, proved. No GPU and no torch are needed to plan."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mpk_spec.errors import SpecError, UserError, did_you_mean
from mpk_spec.planner.plan import Plan  # now: a later import of the module would take the name `plan` from the function

if TYPE_CHECKING:
    from mpk_spec.schema import Spec
    from mpk_spec.weights import Checkpoint

DEGREES = tuple(range(1, 9))
MAX_BATCH = 16
STEP_KINDS = ("decode", "prefill", "mixed", "verify")
DEFAULT_CONTEXT = 4096


def plan(
    spec: Spec,
    *,
    size: str | None = None,
    config: dict[str, Any] | None = None,
    architecture: str | None = None,
    target: str = "h100",
    tp: int = 1,
    batch: int = 1,
    context: int | None = None,
    chunk: int | None = None,
    draft: int = 3,
    steps: tuple[str, ...] = ("decode", "prefill"),
    verified: bool = True,
) -> Plan:
    """Plans `spec` for one of its sizes, or for the `config` of a checkpoint.

    target: a name of `planner.targets`. tp: ranks, 1 to 8. batch: sequences, 1 to 16. context: positions of each
    sequence's KV cache (default: 4096 or what the model allows, if less). chunk: tokens of a prefill step.

    Raises SpecError (with positions) for what the spec gets wrong, UserError for a request that cannot be met,
    and PlanError if the proof fails, which would be a bug of the planner.
    """
    from mpk_spec.planner.build import Request, build
    from mpk_spec.planner.targets import find_target

    machine = find_target(target)
    if tp not in DEGREES:
        raise UserError(f"a tensor-parallel degree is 1 to {DEGREES[-1]}, got {tp}")
    if not 1 <= batch <= MAX_BATCH:
        raise UserError(f"a batch is 1 to {MAX_BATCH}, got {batch}")
    if config is None:
        size = size or next(iter(spec.sizes))
        config = size_config(spec, size)
    architecture = architecture or spec.model.architectures[0]
    limit = _positions(config)
    context = min(DEFAULT_CONTEXT, limit) if context is None else context
    if context < 1 or context > limit:
        raise UserError(f"a context of {context} positions", f"this model was made for 1 to {limit}")
    chunk = (128 if machine.name == "cpu" else 16) if chunk is None else chunk
    if chunk < 1 or draft < 1:
        raise UserError(f"a step has at least one token, got a chunk of {chunk} and a draft of {draft}")
    if not steps or set(steps) - set(STEP_KINDS):
        raise UserError(f"step kinds {list(steps)}", f"one or more of {', '.join(STEP_KINDS)}")
    request = Request(size or "checkpoint", machine, tp, batch, context, min(chunk, context), draft, tuple(steps))
    made = build(spec, architecture, config, request)
    if not verified:
        return made
    from mpk_spec.planner.verify import PlanError, verify

    try:
        verify(made)
    except PlanError:
        if made.crossing != "data":
            raise
        # Whether the layer before tells enough depends on how long the chain of tasks is: see `planner.crossing`.
        made = build(spec, architecture, config, replace(request, told=True))
        verify(made)
    return made


def plan_for(checkpoint: Checkpoint, spec: Spec, size: str | None = None, **how: Any) -> Plan:
    """`plan` for what a checkpoint's config says."""
    return plan(spec, size=size, config=checkpoint.config, architecture=checkpoint.architecture, **how)


def size_config(spec: Spec, size: str) -> dict[str, Any]:
    """The full configuration of one of the spec's sizes, as transformers normalises it."""
    from mpk_spec.weights import normalise_config

    if size not in spec.sizes:
        raise UserError(f"spec '{spec.name}' has no size '{size}'", did_you_mean(size, spec.sizes, "sizes"))
    return normalise_config(spec.model.architectures[0], spec.sizes[size].config)


def _positions(config: dict[str, Any]) -> int:
    """How many positions the model was made for."""
    inner = config.get("text_config") or {}
    return int(config.get("max_position_embeddings") or inner.get("max_position_embeddings") or 1 << 20)


def check(spec: Spec, *, verified: bool = True) -> None:
    """Plans every size on the default target; raises SpecError with all that is wrong."""
    from mpk_spec.planner.schedule import unmatched_rules

    problems = list(unmatched_rules(spec, set(spec.sizes)))
    for size in spec.sizes:
        try:
            plan(spec, size=size, verified=verified)
        except SpecError as error:
            problems += error.problems
    if problems:
        raise SpecError(problems)
