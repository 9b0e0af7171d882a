"""Tensors that lie twice: what the kernel works out by itself, and a plan must not contradict.

Which copy a write goes to follows from counting: layers 0, 1, ... in order for what every layer writes, steps for what
is written once in a step. And of all that is written somebody looks at everything, so that whoever comes after the
readers comes after the end of the writers, not after their first values.
"""

from __future__ import annotations

from math import prod

from mpk_spec.planner.plan import Plan, Step, Tensor
from mpk_spec.planner.verify.report import Report

BYTES = {"bf16": 2, "f16": 2, "f32": 4, "i32": 4}


def check_copies(plan: Plan, report: Report) -> None:
    turning = [t for t in plan.tensors.values() if t.turns > 1]
    tokens = max(step.tokens for step in plan.steps.values())
    for tensor in turning:
        if tensor.turns != 2:
            report.add(f"'{tensor.name}' has {tensor.turns} copies: writes take turns with two")
        size = tokens * prod(tensor.shape) * BYTES[tensor.dtype] * (plan.tp if tensor.inbox else 1)
        if tensor.bytes < tensor.turns * size:
            report.add(f"two copies of '{tensor.name}' take {2 * size} bytes, it has {tensor.bytes}")
    for kind, step in plan.steps.items():
        layers = [s.layer for s in step.stages if s.layer is not None]
        first = next((n for n, s in enumerate(step.stages) if s.layer is not None), 0)
        together = [s.layer for s in step.stages[first : first + len(layers)]]
        if layers != list(range(len(layers))) or together != layers:
            report.add(f"{kind}: values cross as data, and its layers are not 0, 1, ... one after the other")
        for tensor in turning:
            _check_writes(step, tensor, len(layers), report)
            _check_seen(step, tensor, report)


def _check_writes(step: Step, tensor: Tensor, layers: int, report: Report) -> None:
    written = [s.layer for s in step.stages if any(tensor.name in g.outputs for g in step.templates[s.template].groups)]
    wanted = list(range(layers)) if tensor.per == "layer" else written[:1]
    if written != wanted or not written:
        often = "once in every layer" if tensor.per == "layer" else "once in a step"
        report.add(f"{step.kind}: '{tensor.name}' crosses as data, and is not written {often} and nowhere else")


def _check_seen(step: Step, tensor: Tensor, report: Report) -> None:
    """Of what is written (if not published by the way) readers look at all, in every layer that has readers."""
    after = step.templates[step.stages[-1].template]
    templates = [step.templates[n] for n in {s.template for s in step.stages if s.layer is not None}]
    templates += [after] if any(tensor.name in g.outputs for g in after.groups) else []
    if any(tensor.name in g.published for t in templates for g in t.groups):
        return
    found = [{s for g in t.groups for k in g.tasks for s in k.reads if s.tensor == tensor.name} for t in templates]
    for spans in filter(None, found):
        end = 0
        for span in sorted(spans, key=lambda s: s.lo):
            if span.lo > end:
                break
            end = max(end, span.hi)
        if end < tensor.extent:
            report.add(f"{step.kind}: nobody looks at '{tensor.name}' from {end} on, which crosses as data")
