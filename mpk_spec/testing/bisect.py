"""Which operator's numbers are wrong: every value of one step, ours against the plan's meaning in float32.

The plan is made without fusions, so that every value is a tensor. An operator whose error is much larger than
that of what it reads is where something goes wrong; what comes after it only inherits the error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from mpk_spec.errors import UserError, did_you_mean
from mpk_spec.ops.base import without_rounding

if TYPE_CHECKING:
    import torch

    from mpk_spec.planner.plan import Node, Plan
    from mpk_spec.schema import Spec
    from mpk_spec.testing.defects import Defect
    from mpk_spec.weights import Checkpoint

JUMP = 16.0  # times the error of the inputs; peaked attention amplifies an honest rounding error up to tenfold
ROUNDING = 2.0**-8  # of a bf16 value
SEED = 0


@dataclass(frozen=True)
class Entry:
    """An operator in a layer: the relative error of its value and of the worst value that it reads."""

    operator: str
    layer: int | None
    op: str
    error: float
    inputs: float

    @property
    def place(self) -> str:
        return self.operator if self.layer is None else f"{self.operator}@{self.layer}"

    @property
    def jumps(self) -> bool:
        return not self.error <= JUMP * max(self.inputs, ROUNDING)


@dataclass(frozen=True)
class Bisection:
    """Entries in order of computation. `tokens` were run; `left`: those whose experts are the same in both runs."""

    title: str
    entries: tuple[Entry, ...]
    tokens: int
    left: int
    against: str = "float32"

    @property
    def first(self) -> Entry | None:
        """The first operator that adds an error of its own."""
        return next((entry for entry in self.entries if entry.jumps), None)

    @property
    def passed(self) -> bool:
        return self.first is None

    @property
    def reason(self) -> str:
        entry = self.first
        if entry is None:
            return "no operator adds an error of its own"
        found = "is not a number" if math.isinf(entry.error) else f"has a relative error of {entry.error:.2g}"
        return f"'{entry.place}' ({entry.op}) {found}, what it reads {entry.inputs:.2g}"

    def page(self) -> list[str]:
        lines = [self.title, f"relative errors of {self.tokens} tokens' values, ours against {self.against}", ""]
        lines.append(f"{'operator':<28}{'op':<16}{'error':>10}{'inputs':>10}")
        for e in self.entries:
            mark = "  jumps" if e.jumps else ""
            lines.append(f"{e.place:<28}{e.op:<16}{e.error:>10.2g}{e.inputs:>10.2g}{mark}")
        if self.left < self.tokens:
            lines += [
                "",
                f"{self.tokens - self.left} tokens chose other experts on the way and were left out from there",
            ]
        return [*lines, "", f"first: {self.reason}"]

    def data(self) -> dict:
        entries = [{**asdict(e), "error": e.error if math.isfinite(e.error) else None} for e in self.entries]
        first = self.first.place if self.first else None
        return {"model": self.title, "tokens": self.tokens, "left": self.left, "against": self.against,
                "first": first, "entries": entries}  # fmt: skip


def bisect(
    spec: Spec,
    size: str | None,
    checkpoint: Checkpoint,
    stop_after: str = "all",
    tp: int = 1,
    tokens: int = 64,
    defect: Defect | None = None,
) -> Bisection:
    """Runs one prefill step of `tokens` random ids with and without roundings and compares up to `stop_after`.

    stop_after: an operator (`attention.qr`, of the first layer; `attention.qr@5`, of layer 5) or `all`.
    defect: planted in the run with roundings. Raises UserError for an operator that does not exist.
    """
    import torch

    from mpk_spec.testing.yardstick import count_parameters, threads_for
    from mpk_spec.weights import text_config

    vocab = text_config(checkpoint.config)["vocab_size"]
    ids = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(SEED))
    true_plan = _plan(spec, size, checkpoint, tokens, tp, None)
    last = _find(true_plan, stop_after)
    planted = f", planted: {defect.says}" if defect else ""
    title = f"{spec.name} {size or 'checkpoint'}, weights {checkpoint.source}, tp {tp}{planted}"
    with threads_for(count_parameters(checkpoint)):
        with without_rounding():
            truth = {key: value for key, _, value in _values(true_plan, checkpoint, ids, None, last)}
        ours = _values(_plan(spec, size, checkpoint, tokens, tp, defect), checkpoint, ids, defect, last)
        return _compared(title, truth, ours, tokens)


def _plan(spec: Spec, size: str | None, checkpoint: Checkpoint, tokens: int, tp: int, defect: Defect | None) -> Plan:
    """A plan of one chunk without fusions; rules of the schedule may name fusions and go too."""
    from mpk_spec.planner import plan_for

    changed = replace(spec if defect is None else defect.spec(spec), fusions={}, schedule=[])
    made = plan_for(
        checkpoint,
        changed,
        size,
        target="cpu",
        tp=tp,
        context=tokens,
        chunk=tokens,
        steps=("decode", "prefill"),
        verified=False,
    )
    return made if defect is None else defect.plan(made)


Key = tuple[str, int | None]  # operator, layer


def _find(plan: Plan, stop_after: str) -> Key | None:
    """Where to stop; None for the end."""
    if stop_after == "all":
        return None
    name, _, layer = stop_after.partition("@")
    keys = [(node.name, stage.layer) for stage, node in _nodes(plan)]
    if not layer.isdecimal() and layer:
        raise UserError(f"'{layer}' in '{stop_after}' is no layer", "write it as in attention.qr@5")
    wanted = next((key for key in keys if key[0] == name and layer in ("", str(key[1]))), None)
    if wanted is None and name in {key[0] for key in keys}:
        raise UserError(f"operator '{name}' has no layer {layer}")
    if wanted is None:
        raise UserError(f"there is no operator '{name}'", did_you_mean(name, {key[0] for key in keys}, "operators"))
    return wanted


def _nodes(plan: Plan) -> Iterator[tuple[Any, Node]]:
    step = plan.steps["prefill"]
    for stage in step.stages:
        for group in step.templates[stage.template].groups:
            yield from ((stage, node) for node in group.nodes)


def _values(
    plan: Plan, checkpoint: Any, ids: torch.Tensor, defect: Defect | None, last: Key | None
) -> Iterator[tuple[Key, Node, torch.Tensor]]:
    """Every stored value of one prefill step as rank 0 holds it, right after its operator has run."""
    import torch

    from mpk_spec.reference.evaluate import GroupRun
    from mpk_spec.reference.executor import Executor, StepInput

    executor = Executor(plan, checkpoint if defect is None else defect.weights(checkpoint, plan))
    if defect is not None and defect.executor is not None:
        executor = defect.executor(executor)
    positions = torch.arange(len(ids))
    step_input = StepInput(ids, positions, torch.zeros_like(positions), False)
    for rank in executor.ranks:
        rank.allocate(len(ids))
        rank.buffers["token_ids"] = ids[:, None]
        rank.rows = None
    step = plan.steps["prefill"]
    with torch.inference_mode():
        for stage in step.stages:
            for group in step.templates[stage.template].groups:
                for rank in executor.ranks:
                    GroupRun(rank, group, stage.layer).run(step_input)
                node = group.nodes[-1]
                buffer = executor.ranks[0].buffers.get(node.output)
                if buffer is not None:
                    yield (node.name, stage.layer), node, buffer.clone()
                if (node.name, stage.layer) == last:
                    return


def _compared(title: str, truth: dict[Key, torch.Tensor], ours: Iterator, tokens: int) -> Bisection:
    import torch

    entries: list[Entry] = []
    errors: dict[str, float] = {}  # by value; a layer's replace those of the layer before
    kept = torch.ones(tokens, dtype=torch.bool)
    for (name, layer), node, value in ours:
        true = truth.get((name, layer))
        if true is None or true.dtype == torch.int32 or true.shape != value.shape:
            continue
        inputs = max((errors.get(i, 0.0) for i in node.inputs), default=0.0)
        if node.op == "top_k":  # where a near tie falls the other way, all that follows differs
            half = true.shape[-1] // 2
            kept &= (true[..., :half] == value[..., :half]).all(-1)
        axis = 1 if value.dim() == 3 and value.shape[1] == tokens and value.shape[0] != tokens else 0
        rows = kept.nonzero()[:, 0]
        errors[node.output] = relative_error(true.index_select(axis, rows), value.index_select(axis, rows))
        entries.append(Entry(name, layer, node.op, errors[node.output], inputs))
    return Bisection(title, tuple(entries), tokens, int(kept.sum()))


def relative_error(true: torch.Tensor, value: torch.Tensor) -> float:
    """|value - true| / |true| in the Euclidean norm; infinite where a value is not a number."""
    error = ((value - true).norm() / true.norm().clamp(min=1e-30)).item()
    return error if math.isfinite(error) else math.inf
