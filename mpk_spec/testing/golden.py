"""Golden summaries: what each size's plan looks like, checked in, so that a changed planner shows what it changed."""

from __future__ import annotations

import difflib
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from mpk_spec.errors import UserError

if TYPE_CHECKING:
    from mpk_spec.planner.plan import Plan, Step, Template
    from mpk_spec.schema import Spec


def golden_path(spec: Spec, size: str) -> Path:
    return Path(spec.path).parent / "golden" / spec.name / f"{size}.txt"


def golden_text(plan: Plan) -> str:
    """The plan on a page. Says nothing that another version of transformers would change."""
    lines = [
        f"{plan.spec} {plan.size} on {plan.target}, tp {plan.tp}, batch {plan.batch}, context {plan.context}",
        f"ring {plan.ring_bytes} bytes in chunks of {plan.chunk_bytes}, {plan.num_sms} SMs, "
        f"{plan.all_reduces} sums over ranks",
    ]
    for step in plan.steps.values():
        lines += ["", f"{step.kind}, {step.tokens} tokens: {_counts(step)}"]
        for number, template in enumerate(step.templates):
            lines += _template(step, number, template)
    lines += ["", "buffers"]
    for tensor in plan.tensors.values():
        where = f"{tensor.placement} {tensor.offset}" + (" inbox" if tensor.inbox else "")
        where += f", {tensor.shares}" if tensor.shares != "all" else ""
        lines.append(f"  {tensor.name} {list(tensor.shape)} {tensor.dtype}, {tensor.bytes} bytes at {where}")
    lines += [f"  arena {name}: {size} bytes" for name, size in plan.arena_bytes.items()]
    return "\n".join(lines) + "\n"


def _counts(step: Step) -> str:
    groups = [g for s in step.stages for g in step.templates[s.template].groups]
    events = sum(len(step.templates[s.template].events) for s in step.stages)
    tasks = [t for g in groups for t in g.tasks]
    return (
        f"{len(step.stages)} stages, {len(groups)} groups, {len(tasks)} tasks, {events} events, "
        f"{sum(len(t.waits) for t in tasks)} waits, {sum(t.load_bytes for t in tasks)} bytes streamed"
    )


def _template(step: Step, number: int, template: Template) -> list[str]:
    layers = [s.layer for s in step.stages if s.template == number and s.layer is not None]
    which = f", layers {_ranges(layers)}" if layers else ""
    lines = [f"  {template.name}{which}: {len(template.events)} events, tasks {_fingerprint(template)}"]
    for g in template.groups:
        usual = {"split_k": 1, "kv_splits": 1, "partition": "even", "launch": "static"}
        settings = [f"{key} {getattr(g, key)}" for key, value in usual.items() if getattr(g, key) != value]
        about = [f"grid {list(g.grid)}", f"block {list(g.block)}", f"stages {g.stages}", *settings]
        about += [f"{g.smem_bytes} bytes shared", f"{sum(t.load_bytes for t in g.tasks)} streamed"]
        lines.append(f"    {g.name}: {g.task}, {', '.join(about)}")
        lines.append(f"      {' '.join(n.name for n in g.nodes)}")
    return lines


def _ranges(numbers: list[int]) -> str:
    """`0, 2-4` for 0, 2, 3, 4."""
    found: list[list[int]] = []
    for n in numbers:
        if found and n == found[-1][1] + 1:
            found[-1][1] = n
        else:
            found.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def _fingerprint(template: Template) -> str:
    """Of what the page does not spell out of tasks: spans, waits, signals, who runs them in which order."""
    said = repr(([(g.name, g.tasks) for g in template.groups], sorted(template.events.items()), template.queues,
                 template.loads))  # fmt: skip
    return hashlib.sha256(said.encode()).hexdigest()[:12]


def difference(path: Path, text: str) -> str | None:
    """How the golden file differs from `text`, as a unified diff; None where it does not."""
    if not path.is_file():
        return f"there is no {path}; 'mpk-spec test --update' writes it"
    golden = path.read_text(encoding="utf-8")
    lines = difflib.unified_diff(golden.splitlines(), text.splitlines(), str(path), "now", lineterm="", n=1)
    return "\n".join(lines) or None


def write_golden(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
