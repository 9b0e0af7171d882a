"""The CUDA backend: prompt and answer in a single launch of the plan's kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mpk_spec.errors import UserError
from mpk_spec.planner.plan import Plan

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mpk_spec.runtime.built import Build
    from mpk_spec.runtime.cuda_probe import Probe


class CudaBackend:
    """`runtime.backend.Backend` over the persistent kernel; one sequence. Needs torch with CUDA."""

    name = "cuda"

    def __init__(
        self,
        plan: Plan,
        checkpoint: Any,
        progress=None,
        *,
        defines: tuple[str, ...] = (),
        build: Build | None = None,
        whole_gpu: bool = True,
        share: CudaBackend | None = None,
    ):
        """Compiles (or finds) the kernel, checks that all fits into memory, packs the weights.

        defines: macros of a build for profiling or testing, see `cuda_probe`. whole_gpu: see `KernelModule`.
        build: the kernel of a folder that `mpk-spec build` made of `plan`; nothing is compiled then.
        share: a backend of the same checkpoint; its packed weights are used where they lie as this plan's.
        Raises UserError for a machine, a driver or a plan that the kernel cannot run on.
        """
        from mpk_spec.emit.source import emit
        from mpk_spec.runtime.cuda_device import admit, find_device, memory_runs_out
        from mpk_spec.runtime.cuda_launch import KernelModule, Launcher, Memory
        from mpk_spec.runtime.cuda_weights import load_weights, weights_lie_alike

        device = find_device()
        self.plan, self.context = plan, plan.context
        self.emitted = build.emitted if build else emit(plan)
        cubin = build.cubin if build else self._compile(defines, progress)
        module = KernelModule(self.emitted, cubin, device.index or 0, whole_gpu=whole_gpu)
        shared = share is not None and weights_lie_alike(share.emitted.layout, self.emitted.layout)
        admit(self.emitted, device, has_weights=shared)
        with memory_runs_out():
            weights = (
                share.launcher.weights
                if shared
                else load_weights(plan, self.emitted.layout, checkpoint, device, progress)
            )
            self.memory = Memory(self.emitted, device)
        self.launcher = Launcher(self.emitted, module, self.memory, weights)
        self.description = (
            f"cuda, one persistent kernel on {plan.num_sms} SMs, {len(self.emitted.step.stages)} stages, "
            f"context {plan.context}"
        )
        self._cached: list[int] = []

    def _compile(self, defines: tuple[str, ...], progress) -> bytes:
        from mpk_spec.emit.compiler import compile_kernel
        from mpk_spec.planner.targets import find_target
        from mpk_spec.runtime.cuda_probe import check_defines

        check_defines(self.plan, defines)
        if progress is not None:
            progress("compiling the kernel", 0, 0)
        self.compiled = compile_kernel(self.plan.name, self.emitted.source, find_target(self.plan.target).arch, defines)
        return self.compiled.cubin

    @property
    def vocab_size(self) -> int:
        table = next(w for w in self.plan.weights.values() if w.kind == "embedding")
        return table.full_shape[0]

    def stream(self, ids: Sequence[int], *, max_new_tokens: int, stop: frozenset[int] = frozenset()) -> Iterator[int]:
        if not ids:
            raise UserError("there is nothing to continue: no token ids were given")
        if len(ids) > self.context:
            raise UserError(f"{len(ids)} tokens do not fit a context of {self.context}", "a larger context: -c")
        if max_new_tokens < 1:
            return
        known = _common(self._cached, ids[:-1])
        fresh = list(ids[known:])
        self._cached = list(ids[:known])
        self.launcher.start(fresh, known, max_new_tokens, stop)
        made: list[int] = []
        try:
            for token in self.launcher.tokens():
                made.append(token)
                yield token
        finally:
            self.launcher.stop()
            self._end(list(ids), made)

    def _end(self, ids: list[int], made: list[int]) -> None:
        """Waits for the launch's end; the cache then holds all but the last token."""
        self._cached = []
        self.launcher.finish()
        count = int(self.memory.ring[0])
        tokens = [int(t) for t in self.memory.ring[32 : 32 + count]]
        if count:  # else the prompt was cut short: forget it
            self._cached = (ids + tokens)[:-1]

    def logits(self, ids: Sequence[int], *, last: int | None = None, alone: int = 0) -> torch.Tensor:
        """See `Backend.logits`. What comes before the `last` is one launch; then each step is, to read its logits."""
        import torch

        from mpk_spec.runtime.backend import pieces

        if len(ids) > self.context:
            raise UserError(f"{len(ids)} tokens do not fit a context of {self.context}", "a larger context: -c")
        self.reset()
        chunk, parts = max(s.tokens for s in self.plan.steps.values()), []
        unread = len(ids) - (len(ids) if last is None else last)
        if unread:
            self.launcher.start(list(ids[:unread]), 0, 0)
            self.launcher.finish()
        for lo, hi in pieces(unread, len(ids), chunk, alone):
            self.launcher.start(list(ids[lo:hi]), lo, 0)
            self.launcher.finish()
            parts.append(self.value("logits", hi - lo)[:, : self.vocab_size].cpu())
        return torch.cat(parts)

    def value(self, name: str, tokens: int, layer: int | None = None) -> torch.Tensor:
        """What a tensor of the plan holds after the last step, float32 (ids: int32) `[tokens, extent]`, on the GPU.

        layer: of a step that was stopped in it, instead.
        """
        step = self.launcher.steps - (layer is None)
        last = self.emitted.layout.layers - 1
        return value_of(self.plan, self.memory, name, tokens, step, last if layer is None else layer)

    def fill_cache(self, count: int, seed: int = 0) -> list[int]:
        """Random keys and values everywhere, as if the `count` ids that it returns had been read.

        For timing at long contexts: reading a prompt of that length would take longer than what is timed.
        """
        self._fill(seed)
        self._cached = [(17 + 31 * n) % self.vocab_size for n in range(count)]
        return list(self._cached)

    def _fill(self, seed: int) -> None:
        fill_cache(self.memory, seed)

    def probe(self, settings: dict[str, Any] | None, trace_steps: int = 0) -> None:
        """Of a build for profiling or testing: the next launches have a `Probe` with these settings; None: none."""
        self.launcher.probe = make_probe(self.emitted, self.memory, settings, trace_steps)

    def times(self) -> list[np.ndarray]:
        """Of every rank the `cuda_probe.TIMES` that its probe has recorded."""
        return [self.launcher.probe.times()]

    def copies(self) -> list[np.ndarray]:
        """Of every rank the `cuda_probe.COPIES` of the same steps."""
        return [self.launcher.probe.copies()]

    def reset(self) -> None:
        self._cached = []

    def close(self) -> None:
        self._cached = []
        del self.launcher, self.memory


def value_of(plan: Plan, memory, name: str, tokens: int, step: int = 0, layer: int = 0) -> torch.Tensor:
    """See `CudaBackend.value`; of an inbox with slots, float32 `[ranks, tokens, extent]`.

    step, layer: of the last write, which says which of two copies it went to.
    """
    import torch

    tensor = plan.tensors[name]
    layers = sum(s.layer is not None for s in plan.steps["decode"].stages)
    writes, copy = step if tensor.per == "step" else step * layers + layer, tensor.bytes // tensor.turns
    offset = tensor.offset + writes % tensor.turns * copy
    if tensor.inbox:
        held = memory.symmetric["inbox"][offset : offset + copy].view(torch.float32)
        held = held.view(plan.tp if tensor.slots else 1, -1)[:, : tokens * tensor.extent]
        values = held.unflatten(1, (tokens, -1)).clone()
        return values if tensor.slots else values[0]
    dtype = {"bf16": torch.bfloat16, "f32": torch.float32, "i32": torch.int32}[tensor.dtype]
    size = tokens * tensor.extent * torch.empty((), dtype=dtype).element_size()
    values = memory.arena[offset : offset + size].view(dtype).view(tokens, -1)
    return values.clone() if tensor.dtype != "bf16" else values.float()


def make_probe(emitted, memory, settings: dict[str, Any] | None, trace_steps: int = 0) -> Probe | None:
    """A `Probe` for launches that work in `memory`, with these of its fields set; None for None."""
    from mpk_spec.runtime.cuda_probe import Probe

    if settings is None:
        return None
    probe = Probe(emitted, memory.arena.device, trace_steps=trace_steps)
    for name, value in settings.items():
        setattr(probe, name, value)
    return probe


def fill_cache(memory, seed: int) -> None:
    """See `CudaBackend.fill_cache`."""
    import torch

    cache = memory.cache.view(torch.bfloat16)
    cache.normal_(generator=torch.Generator(cache.device).manual_seed(seed))
    torch.cuda.synchronize()


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n
