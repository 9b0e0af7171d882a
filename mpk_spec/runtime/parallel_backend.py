"""The CUDA backend on several GPUs: this process is rank 0, the other ranks' processes do as it says."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from mpk_spec.errors import UserError
from mpk_spec.planner.plan import Plan
from mpk_spec.runtime.cuda_backend import CudaBackend
from mpk_spec.runtime.cuda_device import NoGpu
from mpk_spec.runtime.cuda_rank import CudaRank, compile_for
from mpk_spec.runtime.ranks import RankLost, Ranks
from mpk_spec.runtime.transport import VARIABLE, choose, wanted_transport

if TYPE_CHECKING:
    from concurrent.futures import Future

    import numpy as np
    import torch

    from mpk_spec.emit.compiler import Compiled
    from mpk_spec.runtime.built import Build


class ParallelBackend(CudaBackend):
    """`runtime.backend.Backend` over one persistent kernel per GPU; one sequence. Frees the other ranks on `close`."""

    def __init__(
        self,
        plan: Plan,
        checkpoint: Any,
        progress=None,
        *,
        defines: tuple[str, ...] = (),
        build: Build | None = None,
        transport: str | None = None,
        make: Callable[..., Any] = CudaRank,
        ranks: Ranks | None = None,
    ):
        """`defines`, `build`: see `CudaBackend`. `transport`: see `runtime.transport`; None takes what the environment
        says. `make` makes each rank's object, in the processes `ranks`.

        Raises UserError with what every rank says that cannot run its part, and RankLost where one ends.
        """
        self.plan, self.context = plan, plan.context
        if make is CudaRank:
            check_gpus(plan.tp)
        wanted = transport or wanted_transport()
        first = "nvshmem" if wanted == "nvshmem" else "peer"
        ahead = begin_compiling(plan, first, defines) if make is CudaRank and build is None else None
        if progress is not None:
            progress(f"starting {plan.tp} ranks", 0, 0)
        self.ranks = ranks or Ranks(plan.tp)
        try:
            self.ranks.open(make, plan, checkpoint, defines, build.cubin if build else None)
            local = self.ranks.local
            local.progress, local.ahead = progress, ahead
            self.ranks.call("prepare", first)
            chosen, why = choose(wanted, self.ranks.call("join", local.unique_id()))
            if chosen != wanted and why:
                print(f"transport: {chosen}, chosen since {why} ({VARIABLE} chooses)", file=sys.stderr)
            self.load(chosen)
        except BaseException:
            self.ranks.kill()
            raise

    def load(self, transport: str) -> None:
        """Loads kernel and weights on every rank, once the ranks have joined; again, for another transport."""
        self.transport = transport
        self.ranks.call("take", transport)
        self.ranks.call("load")
        local, plan = self.ranks.local, self.plan
        self.emitted, self.compiled, self.memory = local.emitted, local.compiled, local.memory
        self.launcher = ParallelLauncher(self.ranks)
        self.description = (
            f"cuda, one persistent kernel on each of {plan.tp} GPUs, {plan.num_sms} SMs, "
            f"{len(self.emitted.step.stages)} stages, context {plan.context}, transport {transport}"
        )
        self._cached: list[int] = []

    def value(self, name: str, tokens: int) -> torch.Tensor:
        """What a tensor holds after the last step, on the CPU; of logits every rank's share of the vocabulary."""
        import torch

        if not split_over_ranks(self.plan, name):
            return self.ranks.local.value(name, tokens)
        return torch.cat(self.ranks.call("value", name, tokens), -1)

    def probe(self, settings: dict[str, Any] | None, trace_steps: int = 0) -> None:
        self.ranks.call("probe", settings, trace_steps)

    def times(self) -> list[np.ndarray]:
        return self.ranks.call("times")

    def copies(self) -> list[np.ndarray]:
        return self.ranks.call("copies")

    def _fill(self, seed: int) -> None:
        self.ranks.call("fill_cache", seed)

    def close(self) -> None:
        self._cached = []
        self.launcher = self.memory = None
        self.ranks.close()


def open_kernel(plan: Plan, checkpoint: Any, progress=None, **how: Any) -> CudaBackend:
    """The plan's kernel on its GPU, or on each of its `plan.tp`. how: see `CudaBackend`."""
    return (ParallelBackend if plan.tp > 1 else CudaBackend)(plan, checkpoint, progress, **how)


class ParallelLauncher:
    """`cuda_launch.Launcher` for all ranks at once."""

    def __init__(self, ranks: Ranks):
        self.ranks, self.local = ranks, ranks.local.launcher
        self.local.while_waiting = self._watch
        self.running = False

    @property
    def steps(self) -> int:
        return self.local.steps

    def start(self, prompt: list[int], position: int, max_new: int, stop: frozenset[int] = frozenset()) -> None:
        if self.running:  # the one before was broken off
            self.finish()
        self.running = True
        self.ranks.call("start", prompt, position, max_new, stop)

    def tokens(self) -> Iterator[int]:
        return self.local.tokens()

    def stop(self) -> None:
        self.local.stop()

    def finish(self) -> int:
        """Waits until the kernels of all ranks have ended. After an abort the ranks can start again together."""
        try:
            ran = set(self.ranks.call("finish"))
        except RankLost as error:
            raise self._blame(error) from None
        except UserError:
            self.ranks.call("reset_events")
            self.running = False
            raise
        self.running = False
        if len(ran) > 1:
            raise RuntimeError(f"the ranks ran different numbers of steps: {sorted(ran)}")
        return ran.pop()

    def elapsed_ms(self) -> float:
        """Of rank 0's kernel, see `Launcher.elapsed_ms`."""
        return self.local.elapsed_ms()

    def _watch(self) -> None:
        """While tokens come: a lost rank has set the abort flag, and the kernel ends; here only what if it does not."""
        self.ranks.check_stuck()

    def _blame(self, lost: RankLost) -> RankLost:
        """With what this rank's kernel was waiting for, if it was running."""
        try:
            self.local.finish()
        except UserError as error:
            return RankLost(f"{lost}; {error.message}")
        except RuntimeError as error:  # the driver's word
            return RankLost(f"{lost}; {str(error).splitlines()[0]}")
        return lost


def begin_compiling(plan: Plan, transport: str, defines: tuple[str, ...]) -> Future[Compiled]:
    """The kernel, which a thread compiles while the other ranks' processes start; they find it in the cache."""
    from concurrent.futures import ThreadPoolExecutor

    from mpk_spec.emit.source import emit

    pool = ThreadPoolExecutor(1, "compiler")
    made = pool.submit(lambda: compile_for(transport, emit(plan), defines))
    pool.shutdown(wait=False)
    return made


def split_over_ranks(plan: Plan, name: str) -> bool:
    """Whether a value is logits of which every rank has a share."""
    nodes = (n for t in plan.steps["decode"].templates for g in t.groups for n in g.nodes)
    return any(n.op == "argmax_partial" and n.inputs[0] == name and n.values["rank_stride"] for n in nodes)


def check_gpus(ranks: int) -> None:
    """Raises NoGpu where there are fewer GPUs than ranks."""
    import torch

    count = torch.cuda.device_count()
    if count < ranks:
        there = "there is none" if count == 0 else f"this machine has {count}"
        raise NoGpu(f"{ranks} ranks need {ranks} GPUs, {there}", instead="--backend cpu runs all ranks in one process")
