"""The tiny model on two GPUs; what a machine lacks for it."""

from __future__ import annotations

import os

from mpk_spec.errors import UserError

SPEC, SIZE, CONTEXT, SEED = "qwen3", "tiny", 256, 4


def missing() -> str | None:
    """What this machine lacks for several ranks."""
    import torch

    if torch.cuda.device_count() < 2:
        return f"needs two GPUs, this machine has {torch.cuda.device_count()}"
    return missing_library()


def missing_library() -> str | None:
    from mpk_spec.runtime.nvshmem import find_library

    try:
        find_library()
    except UserError as error:
        return error.message
    return None


def skip_without_gpu(transport: str) -> None:
    """Where ranks on one GPU are to use a transport."""
    import pytest
    import torch

    reason = missing_library() if transport == "nvshmem" else None
    if not torch.cuda.is_available():
        reason = "needs a GPU, this machine has none"
    if reason:
        pytest.skip(reason)


def open_tiny(tp: int, defines: tuple[str, ...] = ()):
    """The tiny model on `tp` GPUs; a kernel that stands still is given up soon."""
    from mpk_spec.runtime.parallel_backend import open_kernel
    from mpk_spec.runtime.select import plan_for_gpu
    from mpk_spec.schema import load_spec

    checkpoint = tiny_checkpoint()
    plan = plan_for_gpu(load_spec(SPEC), SIZE, checkpoint, CONTEXT, tp)
    backend = open_kernel(plan, checkpoint, defines=defines)
    if tp > 1:
        backend.ranks.call("configure", 3.0)
    else:
        backend.launcher.timeout_s = 3.0
    return backend


def on_transport(backend, transport: str):
    """The backend, whose ranks have joined, with the kernel for a transport."""
    if backend.transport != transport:
        backend.load(transport)
        backend.ranks.call("configure", 3.0)
    return backend


def tiny_checkpoint():
    from mpk_spec.runtime.random_model import random_checkpoint
    from mpk_spec.schema import load_spec

    return random_checkpoint(load_spec(SPEC), SIZE, SEED)


def same_bits_with_delays(backend) -> None:
    """`backend` is built with DELAYS: what it computes does not depend on who is slow."""
    import torch

    ids = [(11 + 17 * n) % 515 for n in range(40)]
    found = []
    for seed in (0, 1, 2, 3, 4):
        backend.ranks.call("probe", {"delay_seed": seed})
        made = list(backend.stream(ids[:20], max_new_tokens=20))
        found.append((backend.logits(ids), made))
    assert all(torch.equal(logits, found[0][0]) for logits, _ in found)
    assert all(made == found[0][1] for _, made in found)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True
