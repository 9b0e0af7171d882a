"""Partial values (each rank holds an addend) are summed over the ranks once, before anything else uses them."""

from __future__ import annotations

from mpk_spec.planner.plan import Node, Plan
from mpk_spec.planner.verify.report import Report

KEEPS_PARTIAL = frozenset({"combine", "split_k_reduce"})
"""Operators that are sums themselves: a sum of addends is an addend of the sum."""


def check_partial(plan: Plan, kind: str, report: Report) -> None:
    """Follows each value of a step from the product that makes it partial to its all-reduce."""
    if plan.tp == 1:
        return
    step = plan.steps[kind]
    partial: set[str] = set()
    elsewhere: set[str] = set()
    for stage in step.stages:
        template = step.templates[stage.template]
        for group in template.groups:
            for node in group.nodes:
                where = f"{kind}, template '{template.name}', group '{group.name}': {node.op} '{node.name}'"
                wrong = _check_node(plan, node, partial, elsewhere)
                if wrong:
                    report.add(f"{where} {wrong}")
    left = sorted(partial & set(plan.feeds.values()))
    if left:
        report.add(f"{kind}: '{left[0]}', which feeds the next step, differs between ranks")


def _check_node(plan: Plan, node: Node, partial: set[str], elsewhere: set[str]) -> str | None:
    """Updates `partial` and `elsewhere` (rows of split experts) by one operator; what is wrong with it, if anything."""
    addends = [name for name in node.inputs if name in partial]
    rows = [name for name in node.inputs if name in elsewhere]
    partial.discard(node.output)
    elsewhere.discard(node.output)
    if (node.op == "linear" and _splits_experts(plan, node)) or (rows and node.op == "gated_act"):
        elsewhere.add(node.output)
    elif rows and node.op == "combine":
        addends += rows
    elif rows:
        return f"uses '{rows[0]}', whose rows of other ranks' experts are missing here"
    if node.op == "all_reduce":
        partial.difference_update(addends)
        return None if addends else f"sums '{node.inputs[0]}' over the ranks, which is whole already"
    if node.op in KEEPS_PARTIAL:
        partial.update({node.output} if addends else ())
        return None
    if addends:
        what = "adds to" if node.op == "add" else "uses"
        return f"{what} '{addends[0]}' on every rank before it is summed over the ranks"
    if node.op == "linear" and _splits_k(plan, node):
        partial.add(node.output)
        if "bias" in node.weights and not plan.weights[node.weights["bias"]].once:
            return "adds its bias on every rank"
    return None


def _splits_experts(plan: Plan, node: Node) -> bool:
    weight = plan.weights.get(node.weights.get("weight", ""))
    return weight is not None and weight.parts > 1 and weight.stack is not None and weight.split == 0


def _splits_k(plan: Plan, node: Node) -> bool:
    weight = plan.weights.get(node.weights.get("weight", ""))
    return weight is not None and weight.parts > 1 and weight.split == len(weight.full_shape) - 1
