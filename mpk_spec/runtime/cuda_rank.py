"""One rank's GPU: what `runtime.ranks` has on every rank. Its methods are the same steps everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpk_spec.errors import UserError
from mpk_spec.planner.plan import Plan

if TYPE_CHECKING:
    from concurrent.futures import Future

    import numpy as np
    import torch

    from mpk_spec.emit.compiler import Compiled
    from mpk_spec.emit.source import Emitted
    from mpk_spec.runtime.nvshmem import Nvshmem
    from mpk_spec.runtime.transport import Reach


class CudaRank:
    """Rank `rank` of a plan for `ranks` GPUs, on the GPU of that number.

    defines: see `CudaBackend`. cubin: the plan's kernel, if it is built already; nothing is compiled then.
    """

    progress = None  # rank 0 sets it
    ahead: Future[Compiled] | None = None  # rank 0 sets it: the kernel for the transport that `prepare` is told
    whole_gpu = True  # see `KernelModule`

    def __init__(
        self, rank: int, ranks: int, plan: Plan, checkpoint: Any, defines: tuple[str, ...] = (),
        cubin: bytes | None = None,
    ):  # fmt: skip
        self.rank, self.ranks, self.plan, self.checkpoint, self.defines = rank, ranks, plan, checkpoint, defines
        self.cubin, self.compiled = cubin, None
        self.symmetric = self.launcher = None

    def prepare(self, transport: str) -> None:
        """What fails where this rank's machine is not up to it, before any rank waits for another.

        transport: "nvshmem" if that is what it will be, else "peer", which `take` may change.
        """
        from mpk_spec.emit.source import emit
        from mpk_spec.runtime.cuda_device import find_device

        self.number = self._take_gpu()
        self.device = find_device()
        self.emitted = emit(self.plan)
        self.library = self._library()
        self._build(transport)

    def _build(self, transport: str) -> None:
        """Compiles the kernel for a transport, or takes that of a build, and loads it."""
        from mpk_spec.runtime.cuda_launch import KernelModule

        if self.cubin is not None and transport != "peer":
            raise UserError(
                "the kernel of a build writes to its peers' memory, which these GPUs cannot all reach",
                "run the spec instead of the build: it is compiled for NVSHMEM's device API then",
            )
        cubin = self.cubin or self._compile(transport)
        self.module = KernelModule(self.emitted, cubin, self.number, whole_gpu=self.whole_gpu)
        self.transport = transport

    def _compile(self, transport: str) -> bytes:
        self._say("compiling the kernel")
        ahead, self.ahead = self.ahead, None
        self.compiled = ahead.result() if ahead else compile_for(transport, self.emitted, self.defines)
        return self.compiled.cubin

    def _take_gpu(self) -> int:
        """Makes this rank's GPU the current one; its number."""
        import torch

        if torch.cuda.device_count() <= self.rank:
            raise UserError(f"{self.ranks} ranks need {self.ranks} GPUs, there are {torch.cuda.device_count()}")
        torch.cuda.set_device(self.rank)
        return self.rank

    def _library(self) -> Nvshmem:
        """What gives symmetric memory."""
        from mpk_spec.runtime.nvshmem import Nvshmem

        return Nvshmem()

    def unique_id(self) -> bytes:
        return self.library.unique_id() if self.rank == 0 else b""

    def join(self, unique_id: bytes) -> Reach:
        """Blocks until all ranks have joined; what this one can reach then."""
        from mpk_spec.runtime.cuda_launch import symmetric_sizes
        from mpk_spec.runtime.symmetric import Symmetric

        self._say("joining the ranks")
        self.library.join(self.rank, self.ranks, unique_id)
        self.symmetric = Symmetric(
            self.library, self.rank, self.ranks, symmetric_sizes(self.emitted), self.device
        )  # fmt: skip
        return self._reach()

    def _reach(self) -> Reach:
        from mpk_spec.runtime.transport import Reach

        return Reach(self.rank, self.symmetric.unmapped, _without_atomics(self.rank, self.ranks))

    def take(self, transport: str) -> None:
        """The transport that the ranks have agreed on."""
        if transport != self.transport:
            self._build(transport)
        if transport == "nvshmem":
            self.library.adopt(int(self.module.module))

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

    def copies(self) -> np.ndarray:
        """`cuda_probe.COPIES` likewise."""
        return self.launcher.probe.copies()

    def abort(self) -> None:
        """Called by another thread, when a rank is lost."""
        if self.launcher is not None:
            self.launcher.abort()

    def value(self, name: str, tokens: int, layer: int | None = None) -> torch.Tensor:
        """What this rank has of a tensor after the last step, on the CPU; see `CudaBackend.value` and `value_of`."""
        from mpk_spec.runtime.cuda_backend import value_of

        step, last = self.launcher.steps - (layer is None), self.emitted.layout.layers - 1
        return value_of(self.plan, self.memory, name, tokens, step, last if layer is None else layer).cpu()

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


def compile_for(transport: str, emitted: Emitted, defines: tuple[str, ...]) -> Compiled:
    """The ranks' kernel, which needs no GPU yet. Raises UserError as `compile_kernel` does."""
    from mpk_spec.emit.compiler import compile_kernel
    from mpk_spec.planner.targets import find_target
    from mpk_spec.runtime.cuda_probe import check_defines
    from mpk_spec.runtime.nvshmem import find_headers, find_library
    from mpk_spec.runtime.transport import DEFINES, check_device_api

    check_defines(emitted.plan, defines)
    headers = None
    if transport == "nvshmem":
        check_device_api()
        headers = find_headers(find_library())
    arch, defines = find_target(emitted.plan.target).arch, (*defines, *DEFINES[transport])
    return compile_kernel(emitted.plan.name, emitted.source, arch, defines, headers)


def _nothing() -> None:
    """Waiting for the kernel this way, Python sees signals, and the thread that watches the other ranks runs."""


def _without_atomics(rank: int, ranks: int) -> tuple[int, ...]:
    """Peers in whose memory this rank cannot add, as signals do: that needs more than peer access."""
    from cuda.bindings import driver

    from mpk_spec.runtime.cuda_launch import check

    wanted = driver.CUdevice_P2PAttribute.CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED
    devices = [check(driver.cuDeviceGet(number)) for number in range(ranks)]
    return tuple(
        peer
        for peer in range(ranks)
        if peer != rank and not check(driver.cuDeviceGetP2PAttribute(wanted, devices[rank], devices[peer]))
    )
