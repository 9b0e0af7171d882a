"""Planted defects: what a wrong kernel, packer or cache would do. A comparison that lets one pass is worth nothing.

Each is a change to data that any backend takes: to the spec (an operator dropped or given another parameter, then
planned and proved as usual), to the weights as they are read (a packing gone wrong), or to what the executor holds
beside the plan (rope tables, cache pages).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mpk_spec.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from mpk_spec.ops import Op
    from mpk_spec.planner.plan import Node, Plan
    from mpk_spec.reference.executor import Executor
    from mpk_spec.schema import Spec

EPS = 0.05  # what "wrong eps" norms with; see there


@dataclass(frozen=True)
class Defect:
    """A named mistake. `applies` says whether a spec has what goes wrong; each change leaves its input alone."""

    name: str
    says: str
    applies: Callable[[Spec], bool] = lambda spec: True
    spec: Callable[[Spec], Spec] = lambda spec: spec
    plan: Callable[[Plan], Plan] = lambda plan: plan
    weights: Callable[[Any, Plan], Any] = lambda checkpoint, plan: checkpoint
    executor: Callable[[Executor], Any] | None = None


DEFECTS: dict[str, Defect] = {}


def _plant(name: str, says: str, **changes) -> None:
    DEFECTS[name] = Defect(name, says, **changes)


def find_defect(name: str) -> Defect:
    if name not in DEFECTS:
        raise UserError(f"there is no defect '{name}'", did_you_mean(name, DEFECTS, "defects"))
    return DEFECTS[name]


def defects_of(spec: Spec) -> list[Defect]:
    """Those that can happen to this spec."""
    return [defect for defect in DEFECTS.values() if defect.applies(spec)]


# ---- the spec: operators dropped or changed

Address = tuple[str, str]  # (block, value), with "layers" as the block of the top level


def operators(spec: Spec) -> dict[Address, Op]:
    found = {(block, key): op for block, entries in spec.blocks.items() for key, op in entries.items()}
    return found | {("layers", key): op for key, op in spec.layers.items() if hasattr(op, "operands")}


def drop_operators(spec: Spec, dropped: Iterable[Address]) -> Spec:
    """Without these operators: the first operand of each takes its place, as where its `when:` is false."""
    from mpk_spec.schema import expression_of

    never = expression_of(False)
    return replace(spec, op_when={**spec.op_when, **dict.fromkeys(dropped, never)})


def change_operators(spec: Spec, change: Callable[[Address, Op], dict[str, Any]]) -> Spec:
    """`change` gives the fields of each operator that become something else."""

    def changed(block: str, entries: dict[str, Op]) -> dict[str, Op]:
        return {
            key: op.model_copy(update=change((block, key), op)) if hasattr(op, "operands") else op
            for key, op in entries.items()
        }

    blocks = {name: changed(name, entries) for name, entries in spec.blocks.items()}
    return replace(spec, blocks=blocks, layers=changed("layers", spec.layers))


def _ropes(spec: Spec) -> list[Address]:
    return [at for at, op in operators(spec).items() if op.op == "rope"]


def _head_norms(spec: Spec) -> list[Address]:
    """Norms of queries and keys: those whose value is turned by a rope."""
    turned = {(at[0], op.operands()[0]) for at, op in operators(spec).items() if op.op == "rope"}
    return [at for at, op in operators(spec).items() if op.op == "rmsnorm" and at in turned]


def _lose_residual(at: Address, op: Op) -> dict[str, Any]:
    """A block's sum without what came into the block."""
    is_residual = op.op == "add" and "x" in op.operands() and len(op.operands()) > 1
    return {"inputs": [name for name in op.operands() if name != "x"]} if is_residual else {}


_plant(
    "no-rope",
    "queries and keys are not turned by their positions",
    applies=lambda spec: bool(_ropes(spec)),
    spec=lambda spec: drop_operators(spec, _ropes(spec)),
)
_plant(
    "no-qk-norm",
    "queries and keys are not normalised",
    applies=lambda spec: bool(_head_norms(spec)),
    spec=lambda spec: drop_operators(spec, _head_norms(spec)),
)
_plant(
    "lost-residual",
    "a block's result replaces its input instead of being added to it",
    spec=lambda spec: change_operators(spec, _lose_residual),
)
# Where activations are near 1, an eps of 1e-5 in place of 1e-6 changes nothing that bf16 could show, in any model.
# This one is about what adding eps outside of the root, or to the sum in place of the mean, comes to.
_plant(
    "wrong-eps",
    f"norms add an eps of {EPS}",
    spec=lambda spec: change_operators(spec, lambda at, op: {"eps": EPS} if op.op == "rmsnorm" else {}),
)


# ---- the weights: packed or read wrongly


class ChangedWeights:
    """A checkpoint of which some tensors read as something else. `changes`: name -> function of the whole tensor."""

    def __init__(self, checkpoint: Any, changes: dict[str, Callable]):
        self._checkpoint, self._changes = checkpoint, changes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def on(self, device: Any) -> ChangedWeights:
        from mpk_spec.weights import on_device

        return ChangedWeights(on_device(self._checkpoint, device), self._changes)

    def read(self, name: str, slices: tuple[slice, ...] | None = None):
        if name not in self._changes:
            return self._checkpoint.read(name, slices)
        whole = self._changes[name](self._checkpoint.read(name))
        return whole if slices is None else whole[tuple(slices)]


def _tensors_of(plan: Plan, checkpoint: Any, wanted: Callable[[Node], str | None]) -> list[str]:
    """Names in the checkpoint of the weights that `wanted` picks from the plan's operators, all layers."""
    from mpk_spec.reference.state import find_prefix, source_names

    prefix = find_prefix(plan, set(checkpoint.names()), checkpoint)
    step = next(iter(plan.steps.values()))
    found: dict[str, None] = {}
    for stage in step.stages:
        for node in (n for g in step.templates[stage.template].groups for n in g.nodes):
            name = wanted(node)
            if name is not None:
                found |= dict.fromkeys(source_names(plan.weights[name], stage.layer, prefix))
    return list(found)


def _swap_heads(checkpoint: Any, plan: Plan) -> ChangedWeights:
    """The first two query heads change places; attention's output projection stays as it is."""
    head_dim = next(iter(plan.states.values())).head_dim
    queries = _query_weights(plan)
    names = _tensors_of(plan, checkpoint, lambda n: n.weights["weight"] if n.weights.get("weight") in queries else None)

    def swapped(weight):
        import torch

        return torch.cat((weight[head_dim : 2 * head_dim], weight[:head_dim], weight[2 * head_dim :]))

    return ChangedWeights(checkpoint, dict.fromkeys(names, swapped))


def _query_weights(plan: Plan) -> set[str]:
    """Weights of the linears that queries come from."""
    nodes = [n for s in plan.steps.values() for t in s.templates for g in t.groups for n in g.nodes]
    maker = {n.output: n for n in nodes}
    found = set()
    for node in nodes:
        if node.op == "attention":
            while node.op != "linear":
                node = maker[node.inputs[0]]
            found.add(node.weights["weight"])
    return found


def _lose_gains(checkpoint: Any, plan: Plan) -> ChangedWeights:
    """The gain before the MLP (of the last norm in a layer that a linear reads) counts as 1."""
    nodes = [n for t in next(iter(plan.steps.values())).templates for g in t.groups for n in g.nodes]
    gains = [n for n in nodes if n.op == "rmsnorm" and plan.weights[n.weights["weight"]].per_layer]
    read = {i for n in nodes if n.op == "linear" for i in n.inputs}
    lost = [n for n in gains if n.output in read][-1].weights["weight"]
    names = _tensors_of(plan, checkpoint, lambda n: lost if n.weights.get("weight") == lost else None)
    one = 1.0 - plan.weights[lost].offset
    return ChangedWeights(checkpoint, dict.fromkeys(names, lambda gain: gain.new_full(gain.shape, one)))


_plant("swapped-heads", "two query heads change places in the packed weights", weights=_swap_heads)
_plant("missing-gain", "a norm's gain is left out", weights=_lose_gains)


# ---- what the executor holds: rope tables, cache pages


def _name_queries_apart(plan: Plan) -> Plan:
    """Gives the ropes of queries tables of their own: the same parameters in another order have another name."""
    queries = _query_ropes(plan)

    def renamed(node: Node) -> Node:
        if node.output not in queries:
            return node
        return replace(node, values={**node.values, "parameters": dict(reversed(node.values["parameters"].items()))})

    return map_nodes(plan, renamed)


def _query_ropes(plan: Plan) -> set[str]:
    queries = {n.inputs[0] for n in _nodes(plan) if n.op == "attention"}
    return {n.output for n in _nodes(plan) if n.op == "rope"} & queries


def _late_tables(executor: Executor) -> Executor:
    """The queries' tables one position late; the last row, which no position past the context would follow, twice."""
    from mpk_spec.reference.evaluate import rope_key

    queries = _query_ropes(executor.plan)
    late = {rope_key(n) for n in _nodes(executor.plan) if n.output in queries}
    for rank in executor.ranks:
        assert late <= rank.rope.keys()  # else nothing would be planted
        rank.rope = {
            key: tuple(table[[*range(1, len(table)), -1]] for table in tables) if key in late else tables
            for key, tables in rank.rope.items()
        }
    return executor


def _nodes(plan: Plan) -> list[Node]:
    return [n for s in plan.steps.values() for t in s.templates for g in t.groups for n in g.nodes]


def map_nodes(plan: Plan, change: Callable[[Node], Node]) -> Plan:
    """The plan with every operator changed by `change`."""
    steps = {
        kind: replace(
            step,
            templates=tuple(
                replace(
                    t, groups=tuple(replace(g, nodes=tuple(change(n) for n in g.nodes)) for g in t.groups)
                )
                for t in step.templates
            ),
        )
        for kind, step in plan.steps.items()
    }  # fmt: skip
    return replace(plan, steps=steps)


class PageLost:
    """An executor whose first cache page comes back empty: after every step it is zeros, as fresh memory is."""

    def __init__(self, executor: Executor):
        self._executor = executor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def run(self, *arguments, **options) -> None:
        self._executor.run(*arguments, **options)
        for rank in self._executor.ranks:
            for name, cache in rank.caches.items():
                page = self._executor.plan.states[name].page
                for store in (cache.keys, cache.values):
                    store[..., :page, :].nan_to_num_(0.0).zero_()


_plant(
    "late-position",
    "queries are turned by their position + 1",
    applies=lambda spec: bool(_ropes(spec)),
    plan=_name_queries_apart,
    executor=_late_tables,
)
_plant("lost-page", "the first page of the KV cache is empty for later steps", executor=PageLost)
