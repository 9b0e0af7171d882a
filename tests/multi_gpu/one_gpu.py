"""Several ranks on one GPU, in this process: each has a share of the SMs and launches its own kernel.

All that the kernels exchange goes the same way as between GPUs, but through one memory. For NVSHMEM's device API the
state that its library keeps in a module is made here: every rank's part of the symmetric heap is mapped.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace

import torch
from ranks_here import RanksHere
from tiny_ranks import CONTEXT, SIZE, SPEC, tiny_checkpoint

from mpk_spec.planner import plan
from mpk_spec.planner.targets import TARGETS, target_of
from mpk_spec.runtime.cuda_launch import check
from mpk_spec.runtime.cuda_rank import CudaRank
from mpk_spec.runtime.parallel_backend import ParallelBackend
from mpk_spec.runtime.transport import Reach
from mpk_spec.schema import load_spec
from mpk_spec.schema.models import Rule

PART = "part"


LOADS_AND_ATOMICS = 1  # NVSHMEMI_JOB_GPU_LDST_ATOMICS: all peers are mapped, and atomic operations reach them


class DeviceState(ctypes.Structure):
    """The beginning of NVSHMEM 3.4's nvshmemi_device_host_state_v1, as far as puts to mapped peers read it."""

    _fields_ = (
        ("version", ctypes.c_int), ("rank", ctypes.c_int), ("ranks", ctypes.c_int), ("unused", ctypes.c_int * 5),
        ("connectivity", ctypes.c_int), ("flags", ctypes.c_bool * 4), ("heap", ctypes.c_void_p),
        ("heap_bytes", ctypes.c_size_t), ("peers", ctypes.c_void_p),
    )  # fmt: skip


class Heap:
    """Symmetric memory of all ranks; in the place of NVSHMEM."""

    def __init__(self, ranks: int):
        self.ranks, self.blocks = ranks, []

    def of(self, rank: int) -> Heap:
        own = Heap(self.ranks)
        own.rank, own.blocks = rank, self.blocks
        return own

    def unique_id(self) -> bytes:
        return b""

    def join(self, *_) -> None:
        pass

    def malloc(self, size: int) -> int:
        if not self.blocks:
            self.blocks += [torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in range(self.ranks)]
        return self.blocks[self.rank].data_ptr()

    def peer(self, _: int, rank: int) -> int:
        return self.blocks[rank].data_ptr()

    def adopt(self, module: int) -> None:
        """As NVSHMEM's library does it once all ranks have their memory."""
        from cuda.bindings import driver

        self.addresses = torch.tensor([block.data_ptr() for block in self.blocks], device="cuda")
        state = DeviceState(
            rank=self.rank, ranks=self.ranks, connectivity=LOADS_AND_ATOMICS, heap=self.blocks[self.rank].data_ptr(),
            heap_bytes=self.blocks[self.rank].numel(), peers=self.addresses.data_ptr(),
        )  # fmt: skip
        at, size = check(driver.cuModuleGetGlobal(driver.CUmodule(module), b"nvshmemi_device_state_d"))
        assert size >= ctypes.sizeof(state)
        check(driver.cuMemcpyHtoD(at, ctypes.addressof(state), ctypes.sizeof(state)))

    def leave(self, _) -> None:
        pass


class Rank(CudaRank):
    """A rank on a share of the SMs."""

    heap: Heap
    whole_gpu = False

    def _take_gpu(self) -> int:
        return 0

    def _library(self) -> Heap:
        return self.heap.of(self.rank)

    def _reach(self) -> Reach:
        return Reach(self.rank)

    def _build(self, transport: str) -> None:
        super()._build(transport)
        self.module.cooperative = False  # two such launches would follow one another


TWO_SHOTS = Rule.model_validate({"set": {"*": {"all_reduce": "two_shot"}}})


def open_here(
    ranks: int, monkeypatch, defines: tuple[str, ...] = (), transport: str = "peer", two_shots: bool = False,
    attend: dict | None = None, context: int = CONTEXT, claimed: tuple[str, ...] = (),
) -> ParallelBackend:  # fmt: skip
    """A backend of `ranks` ranks on this GPU; `two_shots`: their sums are made so, whatever costs less.

    attend: what a rule says of the attention. claimed: groups whose tasks are claimed at run time.
    """
    found = torch.cuda.get_device_properties(0)
    whole = target_of(found.name, f"sm_{found.major}{found.minor}", found.multi_processor_count)
    monkeypatch.setitem(TARGETS, PART, replace(whole, name=PART, num_sms=whole.num_sms // ranks))
    Rank.heap = Heap(ranks)
    spec = load_spec(SPEC)
    spec = replace(spec, schedule=[*spec.schedule, TWO_SHOTS]) if two_shots else spec
    rules = [Rule.model_validate({"set": {"attend": attend}})] if attend else []
    rules += [Rule.model_validate({"set": {name: {"launch": "dynamic"}}}) for name in claimed]
    spec = replace(spec, schedule=[*spec.schedule, *rules])
    made = plan(spec, size=SIZE, target=PART, tp=ranks, context=context)
    backend = ParallelBackend(
        made, tiny_checkpoint(), defines=defines, transport=transport, make=Rank, ranks=RanksHere(ranks)
    )
    backend.ranks.call("configure", 3.0)
    return backend
