"""Groups + schedule -> groups that tasks can be cut from: splits get their merges and reductions, sampling two stages.

A merge of attention splits is recomputed by the linear that reads it (one hop less), or is a group of its own: where
that costs less, as the attention's settings say, and where something else reads the attention. Of a sample that is
fused with the linear that makes the logits, each of the linear's tasks finds the best of its own; where K is split they
are groups apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from mpk_spec.ops import all_ops
from mpk_spec.ops.base import Axis, TensorType
from mpk_spec.planner.fuse import Fused
from mpk_spec.planner.model import BoundOp, Model
from mpk_spec.planner.schedule import Scheduler, Settings, linear_granule
from mpk_spec.planner.tile import outputs


@dataclass(frozen=True)
class Lowered:
    """A group with its settings. `partial_of` names the linear whose K splits it stores."""

    group: Fused
    settings: Settings


def lower(groups: tuple[Fused, ...], model: Model, scheduler: Scheduler) -> list[Lowered]:
    """In program order. New values get their types in `model.types`."""
    done: list[Lowered] = []
    for group in groups:
        for part, given in _stages_of_sample(group, model, scheduler):
            settings = given or scheduler.resolve(part)
            slots = settings.grid[1] // settings.split_k if part.kind == "linear" else 1
            if slots > 1:
                model.slots |= {v: slots for v in outputs(part, model)}
            if settings.split_k > 1:
                done += _split_linear(part, settings, model, scheduler)
            elif settings.kv_splits > 1:
                part, merge = _split_attention(part, settings, model)
                done += [Lowered(part, settings), Lowered(Fused(merge.name, (merge,)), settings)]
            else:
                done.append(Lowered(part, settings))
    return _place_merges(done, scheduler)


def _stages_of_sample(group: Fused, model: Model, scheduler: Scheduler) -> list[tuple[Fused, Settings | None]]:
    """`sample` -> argmax of slices, then of the slices' results (of all ranks). With settings, where they are known."""
    op = group.ops[-1]
    if op.op.op != "sample":
        return [(group, None)]
    head, settings = replace(group, ops=group.ops[:-1]), None
    if head.body:
        settings = scheduler.resolve(head)
        if settings.split_k == 1:
            partial = _partial(op, settings.grid[0], linear_granule(head, settings.partition), model)
            return [(replace(group, ops=(*head.ops, partial)), settings), (_reduce(op, partial), None)]
    features = model.types[op.inputs[0]].features
    unit = -(-features // min(scheduler.target.num_sms, -(-features // 16)))
    partial = _partial(op, -(-features // unit), unit, model)
    alone = [(head, settings)] if head.ops else []
    return [*alone, (Fused(partial.name, (partial,)), None), (_reduce(op, partial), None)]


def _partial(op: BoundOp, slices: int, unit: int, model: Model) -> BoundOp:
    """The first stage of a sample."""
    logits = op.inputs[0]
    kind = model.types[logits]
    split = bool(kind.axes[0].split)
    values = {
        "slices": slices,
        "unit": unit,
        "vocab": kind.features,
        "valid": _vocab(logits, model),
        "rank_stride": kind.features if split else 0,
    }
    made = all_ops()["argmax_partial"](argmax_partial=logits, **values)
    name = f"{op.name}.partial"
    model.types[name] = replace(made.infer([kind], {}, {}), partial=split)
    return BoundOp(name, made, (logits,), name, {}, values, path=op.path)


def _reduce(op: BoundOp, partial: BoundOp) -> Fused:
    """The second stage."""
    values = {"slices": partial.values["slices"]}
    made = all_ops()["argmax_reduce"](argmax_reduce=partial.name, **values)
    return Fused(op.name, (BoundOp(op.name, made, (partial.name,), op.output, {}, values, path=op.path),))


def _vocab(logits: str, model: Model) -> int:
    """Rows of the weight that made the logits, before any padding."""
    maker = next((o for s in model.sections for o in s.ops if o.output == logits), None)
    if maker is None or "weight" not in maker.weights:
        return model.types[logits].features
    return model.weights[maker.weights["weight"]].full_shape[0]


def _split_linear(group: Fused, settings: Settings, model: Model, scheduler: Scheduler) -> list[Lowered]:
    """`NAME` stores `splits` partial sums, `NAME.reduce` adds them up and does the epilogue."""
    linear = group.body[0]
    kind = model.types[linear.output]
    stored = f"{linear.output}.splits"
    model.types[stored] = TensorType((Axis(settings.split_k), Axis(kind.features)), dtype="f32", partial=kind.partial)
    op = all_ops()["split_k_reduce"](split_k_reduce=stored, splits=settings.split_k, features=kind.features)
    values = {"splits": settings.split_k, "features": kind.features}
    reduce = BoundOp(f"{linear.name}.reduce", op, (stored,), linear.output, {}, values, path=linear.path)
    first = replace(group, ops=(*group.prologue, replace(linear, output=stored)))
    second = Fused(f"{group.name}.reduce", (reduce, *group.epilogue))
    return [Lowered(first, settings), Lowered(second, scheduler.resolve(second))]


def _split_attention(group: Fused, settings: Settings, model: Model) -> tuple[Fused, BoundOp]:
    attention = group.body[0]
    heads, head_dim = model.types[attention.output].shape
    stored = f"{attention.output}.splits"
    model.types[stored] = TensorType((Axis(settings.kv_splits), Axis(heads), Axis(head_dim + 2)), dtype="f32")
    values = {"kv_splits": settings.kv_splits, "heads": heads, "head_dim": head_dim}
    op = all_ops()["attention_merge"](attention_merge=stored, **values)
    merge = BoundOp(f"{attention.name}.merge", op, (stored,), attention.output, {}, values, path=attention.path)
    ops = tuple(replace(o, output=stored) if o is attention else o for o in group.ops)
    return replace(group, ops=ops), merge


def _place_merges(groups: list[Lowered], scheduler: Scheduler) -> list[Lowered]:
    """Moves each merge into the one linear group that reads it, or gives it settings of its own."""
    done = list(groups)
    for attention, item in pairwise(groups):
        if item.group.ops[0].op.op != "attention_merge":
            continue
        host = _only_reader(done, item.group.ops[0].output)
        if host is None:
            attention = _merged_apart(done, attention, scheduler)
        if attention.settings.kv_merge == "fused":
            done[done.index(host)] = Lowered(replace(host.group, ops=(*item.group.ops, *host.group.ops)), host.settings)
            done.remove(item)
        else:
            done[done.index(item)] = Lowered(item.group, scheduler.resolve(item.group))
    return done


def _only_reader(groups: list[Lowered], value: str) -> Lowered | None:
    """The linear group that can merge the value's splits: the only one that reads it, with no prologue of its own."""
    readers = [g for g in groups if value in g.group.inputs]
    alone = len(readers) == 1 and readers[0].group.kind == "linear" and not readers[0].group.prologue
    return readers[0] if alone else None


def _merged_apart(done: list[Lowered], attention: Lowered, scheduler: Scheduler) -> Lowered:
    """The attention with settings that say so; what a rule says otherwise goes to the scheduler's problems."""
    pin = scheduler.pins(attention.group.name).get("kv_merge")
    if pin and pin[0] == "fused" and pin[1][3] != "*":
        said = f"'{attention.group.name}' is not read by one linear alone, which could merge its splits"
        scheduler.problems.append(scheduler.spec.problem(pin[1], said, "write 'auto' or 'apart'"))
    apart = Lowered(attention.group, replace(attention.settings, kv_merge="apart"))
    done[done.index(attention)] = apart
    return apart
