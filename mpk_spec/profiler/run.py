"""Runs a model with the profiling build and brings the recorded times back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mpk_spec.errors import UserError

if TYPE_CHECKING:
    from mpk_spec.runtime.cuda_backend import CudaBackend

WARM_UP = 8  # tokens before the first that is recorded


def record(backend: CudaBackend, context: int, tokens: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Every rank's `cuda_probe.TIMES` and `COPIES` of `tokens` + 1 steps of one launch with about `context` cached
    positions: what `common_clock` takes.

    `backend` must be built with `PROFILE`. Raises UserError where the steps do not fit the plan's context.
    """
    plan = backend.plan
    before = max(1, context - WARM_UP - tokens // 2)
    made = WARM_UP + tokens + 2
    if before + made > plan.context:
        raise UserError(
            f"a profile at {context} positions takes {before + made}, the plan holds {plan.context}",
            "a smaller --context or fewer --tokens",
        )
    backend.probe({"trace_step": backend.launcher.steps + WARM_UP}, tokens + 1)
    ids = backend.fill_cache(before)
    for _ in backend.stream(ids, max_new_tokens=made):
        pass
    found = list(zip(backend.times(), backend.copies(), strict=True))
    backend.probe(None)
    backend.reset()  # what the cache was filled with was read by nobody
    return found
