"""Whether there is a GPU to run on, and what to do about it where there is none, or none that works."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mpk_spec.errors import UserError

if TYPE_CHECKING:
    import torch

ON_THE_CPU = "--backend cpu runs the same plan on the CPU"
GIB = 1 << 30

# What to do about the driver's errors, by their names without CUDA_ERROR_.
HINTS = {
    "NO_DEVICE": "no GPU is visible: CUDA_VISIBLE_DEVICES may hide it",
    "DEVICE_UNAVAILABLE": "another process holds this GPU alone ('nvidia-smi' shows it and the compute mode)",
    "OUT_OF_MEMORY": "other processes may hold its memory ('nvidia-smi' lists them); a smaller context needs less: -c",
    "INVALID_IMAGE": "the driver is older than the compiler: update the NVIDIA driver",
    "NO_BINARY_FOR_GPU": "the kernel was compiled for another GPU: build it for this one, --target says for which",
    "UNSUPPORTED_PTX_VERSION": "the driver is older than the compiler: update the NVIDIA driver",
    "INVALID_SOURCE": "the kernel's file may be damaged: build it again",
    "SYSTEM_DRIVER_MISMATCH": "the driver was updated and not yet loaded: restart the machine",
    "COMPAT_NOT_SUPPORTED_ON_DEVICE": "the driver is too old for this CUDA: update the NVIDIA driver",
    "COOPERATIVE_LAUNCH_TOO_LARGE": "the kernel needs every SM: another process (MPS, MIG) may hold a part of the GPU",
    "MPS_CONNECTION_FAILED": "the MPS server of this machine does not answer",
    "ECC_UNCORRECTABLE": "the GPU's memory is damaged",
}


class NoGpu(UserError):
    """The kernel cannot run here. mend: what would change that, if anything is known; instead: what runs as it is."""

    def __init__(self, message: str, mend: str | None = None, instead: str = ON_THE_CPU):
        self.mend = mend
        super().__init__(message, f"{mend}; {instead}" if mend else instead)


@contextmanager
def gpu_alone() -> Iterator[None]:
    """Inside it the CPU is not offered instead: for what measures the kernel, which nothing else can."""
    try:
        yield
    except NoGpu as error:
        raise NoGpu(error.message, error.mend, "this measures the kernel: it needs a GPU") from None


def find_device() -> torch.device:
    """The GPU that torch sees, its context made current, as driver calls need. NoGpu where there is none."""
    import torch

    if not torch.cuda.is_available():
        raise NoGpu(*why_not(torch.version.cuda, driver_cuda()))
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the GPU cannot be used: {reason}", HINTS["DEVICE_UNAVAILABLE"]) from None
    return torch.device("cuda", torch.cuda.current_device())


def why_not(built: str | None, driver: tuple[int, int] | None) -> tuple[str, str | None]:
    """(what is wrong, what would mend it) where torch sees no GPU. built: torch's CUDA; driver: the newest it has."""
    if built is None:
        return "this torch is built without CUDA", "install a CUDA build of torch"
    if driver is None:
        return "there is no usable NVIDIA GPU here", None
    needs = tuple(int(part) for part in built.split(".")[:2])
    if driver[0] < needs[0]:
        return (
            f"the NVIDIA driver is too old: it supports CUDA {driver[0]}.{driver[1]}, this torch is built for {built}",
            "update the driver",
        )
    return "there is no usable NVIDIA GPU here", "CUDA_VISIBLE_DEVICES may hide it"


def driver_cuda() -> tuple[int, int] | None:
    """The CUDA version that the installed driver supports; None where there is no driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


class OutOfMemory(UserError):
    """The GPU's memory does not hold what is to lie there."""


def admit(emitted, device, has_weights: bool = False) -> None:
    """Raises OutOfMemory, saying what context would fit, unless weights, cache and activations fit into free memory.

    has_weights: they are there already.
    """
    import torch

    free_gpu()
    free, total = torch.cuda.mem_get_info(device)
    plan, layout = emitted.plan, emitted.layout
    fixed = (0 if has_weights else layout.weight_bytes) + sum(plan.arena_bytes.values()) + SPARE_BYTES
    if fixed + layout.cache_bytes <= free:
        return
    taken = total - free - torch.cuda.memory_reserved(device)
    others = f", other processes hold {taken / GIB:.1f}" if taken > GIB else ""
    message = (
        f"the model needs {fixed / GIB:.1f} GiB and its cache {layout.cache_bytes / GIB:.1f} GiB "
        f"at context {plan.context}, the GPU has {free / GIB:.1f} of {total / GIB:.1f} GiB free{others}"
    )
    fits = int((free - fixed) / (layout.cache_bytes / plan.context)) // 64 * 64
    smaller = "end what else uses the GPU" if others else "a smaller model would fit"
    raise OutOfMemory(message, f"a context of {fits} fits: -c {fits}" if fits > 0 else smaller)


def free_gpu() -> None:
    """Gives back the memory that torch only keeps for later."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def memory_runs_out() -> Iterator[None]:
    """Inside it a lack of GPU memory, as when another process took some meanwhile, is an OutOfMemory."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).strip().splitlines()[0].partition(". GPU")[0]
        raise OutOfMemory(f"the GPU's memory ran out: {reason}", HINTS["OUT_OF_MEMORY"]) from None


SPARE_BYTES = 512 << 20
"""What the driver, the loading of weights and torch itself take."""
