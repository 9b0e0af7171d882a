"""Our kernel's time per token: by the GPU's clock, and as whoever reads the stream sees it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpk_spec.runtime.cuda_backend import CudaBackend


@dataclass(frozen=True)
class Times:
    """Milliseconds per token in steady state. `launch_ms`: what one launch costs beside its steps."""

    kernel_ms: float
    kernel_ms_min: float
    kernel_ms_max: float
    user_ms: float
    launch_ms: float
    tokens: int
    repeats: int

    def data(self) -> dict[str, Any]:
        return {k: round(v, 5) if isinstance(v, float) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Launch:
    """One launch: its time by the GPU's clock, and the time between tokens by the host's."""

    gpu_ms: float
    user_ms: float


def time_decode(backend: CudaBackend, context: int, tokens: int, repeats: int) -> Times:
    """Decodes `tokens` tokens whose contexts have `context` positions on average, over a cache filled at random.

    A launch of one step is taken from a launch of `tokens` + 1, so that what is left is steps in steady state; after
    one pair that warms up, medians of `repeats`.
    """
    ids = backend.fill_cache(start_of(context, tokens))
    launches = [(run(backend, ids, 1), run(backend, ids, tokens + 1)) for _ in range(repeats + 1)][1:]
    paces = [(long.gpu_ms - short.gpu_ms) / tokens for short, long in launches]
    users = [long.user_ms for _, long in launches]
    overhead = median(short.gpu_ms for short, _ in launches) - median(paces)
    return Times(median(paces), min(paces), max(paces), median(users), overhead, tokens, repeats)


def pace(backend: CudaBackend, ids: list[int], tokens: int) -> float:
    """Milliseconds per token, from one long launch and a short one."""
    short, long = run(backend, ids, 1), run(backend, ids, tokens + 1)
    return (long.gpu_ms - short.gpu_ms) / tokens


def start_of(context: int, tokens: int) -> int:
    """Positions in the cache before the first token, so that the mean over the tokens is `context`."""
    return max(1, context - tokens // 2)


def run(backend: CudaBackend, ids: list[int], tokens: int) -> Launch:
    """One launch that continues `ids`, whose keys and values (but the last's) are in the cache."""
    seen = []
    for _ in backend.stream(ids, max_new_tokens=tokens):
        seen.append(time.perf_counter())
    if len(seen) != tokens:
        raise RuntimeError(f"the kernel made {len(seen)} of {tokens} tokens")
    between = (seen[-1] - seen[0]) / (tokens - 1) * 1e3 if tokens > 1 else 0.0
    return Launch(backend.launcher.elapsed_ms(), between)
