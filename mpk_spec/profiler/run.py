"""Runs a model with the profiling build and brings the recorded times back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mpk_spec.errors import UserError

if TYPE_CHECKING:
    from mpk_spec.runtime.cuda_backend import CudaBackend

WARM_UP = 8  # tokens before the first that is recorded


def record(backend: CudaBackend, context: int, tokens: int) -> np.ndarray:
    """`cuda_probe.TIMES` of `tokens` + 1 steps in one launch, with about `context` random positions in the cache.

    `backend` must be built with `PROFILE`. Raises UserError where the steps do not fit the plan's context.
    """
    from mpk_spec.runtime.cuda_probe import Probe

    launcher, plan = backend.launcher, backend.plan
    before = max(1, context - WARM_UP - tokens // 2)
    made = WARM_UP + tokens + 2
    if before + made > plan.context:
        raise UserError(
            f"a profile at {context} positions takes {before + made}, the plan holds {plan.context}",
            "a smaller --context or fewer --tokens",
        )
    probe = Probe(backend.emitted, backend.memory.arena.device, trace_steps=tokens + 1)
    probe.trace_step = launcher.steps + WARM_UP
    launcher.probe = probe
    ids = backend.fill_cache(before)
    try:
        for _ in backend.stream(ids, max_new_tokens=made):
            pass
    finally:
        launcher.probe = None
        backend.reset()  # what the cache was filled with was read by nobody
    return probe.times()
