"""One benchmark of the kernel, in one run: ceiling, our time, the simulation's, the verdict, the rivals, in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpk_spec.errors import UserError
from mpk_spec.perf.clock import start_of
from mpk_spec.runtime.cuda_device import free_gpu

if TYPE_CHECKING:
    from mpk_spec.planner.plan import Plan
    from mpk_spec.progress import Progress
    from mpk_spec.runtime.cuda_backend import CudaBackend
    from mpk_spec.weights import Checkpoint

LEAST_CACHE = 512  # positions; a conversation needs more than the shortest context that is timed
PROMPT = 128  # tokens of the prompt whose first token is timed
SEEDS = 2


@dataclass(frozen=True)
class Settings:
    """`context`: positions in the cache, on average over `tokens` tokens. positions: of the verdict; 0: none."""

    context: int = 128
    tokens: int = 64
    repeats: int = 5
    rivals: tuple[str, ...] = ()
    positions: int = 256

    @property
    def cache(self) -> int:
        """Positions that the cache must hold."""
        return start_of(self.context, self.tokens) + self.tokens

    def room(self, config: dict[str, Any]) -> int:
        """Positions that a plan for a model of `config` gets: `LEAST_CACHE`, if it was made for so many, or more.

        Raises UserError where the model was made for fewer than the cache must hold.
        """
        from mpk_spec.runtime.select import choose_context

        return choose_context(max(self.cache, min(LEAST_CACHE, choose_context(None, config))), config)


def bench(
    opened: Callable[[int], CudaBackend], checkpoint: Checkpoint, settings: Settings, progress: Progress
) -> dict[str, Any]:
    """Everything that the page shows, as JSON data.

    opened: gives the backend, with a cache for so many positions (a build has its own). The ceiling is measured before
    and after it, since it differs by 1 % from minute to minute.
    Raises UserError where this machine cannot be measured.
    """
    from mpk_spec.perf.ceiling import measure_ceiling
    from mpk_spec.runtime.select import target_here

    target, gpu = target_here()
    if settings.positions:
        _check_memory(checkpoint, settings.positions)
    progress("measuring the ceiling of memory", 0, 0)
    before = measure_ceiling(target)
    free_gpu()
    backend = opened(settings.room(checkpoint.config))
    plan, description = backend.plan, backend.description
    if plan.context < settings.cache:
        raise UserError(
            f"the kernel was built for {plan.context} positions; timing at context {settings.context} needs "
            f"{settings.cache}",
            f"build it with -c {settings.cache}",
        )
    ours = {"description": description, **_ours(backend, settings, progress)}
    verdict = _verdict(backend, checkpoint, settings.positions, progress) if settings.positions else None
    backend.close()
    free_gpu()
    progress("measuring the ceiling once more", 0, 0)
    ceiling = before.with_those_of(measure_ceiling(target))
    free_gpu()
    return {
        "model": {"spec": plan.spec, "size": plan.size, "weights": str(checkpoint.source)},
        "plan": plan.key, "tp": plan.tp, "context": settings.context, "cache": plan.context,
        "target": target.name, "gpu": _gpu(gpu),
        "ceiling": ceiling.data(), "bytes_per_token": bytes_per_token(plan, settings.context),
        "ours": ours, "simulation": _predicted(plan, settings.context, ceiling.gbps),
        **({"verdict": verdict} if verdict else {}),
        "rivals": _rivals(checkpoint, settings, progress), "software": _software(),
    }  # fmt: skip


def _check_memory(checkpoint: Checkpoint, positions: int) -> None:
    """Before anything is measured, that the verdict can be found afterwards."""
    from mpk_spec.testing.yardstick import need_memory

    try:
        need_memory(checkpoint, positions)
    except UserError as error:
        raise UserError(error.message, "--no-verdict measures without it") from None


def _gpu(properties) -> dict[str, Any]:
    from cuda.bindings import driver

    from mpk_spec.runtime.cuda_launch import check

    number = check(driver.cuDriverGetVersion())
    cuda = f"{number // 1000}.{number % 1000 // 10}"
    return {"name": properties.name, "sms": properties.multi_processor_count, "driver_cuda": cuda}


def bytes_per_token(plan: Plan, context: int) -> dict[str, int]:
    """What a rank must read in a step: every weight once, and the keys and values of `context` positions."""
    from mpk_spec.planner.weights import weight_bytes

    kv = sum(s.layers * s.kv_heads * 2 * s.row_bytes for s in plan.states.values()) * context
    weights = weight_bytes(plan)
    return {"weights": weights, "kv": kv, "total": weights + kv}


def _ours(backend: CudaBackend, settings: Settings, progress: Progress) -> dict[str, Any]:
    from mpk_spec.perf.clock import time_decode
    from mpk_spec.perf.turns import once

    progress("timing the kernel", 0, 0)
    prompt = min(PROMPT, backend.context - 2)
    first = min(once(backend, prompt, 2).first_s for _ in range(3))
    times = time_decode(backend, settings.context, settings.tokens, settings.repeats)
    return {**times.data(), "prompt_tokens": prompt, "first_token_s": round(first, 5)}


def _predicted(plan: Plan, context: int, gbps: float) -> dict[str, Any]:
    """With the memory of this run, whatever the constants know of it."""
    from mpk_spec.planner.cost import cost_model, read_calibration
    from mpk_spec.planner.simulate import simulate

    known = read_calibration(plan.target)
    found = simulate(plan, context=context, cost=cost_model(plan.target, (known or {}) | {"stream_gbps": gbps}))
    return {"ms": round(found.ms, 5), "calibrated": known is not None}


def _verdict(backend: CudaBackend, checkpoint: Checkpoint, positions: int, progress: Progress) -> dict[str, Any]:
    from mpk_spec.testing.yardstick import Yardstick, sequences

    ids = sequences(backend.vocab_size, positions, SEEDS, min(backend.context, LEAST_CACHE))
    verdict = Yardstick(checkpoint, ids, progress).judge(backend, progress, alone=len(ids[0]) // 4)
    return {**verdict.data(), "sequence": len(ids[0])}


def _rivals(checkpoint: Checkpoint, settings: Settings, progress: Progress) -> dict[str, Any]:
    if not settings.rivals:
        return {}
    from transformers.utils import logging

    from mpk_spec.perf.rivals import time_rival
    from mpk_spec.weights import load_hf_model

    logging.disable_progress_bar()
    progress("loading Hugging Face's model", 0, 0)
    try:
        model = load_hf_model(checkpoint, dtype="bfloat16", device="cuda")
    except RuntimeError as error:  # no memory for it
        return {key: {"failed": _first_line(error)} for key in settings.rivals}
    free_gpu()
    found = {}
    for number, name in enumerate(settings.rivals):
        progress("timing the rivals", number, len(settings.rivals))
        try:
            found[name] = time_rival(name, model, settings.context, settings.tokens, settings.repeats).data()
        except RuntimeError as error:  # its compiler's, its memory's: ours was measured all the same
            found[name] = {"failed": _first_line(error)}
        free_gpu()
    return found


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _software() -> dict[str, Any]:
    import torch

    from mpk_spec.perf.turns import machine

    return {**machine(), "cuda": torch.version.cuda}
