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
    from mpk_spec.runtime.nvshmem import find_library

    try:
        find_library()
    except UserError as error:
        return error.message
    return None


def open_on(tp: int, checkpoint):
    """The tiny model on `tp` GPUs; a kernel that stands still is given up soon."""
    from mpk_spec.runtime.engine import Engine
    from mpk_spec.runtime.select import plan_for_gpu
    from mpk_spec.schema import load_spec

    backend = Engine(plan_for_gpu(load_spec(SPEC), SIZE, checkpoint, CONTEXT, tp), checkpoint).backend
    if tp > 1:
        backend.ranks.call("configure", 3.0)
    else:
        backend.launcher.timeout_s = 3.0
    return backend


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True
