"""One rank's GPU: what `runtime.ranks` has on every rank. Its methods are the same steps everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpk_spec.errors import UserError
from mpk_spec.planner.plan import Plan

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mpk_spec.runtime.nvshmem import Nvshmem


class CudaRank:
    """Rank `rank` of a plan for `ranks` GPUs, on the GPU of that number.

    defines: see `CudaBackend`. cubin: the plan's kernel, if it is built already; nothing is compiled then.
    """

    progress = None  # rank 0 sets it
    whole_gpu = True  # see `KernelModule`

    def __init__(
        self, rank: int, ranks: int, plan: Plan, checkpoint: Any, defines: tuple[str, ...] = (),
        cubin: bytes | None = None,
    ):  # fmt: skip
        self.rank, self.ranks, self.plan, self.checkpoint, self.defines = rank, ranks, plan, checkpoint, defines
        self.cubin, self.compiled = cubin, None
        self.symmetric = self.launcher = None

    def prepare(self) -> None:
        """What fails where this rank's machine is not up to it, before any rank waits for another."""
        from mpk_spec.emit.source import emit
        from mpk_spec.runtime.cuda_device import find_device
        from mpk_spec.runtime.cuda_launch import KernelModule

        number = self._take_gpu()
        self.device = find_device()
        self.emitted = emit(self.plan)
        cubin = self.cubin or self._compile()
        self.module = KernelModule(self.emitted, cubin, number, whole_gpu=self.whole_gpu)
        self.library = self._library()

    def _compile(self) -> bytes:
        from mpk_spec.emit.compiler import compile_kernel
        from mpk_spec.planner.targets import find_target

        self._say("compiling the kernel")
        arch = find_target(self.plan.target).arch
        self.compiled = compile_kernel(self.plan.name, self.emitted.source, arch, self.defines)
        return self.compiled.cubin

    def _take_gpu(self) -> int:
        """Makes this rank's GPU the current one; its number."""
        import torch

        if torch.cuda.device_count() <= self.rank:
            raise UserError(f"{self.ranks} ranks need {self.ranks} GPUs, there are {torch.cuda.device_count()}")
        torch.cuda.set_device(self.rank)
        return self.rank

    def _library(self) -> Nvshmem:
        """What gives symmetric memory, if the GPUs can use it."""
        from mpk_spec.runtime.nvshmem import Nvshmem

        _check_atomics(self.rank, self.ranks)
        return Nvshmem()

    def unique_id(self) -> bytes:
        return self.library.unique_id() if self.rank == 0 else b""

    def join(self, unique_id: bytes) -> None:
        from mpk_spec.runtime.cuda_launch import symmetric_sizes
        from mpk_spec.runtime.symmetric import Symmetric

        self._say("joining the ranks")
        self.library.join(self.rank, self.ranks, unique_id)
        self.symmetric = Symmetric(
            self.library, self.rank, self.ranks, symmetric_sizes(self.emitted), self.device
        )  # fmt: skip

    def load(self) -> None:
        """Weights and memory; when every rank has done it, the kernel can start."""
        from mpk_spec.runtime.cuda_device import admit, free_gpu, memory_runs_out
        from mpk_spec.runtime.cuda_launch import Launcher, Memory
        from mpk_spec.runtime.cuda_weights import load_weights

        admit(self.emitted, self.device)
        layout = self.emitted.layout
        with memory_runs_out():
            weights = load_weights(self.plan, layout, self.checkpoint, self.device, self.progress, self.rank)
            free_gpu()  # what the tensors took while they were packed
            self.memory = Memory(self.emitted, self.device, self.symmetric)
        self.launcher = Launcher(self.emitted, self.module, self.memory, weights)
        self.launcher.while_waiting = _nothing

    def start(self, prompt: list[int], position: int, max_new: int, stop: frozenset[int]) -> None:
        self.launcher.start(prompt, position, max_new, stop)

    def finish(self) -> int:
        return self.launcher.finish()

    def configure(self, timeout_s: float) -> None:
        self.launcher.timeout_s = timeout_s

    def reset_events(self, steps: int = 0) -> None:
        """After an abort, when no rank's kernel runs."""
        self.launcher.reset_events(steps)

    def write(self, symbol: str, words: tuple[int, ...]) -> None:
        """See `KernelModule.write`."""
        self.module.write(symbol, words)

    def probe(self, settings: dict[str, Any] | None, trace_steps: int = 0) -> None:
        """See `CudaBackend.probe`."""
        from mpk_spec.runtime.cuda_backend import make_probe

        self.launcher.probe = make_probe(self.emitted, self.memory, settings, trace_steps)

    def times(self) -> np.ndarray:
        """`cuda_probe.TIMES` of what the probe has recorded."""
        return self.launcher.probe.times()

    def abort(self) -> None:
        """Called by another thread, when a rank is lost."""
        if self.launcher is not None:
            self.launcher.abort()

    def value(self, name: str, tokens: int) -> torch.Tensor:
        """What this rank has of a tensor after the last step, on the CPU, see `value_of`."""
        from mpk_spec.runtime.cuda_backend import value_of

        return value_of(self.plan, self.memory, name, tokens).cpu()

    def fill_cache(self, seed: int) -> None:
        from mpk_spec.runtime.cuda_backend import fill_cache

        fill_cache(self.memory, seed)

    def close(self) -> None:
        self.launcher = self.memory = None
        if self.symmetric is not None:
            self.symmetric.leave()

    def _say(self, what: str) -> None:
        if self.progress is not None:
            self.progress(what, 0, 0)


def _nothing() -> None:
    """Waiting for the kernel this way, Python sees signals, and the thread that watches the other ranks runs."""


def _check_atomics(rank: int, ranks: int) -> None:
    """Signals are additions in a peer's memory: they need more than peer access."""
    from cuda.bindings import driver

    from mpk_spec.runtime.cuda_launch import check

    wanted = driver.CUdevice_P2PAttribute.CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED
    for peer in set(range(ranks)) - {rank}:
        here, there = check(driver.cuDeviceGet(rank)), check(driver.cuDeviceGet(peer))
        if not check(driver.cuDeviceGetP2PAttribute(wanted, here, there)):
            raise UserError(
                f"peer {peer} is not directly addressable from GPU {rank}: signals need atomic operations over NVLink",
                "`nvidia-smi topo -m` shows how the GPUs are connected",
            )
