"""Weights as one rank holds them: shapes, shares, ties, stacks over experts."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from mpk_spec.ops import REGISTRY
from mpk_spec.ops.base import Axis, TensorType
from mpk_spec.planner.environment import Environment
from mpk_spec.planner.plan import DTYPE_BYTES, Plan, Weight
from mpk_spec.schema import Spec


def bind_weights(spec: Spec, env: Environment) -> tuple[dict[str, Weight], dict[str, TensorType]]:
    """The weights that exist for this config, with their types on one rank."""
    weights: dict[str, Weight] = {}
    types: dict[str, TensorType] = {}
    gains = _gains(spec)
    for name, decl in spec.weights.items():
        path = ("weights", "layer", name) if decl.layer else ("weights", name)
        if decl.when is not None and env.mentions_layer(decl.when):
            env.problems.append(
                spec.problem((*path, "when"), "all layers have the same weights: this cannot depend on the layer")
            )
            continue
        if decl.when is not None and not env.evaluate(decl.when, (*path, "when"), env.names(decl.when, None)):
            continue
        bound = _bind_one(spec, env, name, decl, path, gains)
        if bound is None:
            continue
        weights[name], types[name] = bound
    return weights, types


def _bind_one(spec, env, name, decl, path, gains):
    whole, local, axes = [], [], []
    split_axis, parts, pad = None, 1, 0
    rules = {} if decl.shard == "replicate" else env.split_dims()
    for n, expression in enumerate(decl.shape):
        at = (*path, "shape", n)
        size = env.evaluate(expression, at, env.names(expression, None))
        split = [d for d in expression.names if d in rules and env.parts(d) > 1]
        share = env.evaluate(expression, at, env.names(expression, None, local=True)) if split else size
        if size is None or share is None:
            return None
        if len(split) > 1 or (split and split_axis is not None):
            dims = sorted({*split, *(d for a in axes for d in a.split)})
            message = f"'{name}' would be split along two dims at once: {' and '.join(dims)}"
            if not any(
                "two dims at once" in p.message for p in env.problems
            ):  # other weights are split by the same rules
                env.problems.append(spec.problem(at, message, "only one of them can be split"))
            return None
        if split:
            split_axis, parts = n, env.parts(split[0])
            pad = share * parts - size
            if pad and rules[split[0]] != "split_padded":
                env.problems.append(
                    spec.problem(
                        at, f"'{expression.text}' does not divide as '{split[0]}' does: {size} over {parts} ranks"
                    )
                )
                return None
        whole.append(size)
        local.append(share)
        summed = frozenset(split)
        axes.append(Axis(share, frozenset(expression.names & env.dims.keys()), summed))
    source, dtype = decl.from_, decl.dtype or spec.tensor_default.dtype
    if decl.tie is not None and env.evaluate(decl.tie.when, (*path, "tie", "when"), env.names(decl.tie.when, None)):
        source = spec.weights[decl.tie.to].from_
    kind, offset = gains.get(name, ("linear", 0.0))
    weight = Weight(
        name=name, source=source, shape=tuple(local), full_shape=tuple(whole), dtype=dtype, per_layer=decl.layer,
        stack=next(iter(decl.stack), None) if decl.stack else None, split=split_axis, parts=parts,
        ranks_per_part=env.tp // parts, pad=pad, kind=kind, offset=offset, storage=dict(decl.storage or {}),
    )  # fmt: skip
    return weight, TensorType(tuple(axes))


def _gains(spec: Spec) -> dict[str, tuple[str, float]]:
    """What random weights need to know: gains (of heads or rows), biases, embeddings, what makes queries and keys."""
    found: dict[str, tuple[str, float]] = {}
    for block in [*spec.blocks.values(), spec.layers]:
        attended = {o for op in block.values() if getattr(op, "op", "") == "rope" for o in op.operands()}
        for key, op in block.items():
            name = getattr(op, "op", None)
            if name == REGISTRY["rmsnorm"].op:
                found[op.weight] = ("qk_gain" if key in attended else "gain", float(bool(op.weight_offset)))
            elif name == "embedding":
                found[op.weight] = ("embedding", 0.0)
            elif name == "linear":
                if key in attended:
                    found[op.weight] = ("qk_linear", 0.0)
                if op.bias:
                    found[op.bias] = ("bias", 0.0)
    return found


def layer_bytes(weights: Mapping[str, Weight]) -> int:
    """Of one layer's weights on one rank."""
    return sum(prod(w.shape) * DTYPE_BYTES[w.dtype] for w in weights.values() if w.per_layer)


def count_parameters(weights: dict[str, Weight], layers: int) -> int:
    """Parameters of the whole model, tied ones once."""
    by_source = {w.source: w for w in weights.values()}
    return sum(prod(w.full_shape) * (layers if w.per_layer else 1) for w in by_source.values())


def weight_bytes(plan: Plan) -> int:
    """Bytes of weights that one rank reads for one token: each once, of experts the chosen ones, of tables no row."""
    step = plan.steps["decode"]
    read: dict[tuple, int] = {}
    for stage in step.stages:
        nodes = [n for g in step.templates[stage.template].groups for n in g.nodes]
        choices = {n.output: n.values["k"] for n in nodes if n.op == "top_k"}
        for node in nodes:
            if node.op == "embedding":
                continue
            for name in node.weights.values():
                weight = plan.weights[name]
                share = prod(weight.shape) * DTYPE_BYTES[weight.dtype]
                if weight.stack is not None:
                    share = share // weight.shape[0] * choices[node.inputs[1]]
                read[weight.source, stage.layer if weight.per_layer else None] = share
    return sum(read.values())
