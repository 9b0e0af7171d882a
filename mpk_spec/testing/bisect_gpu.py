"""Which operator of the kernel goes wrong first: what lies in the GPU's memory, against the reference of the same plan.

The kernel is built so that a step can end after any group (runtime/stop_after.cuh), since the arena's bytes are used
again by later groups. One launch for each group; the reference runs the same groups, with the same rounding points.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from mpk_spec.errors import UserError, did_you_mean
from mpk_spec.testing.bisect import SEED, Bisection, Entry, relative_error

if TYPE_CHECKING:
    import torch

    from mpk_spec.planner.plan import Group, Node, Plan
    from mpk_spec.runtime.cuda_backend import CudaBackend
    from mpk_spec.schema import Spec
    from mpk_spec.testing.defects import Defect
    from mpk_spec.weights import Checkpoint

STOP_AFTER = "MPK_STOP_AFTER=1"
STOP = "megakernel_stop"
RUN_ON = 0xFFFFFFFF


Values = list[dict[str, "torch.Tensor"]]
"""By rank and tensor: float32 `[tokens, extent]`, of an inbox `[ranks, tokens, extent]`."""


class Stopped(Protocol):
    """What can be asked for the values that a group leaves."""

    def values(self, stage: int, group: int, names: tuple[str, ...]) -> Values:
        """Right after that group of the examined step."""


class StoppedKernel:
    """The kernel, built to stop. The examined step is that of the last chunk of `ids`, run again for each group."""

    def __init__(self, backend: CudaBackend, ids: list[int]):
        self.backend = backend
        self.start = examined(backend.plan, len(ids))
        self.ids = ids[self.start :]
        if self.start:
            backend.launcher.start(ids[: self.start], 0, 0)
            backend.launcher.finish()

    def values(self, stage: int, group: int, names: tuple[str, ...]) -> Values:
        launcher = self.backend.launcher
        launcher.module.write(STOP, (stage, group))
        launcher.start(self.ids, self.start, 0)
        launcher.finish()
        launcher.module.write(STOP, (RUN_ON, RUN_ON))
        layer = layer_of(self.backend.plan, stage)
        found = {name: self.backend.value(name, len(self.ids), layer).cpu() for name in names}
        launcher.reset_events()  # the rest of the step has not signalled
        return [found]


class StoppedRanks(StoppedKernel):
    """The kernels of all ranks, each with what it holds. A rank that ends first is written to by those that do not."""

    def values(self, stage: int, group: int, names: tuple[str, ...]) -> Values:
        ranks = self.backend.ranks
        ranks.call("write", STOP, (stage, group))
        ranks.call("start", self.ids, self.start, 0, frozenset())
        ranks.call("finish")
        ranks.call("write", STOP, (RUN_ON, RUN_ON))
        layer = layer_of(self.backend.plan, stage)
        by_name = {name: ranks.call("value", name, len(self.ids), layer) for name in names}
        ranks.call("reset_events")
        return [{name: by_name[name][rank] for name in names} for rank in range(self.backend.plan.tp)]


def examined(plan: Plan, count: int) -> int:
    """The first position of the last chunk of `count` tokens."""
    chunk = plan.steps["prefill"].tokens
    return (count - 1) // chunk * chunk


def bisect_gpu(
    spec: Spec,
    size: str | None,
    checkpoint: Checkpoint,
    stop_after: str = "all",
    tokens: int = 64,
    defect: Defect | None = None,
    progress=None,
    tp: int = 1,
) -> Bisection:
    """Runs `tokens` random ids on the GPUs and compares the last step's values up to `stop_after`, of every rank.

    stop_after: an operator (`attention.o`, of the first layer; `attention.o@5`, of layer 5) or `all`: the group that it
    is fused into. defect: planted in the packed weights of one GPU. UserError for an operator that does not exist.
    """
    import torch

    from mpk_spec.runtime.parallel_backend import open_kernel
    from mpk_spec.runtime.select import plan_for_gpu
    from mpk_spec.weights import text_config

    if defect is not None and tp > 1:
        raise UserError(f"'{defect.name}' is planted in the kernel of one GPU", "--tp 1, or --backend cpu")
    plan = plan_for_gpu(spec, size, checkpoint, max(tokens, 64), tp)
    last = find_group(plan, stop_after)
    vocab = text_config(checkpoint.config)["vocab_size"]
    ids = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(SEED)).tolist()
    if defect is not None and (defect.executor or defect.spec(spec) is not spec or defect.plan(plan) is not plan):
        raise UserError(f"'{defect.name}' is no defect of packed weights, the only ones planted here", "--backend cpu")
    weights = checkpoint if defect is None else defect.weights(checkpoint, plan)
    backend = open_kernel(plan, weights, progress, defines=(STOP_AFTER,))
    planted = f", planted: {defect.says}" if defect else ""
    title = f"{spec.name} {size or 'checkpoint'}, weights {checkpoint.source}, {backend.description}{planted}"
    try:
        kernel = (StoppedRanks if tp > 1 else StoppedKernel)(backend, ids)
        return compare(title, plan, on_host(checkpoint), ids, kernel, last, progress)
    finally:
        backend.close()


def find_group(plan: Plan, stop_after: str) -> tuple[int, int] | None:
    """(stage, group) that computes an operator; None for the end."""
    if stop_after == "all":
        return None
    name, _, layer = stop_after.partition("@")
    if layer and not layer.isdecimal():
        raise UserError(f"'{layer}' in '{stop_after}' is no layer", "write it as in attention.o@5")
    step, known = plan.steps["prefill"], set()
    for s, stage in enumerate(step.stages):
        for g, group in enumerate(step.templates[stage.template].groups):
            names = {group.name, *(node.name for node in group.nodes)}
            known |= names
            if name in names and layer in ("", str(stage.layer)):
                return s, g
    if name in known:
        raise UserError(f"operator '{name}' has no layer {layer}")
    raise UserError(f"there is no operator '{name}'", did_you_mean(name, known, "operators"))


def on_host(checkpoint: Any) -> Any:
    """For the reference: the checkpoint in the host's memory; random weights are drawn on the GPU, which is sooner."""
    import torch

    from mpk_spec.weights import on_device

    if not torch.cuda.is_available():
        return checkpoint
    return _OnHost(on_device(checkpoint, "cuda"))


class _OnHost:
    def __init__(self, checkpoint: Any):
        self._checkpoint = checkpoint

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def read(self, name: str, slices=None) -> torch.Tensor:
        return self._checkpoint.read(name, slices).cpu()


def compare(
    title: str,
    plan: Plan,
    checkpoint: Any,
    ids: list[int],
    kernel: Stopped,
    last: tuple[int, int] | None,
    progress=None,
) -> Bisection:
    """Group by group, the kernel's values against the reference's; of several ranks the worst counts."""
    entries: list[Entry] = []
    errors: dict[str, float] = {}  # by tensor; a layer's replace those of the layer before
    groups = sum(len(plan.steps["prefill"].templates[s.template].groups) for s in plan.steps["prefill"].stages)
    start = examined(plan, len(ids))
    for number, (place, layer, group, true) in enumerate(reference(plan, checkpoint, ids)):
        if progress is not None:
            progress("comparing groups", number, groups)
        inputs = max((errors.get(name, 0.0) for name in group.inputs), default=0.0)
        if names := tuple(true[0]):
            ours = kernel.values(*place, names)
            made = {node.output: node for node in group.nodes}
            for name in names:
                node = _maker(made, name)
                errors[name] = max(
                    relative_error(
                        *(_comparable(plan, group, node, _owned(plan, name, held[name], rank), start) for held in both)
                    )
                    for rank, both in enumerate(zip(true, ours, strict=True))
                )
                entries.append(Entry(node.name, layer, node.op, errors[name], inputs))
        if place == last:
            break
    return Bisection(title, tuple(entries), len(ids) - start, len(ids) - start, "the reference of the same plan")


def reference(
    plan: Plan, checkpoint: Any, ids: list[int]
) -> Iterator[tuple[tuple[int, int], int | None, Group, Values]]:
    """((stage, group), layer, group, its float outputs) of the step of the last chunk, as the plan means them."""
    import torch

    from mpk_spec.reference.evaluate import GroupRun
    from mpk_spec.reference.executor import Executor, StepInput

    executor = Executor(plan, checkpoint)
    ranks, step, start = executor.ranks, plan.steps["prefill"], examined(plan, len(ids))
    with torch.inference_mode():
        for lo in range(0, start, step.tokens):
            executor.run("prefill", _input(StepInput, ids[lo : lo + step.tokens], lo))
        given = _input(StepInput, ids[start:], start)
        for rank in ranks:
            rank.allocate(len(given.ids))
            rank.buffers["token_ids"] = given.ids[:, None]
            rank.rows = None
        for s, stage in enumerate(step.stages):
            for g, group in enumerate(step.templates[stage.template].groups):
                for rank in ranks:
                    GroupRun(rank, group, stage.layer).run(given)
                ids = {n.output for n in group.nodes if n.op in ("argmax_partial", "argmax_reduce")}
                names = [name for name in group.outputs if name not in ids]  # near ties may fall either way
                held = [{name: rank.buffers[name].clone() for name in names} for rank in ranks]
                yield (s, g), stage.layer, group, held


def _input(step_input, ids: list[int], start: int):
    import torch

    positions = torch.arange(start, start + len(ids))
    return step_input(torch.tensor(ids), positions, torch.zeros_like(positions), False)


def _maker(made: dict[str, Node], tensor: str) -> Node:
    """The operator whose value a tensor holds. Buffers that take turns have names of their own."""
    return made[tensor] if tensor in made else list(made.values())[-1]


def layer_of(plan: Plan, stage: int) -> int:
    """The layer that a stage of a prefill step belongs to, or comes after."""
    layers = [s.layer for s in plan.steps["prefill"].stages[: stage + 1] if s.layer is not None]
    return layers[-1] if layers else 0


def _owned(plan: Plan, name: str, value: torch.Tensor, rank: int) -> torch.Tensor:
    """Of addends that each rank sums a share of, what is sent to this one."""
    tensor = plan.tensors[name]
    if tensor.shares != "scattered":
        return value
    share = tensor.extent // plan.tp
    return value[..., rank * share : (rank + 1) * share]


def _comparable(plan: Plan, group: Group, node: Node, value: torch.Tensor, start: int) -> torch.Tensor:
    """An attention's splits added up: which maximum they are relative to is the kernel's own business."""
    if node.op != "attention" or group.kv_splits == 1:
        return value
    state = plan.states[node.values["state"]]
    return merged(value, group.kv_splits, node.values["heads"], state.head_dim, state.kv_block, start)


def merged(value: torch.Tensor, splits: int, heads: int, head_dim: int, block: int, start: int) -> torch.Tensor:
    """`[tokens, splits * heads * (head_dim + 2)]`, sums with maximum and weight, to `[tokens, heads * head_dim]`.

    Splits that saw no position of a token hold whatever lay there before, and do not count.
    """
    import torch

    parts = value.unflatten(1, (splits, heads, head_dim + 2))
    positions = torch.arange(start, start + len(value))
    live = (torch.arange(splits) <= positions[:, None] // block)[:, :, None]  # [tokens, splits, 1]
    sums, peak, total = parts[..., :head_dim], parts[..., head_dim], parts[..., head_dim + 1]
    peak = peak.masked_fill(~live, float("-inf"))
    weight = (peak - peak.amax(1, keepdim=True)).exp()
    top = (sums.masked_fill(~live[..., None], 0.0) * weight[..., None]).sum(1)
    bottom = (total.masked_fill(~live, 0.0) * weight).sum(1)
    return (top / bottom[..., None]).flatten(1)
