"""The CUDA backend: prompt and answer in a single launch of the plan's kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mpk_spec.errors import UserError
from mpk_spec.planner.plan import Plan

if TYPE_CHECKING:
    import torch

SPARE_BYTES = 512 << 20  # what the driver, the loading of weights and torch itself take


class CudaBackend:
    """`runtime.backend.Backend` over the persistent kernel; one sequence. Needs torch with CUDA."""

    name = "cuda"

    def __init__(
        self, plan: Plan, checkpoint: Any, progress=None, *, defines: tuple[str, ...] = (), whole_gpu: bool = True
    ):
        """Compiles (or finds) the kernel, checks that all fits into memory, packs the weights.

        defines: macros of a build for profiling or testing, see `cuda_probe`. whole_gpu: see `KernelModule`.
        Raises UserError for a machine, a driver or a plan that the kernel cannot run on.
        """
        from mpk_spec.emit.compiler import compile_kernel
        from mpk_spec.emit.source import emit
        from mpk_spec.planner.targets import find_target
        from mpk_spec.runtime.cuda_launch import KernelModule, Launcher, Memory
        from mpk_spec.runtime.cuda_weights import load_weights

        device = find_device()
        self.plan, self.context = plan, plan.context
        self.emitted = emit(plan)
        if progress is not None:
            progress("compiling the kernel", 0, 0)
        self.compiled = compile_kernel(plan.name, self.emitted.source, find_target(plan.target).arch, defines)
        module = KernelModule(self.emitted, self.compiled.cubin, whole_gpu=whole_gpu)
        admit(self.emitted, device)
        weights = load_weights(plan, self.emitted.layout, checkpoint, device, progress)
        self.memory = Memory(self.emitted, device)
        self.launcher = Launcher(self.emitted, module, self.memory, weights)
        self.description = (
            f"cuda, one persistent kernel on {plan.num_sms} SMs, {len(self.emitted.step.stages)} stages, "
            f"context {plan.context}"
        )
        self._cached: list[int] = []

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

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        import torch

        if len(ids) > self.context:
            raise UserError(f"{len(ids)} tokens do not fit a context of {self.context}", "a larger context: -c")
        self.reset()
        chunk, parts = max(s.tokens for s in self.plan.steps.values()), []
        for start in range(0, len(ids), chunk):
            part = list(ids[start : start + chunk])
            self.launcher.start(part, start, 0)
            self.launcher.finish()
            parts.append(self.value("logits", len(part))[:, : self.vocab_size].cpu())
        return torch.cat(parts)

    def value(self, name: str, tokens: int) -> torch.Tensor:
        """What a tensor of the plan holds after the last step, float32 (ids: int32) `[tokens, extent]`, on the GPU."""
        import torch

        tensor = self.plan.tensors[name]
        dtype = {"bf16": torch.bfloat16, "f32": torch.float32, "i32": torch.int32}[tensor.dtype]
        size = tokens * tensor.extent * torch.empty((), dtype=dtype).element_size()
        values = self.memory.arena[tensor.offset : tensor.offset + size].view(dtype).view(tokens, -1)
        return values.clone() if tensor.dtype != "bf16" else values.float()

    def reset(self) -> None:
        self._cached = []

    def close(self) -> None:
        self._cached = []
        del self.launcher, self.memory


def find_device() -> torch.device:
    """The GPU that torch sees; UserError where there is none."""
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        raise UserError(
            "there is no usable NVIDIA GPU here" if built else "this torch is built without CUDA",
            "--backend cpu runs the same plan on the CPU",
        )
    torch.cuda.synchronize()  # makes the device's context current, which the driver calls need
    return torch.device("cuda", torch.cuda.current_device())


def admit(emitted, device) -> None:
    """Raises UserError, saying what context would fit, unless weights, cache and activations fit into free memory."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    plan, layout = emitted.plan, emitted.layout
    fixed = layout.weight_bytes + sum(plan.arena_bytes.values()) + SPARE_BYTES
    if fixed + layout.cache_bytes <= free:
        return
    per_position = layout.cache_bytes / plan.context
    fits = int((free - fixed) / per_position) // 64 * 64
    gib = 1 << 30
    message = (
        f"the model needs {fixed / gib:.1f} GiB and its cache {layout.cache_bytes / gib:.1f} GiB "
        f"at context {plan.context}, "
        f"the GPU has {free / gib:.1f} of {total / gib:.1f} GiB free"
    )
    raise UserError(message, f"a context of {fits} fits: -c {fits}" if fits > 0 else "a smaller model would fit")


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n
