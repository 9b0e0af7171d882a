"""The streaming-read ceiling of this GPU, measured: what no decode step can be faster than.

Absolute times move between machines, so every percentage is of the ceiling that the same run measured.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from mpk_spec.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpk_spec.planner.targets import Target

TOTAL_BYTES = 8 << 30  # far beyond any cache
CHUNKS_KIB = (4, 8, 16, 32, 64)
IN_FLIGHT_KIB = (32, 48, 64, 96, 128, 192)
MAX_SLOTS = 64  # of cuda_templates/probes/ceiling.cu
THREADS = 288
REPEATS = 5
LEAST = 0.90  # of the theoretical bandwidth: below it something else uses the GPU, or it is not the one it seems


@dataclass(frozen=True)
class Reading:
    """One point of the sweep: GB/s with chunks of `chunk_kib`, `flight_kib` of them on their way for each SM."""

    chunk_kib: int
    flight_kib: int
    interleaved: bool
    gbps: float


@dataclass(frozen=True)
class Ceiling:
    """All points, and what the data sheet says."""

    readings: tuple[Reading, ...]
    theoretical_gbps: float

    @property
    def best(self) -> Reading:
        return max(self.readings, key=lambda r: r.gbps)

    @property
    def gbps(self) -> float:
        return self.best.gbps

    def with_those_of(self, other: Ceiling) -> Ceiling:
        """Of the same GPU, measured at another time."""
        return Ceiling(self.readings + other.readings, self.theoretical_gbps)

    def data(self) -> dict[str, Any]:
        """For JSON: the ceiling, where it was reached, and the best of each chunk size."""
        by_chunk = {
            f"{kib} KiB": round(max(r.gbps for r in self.readings if r.chunk_kib == kib), 1)
            for kib in sorted({r.chunk_kib for r in self.readings})
        }
        best = self.best
        return {
            "gbps": round(best.gbps, 1), "theoretical_gbps": self.theoretical_gbps, "chunk_kib": best.chunk_kib,
            "in_flight_kib": best.flight_kib, "interleaved": best.interleaved, "gbps_by_chunk": by_chunk,
        }  # fmt: skip


def points(smem_bytes: int) -> list[tuple[int, int, bool]]:
    """(chunk KiB, KiB in flight, interleaved) that a ring in `smem_bytes` of shared memory can have."""
    return [
        (chunk, flight, interleaved)
        for chunk in CHUNKS_KIB
        for flight in IN_FLIGHT_KIB
        for interleaved in (False, True)
        if flight % chunk == 0 and 2 <= flight // chunk <= MAX_SLOTS and (flight + 2) * 1024 <= smem_bytes
    ]


def measure_ceiling(target: Target) -> Ceiling:
    """Sweeps chunk sizes and bytes in flight. Needs 8 GiB of free GPU memory for a second.

    Raises UserError where the maximum is below 90 % of `target`'s theoretical bandwidth: percentages of such a
    ceiling would flatter.
    """
    return checked(sweep(target, _gpu_timer(target)))


def sweep(target: Target, timed: Callable[[int, int, int, bool], float]) -> Ceiling:
    """`timed(chunk bytes, slots, chunks for each SM, interleaved)` gives milliseconds of one pass."""
    readings = []
    for chunk, flight, interleaved in points(target.smem_bytes):
        size = chunk * 1024
        chunks = TOTAL_BYTES // (size * target.num_sms)
        ms = timed(size, flight // chunk, chunks, interleaved)
        readings.append(Reading(chunk, flight, interleaved, chunks * size * target.num_sms / ms / 1e6))
    return Ceiling(tuple(readings), target.theoretical_gbps)


def checked(ceiling: Ceiling) -> Ceiling:
    share = ceiling.gbps / ceiling.theoretical_gbps
    if share < LEAST:
        raise UserError(
            f"memory was read at {ceiling.gbps:.0f} GB/s at best, {100 * share:.0f} % of the "
            f"{ceiling.theoretical_gbps:.0f} GB/s of the data sheet: no figures are reported below {100 * LEAST:.0f} %",
            "another program may be using the GPU ('nvidia-smi' lists them), or its clocks are held down",
        )
    return ceiling


def _gpu_timer(target: Target) -> Callable[[int, int, int, bool], float]:
    """Milliseconds of one pass on the GPU that torch uses: the median of `REPEATS`, after one that warms up."""
    import torch
    from cuda.bindings import driver

    from mpk_spec.emit.compiler import compile_kernel
    from mpk_spec.paths import templates_dir
    from mpk_spec.runtime.cuda_device import find_device
    from mpk_spec.runtime.cuda_launch import check

    device = find_device()
    source = (templates_dir() / "probes" / "ceiling.cu").read_text(encoding="utf-8")
    module = check(driver.cuModuleLoadData(compile_kernel("ceiling", source, target.arch).cubin))
    function = check(driver.cuModuleGetFunction(module, b"stream"))
    limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    check(driver.cuFuncSetAttribute(function, limit, max(IN_FLIGHT_KIB) * 1024))
    memory = torch.empty(_room(device) // 8, dtype=torch.int64, device=device).random_()
    out = torch.zeros(1, dtype=torch.int32, device=device)
    types = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)

    def once(size: int, slots: int, chunks: int, interleaved: bool) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream = torch.cuda.current_stream()
        values = (memory.data_ptr(), chunks, size, slots, int(interleaved), out.data_ptr())
        begin.record(stream)
        check(driver.cuLaunchKernel(
            function, target.num_sms, 1, 1, THREADS, 1, 1, size * slots, stream.cuda_stream, (values, types), 0
        ))  # fmt: skip
        end.record(stream)
        end.synchronize()
        return begin.elapsed_time(end)

    def timed(*point) -> float:
        return median([once(*point) for _ in range(REPEATS + 1)][1:])

    return timed


def _room(device) -> int:
    """`TOTAL_BYTES`; UserError where they are not free."""
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    if free < TOTAL_BYTES + (256 << 20):
        raise UserError(
            f"measuring the ceiling of memory takes {TOTAL_BYTES >> 30} GiB of the GPU for a second, "
            f"{free / 2**30:.1f} GiB are free",
            "end what else uses the GPU ('nvidia-smi' lists it)",
        )
    return TOTAL_BYTES
