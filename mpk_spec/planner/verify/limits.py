"""Properties of a plan that need no order: its queues hold every task once, spans tile their tensors, sizes fit."""

from __future__ import annotations

from collections import Counter
from math import prod

from mpk_spec.planner.plan import Group, Plan, Template
from mpk_spec.planner.targets import find_target
from mpk_spec.planner.verify.report import Report, some

MAX_WAITS = 128
"""Waits of one task: its scheduler is a warp, whose 32 lanes look at one each, and then at the next. The last task of a
step waits for all events of a layer, with 64 KV heads some 70."""
ALIGNMENT = 16
"""Bytes; what bulk copies and 128-bit loads need."""
MAX_THREADS, WARP = 1024, 32


def check_plan(plan: Plan, report: Report) -> bool:
    """Arenas, tensors, ring and stages. False where stages name no template."""
    target = find_target(plan.target)
    for tensor in plan.tensors.values():
        arena = plan.arena_bytes.get(tensor.placement, 0)
        if tensor.offset % ALIGNMENT:
            report.add(f"tensor '{tensor.name}' lies at byte {tensor.offset}, not a multiple of {ALIGNMENT}")
        if tensor.offset < 0 or tensor.offset + tensor.bytes > arena:
            end = tensor.offset + tensor.bytes
            report.add(f"tensor '{tensor.name}' ends at byte {end} of the {tensor.placement} arena, which has {arena}")
    device = sum(size for place, size in plan.arena_bytes.items() if place != "host")
    if device > target.memory_bytes:
        report.add(f"the arenas take {device} bytes, {target.title} has {target.memory_bytes}")
    if plan.chunk_bytes % ALIGNMENT:
        report.add(f"chunks of {plan.chunk_bytes} bytes are not a multiple of {ALIGNMENT}")
    sound = True
    for kind, step in plan.steps.items():
        for index, stage in enumerate(step.stages):
            if not 0 <= stage.template < len(step.templates):
                report.add(f"{kind}: stage {index} has template {stage.template} of {len(step.templates)}")
                sound = False
        if not step.stages:
            report.add(f"{kind}: no stages")
            sound = False
    return sound


def check_template(plan: Plan, kind: str, template: Template, report: Report) -> bool:
    """Everything about one template. False where its queues are too broken to reason about order."""
    where = f"{kind}, template '{template.name}'"
    sound = True
    for group in template.groups:
        _check_group(plan, f"{where}, group '{group.name}'", group, report)
        sound &= _check_spans(plan, f"{where}, group '{group.name}'", group, report)
    sound &= _check_queues(plan, where, template, report)
    return sound and _check_loads(plan, where, template, report)


def _check_group(plan: Plan, where: str, group: Group, report: Report) -> None:
    target = find_target(plan.target)
    if prod(group.grid) != len(group.tasks):
        report.add(f"{where}: grid {list(group.grid)} has {prod(group.grid)} blocks for {len(group.tasks)} tasks")
    threads = prod(group.block)
    if threads > MAX_THREADS or threads % WARP or threads <= 0:
        report.add(f"{where}: block {list(group.block)} has {threads} threads; at most {MAX_THREADS}, whole warps")
    if group.smem_bytes + plan.ring_bytes > target.smem_bytes:
        need = f"{group.smem_bytes} bytes of its own and a ring of {plan.ring_bytes}"
        report.add(f"{where}: shared memory: {need} exceed the {target.smem_bytes} of {target.title}")
    for place, task in enumerate(group.tasks):
        if task.index != place:
            report.add(f"{where}: task {place} has index {task.index}", where, "index")
        if len(task.waits) > MAX_WAITS:
            report.add(f"{where}, task {place}: {len(task.waits)} waits, at most {MAX_WAITS}", where, "waits")
        if task.load_bytes > task.load_chunks * plan.chunk_bytes:
            said = f"{task.load_bytes} bytes in {task.load_chunks} chunks of {plan.chunk_bytes}"
            report.add(f"{where}, task {place}: loads {said}", where, "chunks")


def extent(plan: Plan, tensor: str) -> int | None:
    """The extent of a tensor, state or step input; None for a name that is none of them."""
    if tensor in plan.states:
        return plan.states[tensor].extent
    found = plan.tensors.get(tensor) or plan.tensors.get(plan.feeds.get(tensor, ""))
    return found.extent if found else None


def _check_spans(plan: Plan, where: str, group: Group, report: Report) -> bool:
    """Spans lie in their tensors (False if not), and the tasks' writes tile each output exactly."""
    sound = True
    written: dict[str, list[tuple[int, int, int]]] = {name: [] for name in group.outputs if name in plan.tensors}
    for task in group.tasks:
        for span, verb in [(s, "reads") for s in task.reads] + [(s, "writes") for s in task.writes]:
            size = extent(plan, span.tensor)
            if size is None and verb == "reads" and span.tensor in plan.weights:
                continue
            if size is None or (verb == "writes" and span.tensor in plan.feeds):
                sound = False
                report.add(
                    f"{where}, task {task.index}: {verb} '{span.tensor}', which is no tensor", where, span.tensor
                )
            elif not 0 <= span.lo < span.hi <= size:
                sound = False
                said = f"{verb} '{span.tensor}' [{span.lo}, {span.hi}) of {size}"
                report.add(f"{where}, task {task.index}: {said}", where, span.tensor, verb)
            if verb == "writes" and size is not None:
                written.setdefault(span.tensor, []).append((span.lo, span.hi, task.index))
    for tensor, spans in written.items():
        size = extent(plan, tensor) or 0
        if spans and tensor in plan.tensors and plan.tensors[tensor].routed:
            # a step of fewer tokens claims fewer experts; that nothing beyond is read is the hazards' business
            size = max(hi for _, hi, _ in spans)
        _check_tiling(where, tensor, size, sorted(spans), report)
    return sound


def _check_tiling(where: str, tensor: str, size: int, spans: list[tuple[int, int, int]], report: Report) -> None:
    end = 0
    for lo, hi, task in [*spans, (size, size, -1)]:
        if lo > end:
            report.add(f"{where}: no task writes '{tensor}' [{end}, {lo})", where, tensor, "gap")
        elif lo < end and task >= 0:
            report.add(f"{where}: task {task} writes '{tensor}' [{lo}, {min(end, hi)}) twice", where, tensor, "twice")
        end = max(end, hi)


def _check_queues(plan: Plan, where: str, template: Template, report: Report) -> bool:
    """Each static task in one queue, each pool in all."""
    if len(template.queues) != plan.num_sms or len(template.loads) != plan.num_sms:
        lists = f"{len(template.queues)} queues and {len(template.loads)} load lists"
        report.add(f"{where}: {lists} for {plan.num_sms} SMs")
        return False
    sound = True
    seen: Counter[tuple[int, int]] = Counter()
    for sm, queue in enumerate(template.queues):
        seen.update(queue)
        for entry in set(queue):
            if not _valid(template, entry):
                report.add(f"{where}: the queue of SM {sm} has {list(entry)}, which is no task of it", where, "entry")
                sound = False
            elif entry[1] < 0 and queue.count(entry) > 1:
                name = template.groups[entry[0]].name
                report.add(f"{where}: the queue of SM {sm} has the pool of '{name}' twice", where, "pool twice")
                sound = False
    for g, group in enumerate(template.groups):
        if group.launch == "dynamic":
            without = [sm for sm, queue in enumerate(template.queues) if (g, -1) not in queue]
            if without and group.tasks:
                report.add(f"{where}: the pool of '{group.name}' is not in the queues of SMs {some(without)}")
                sound = False
            continue
        for task in range(len(group.tasks)):
            times = seen[(g, task)]
            if times != 1:
                said = f"is queued {times} times" if times else "is in no queue"
                report.add(f"{where}: {group.name}[{task}] {said}", where, group.name, "queued")
                sound = False
    return sound


def _valid(template: Template, entry: tuple[int, int]) -> bool:
    g, task = entry
    if not 0 <= g < len(template.groups):
        return False
    group = template.groups[g]
    return task == -1 if group.launch == "dynamic" else 0 <= task < len(group.tasks)


def _check_loads(plan: Plan, where: str, template: Template, report: Report) -> bool:
    """An SM's loader streams the weights of exactly what its workers will run, pools included."""
    if any(t.load_chunks for g in template.groups for t in g.tasks) and plan.ring_stages < 1:
        report.add(f"{where}: tasks load through a ring of {plan.ring_bytes} bytes, chunks have {plan.chunk_bytes}")
        return False
    sound = True
    for sm, (queue, loads) in enumerate(zip(template.queues, template.loads, strict=False)):
        want = Counter(e for e in queue if _valid(template, e) and loaded(template, e))
        got = Counter(loads)
        if want == got:
            continue
        sound = False
        for entry in (want - got) or (got - want):
            name = f"{template.groups[entry[0]].name}[{entry[1]}]" if _valid(template, entry) else str(list(entry))
            said = "runs it and never loads it" if want[entry] > got[entry] else "loads it and does not run it as often"
            report.add(f"{where}: {name}: SM {sm} {said}", where, "loads", said)
    return sound


def loaded(template: Template, entry: tuple[int, int]) -> bool:
    """Whether a queue entry has weights to load: a task with chunks, a pool with such tasks."""
    tasks = template.groups[entry[0]].tasks
    return any(t.load_chunks for t in tasks) if entry[1] < 0 else tasks[entry[1]].load_chunks > 0
