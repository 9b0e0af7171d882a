"""Planted defects: each takes a good plan, a step kind and a stage, and spoils that stage alone.

A stage's template is cloned first where other stages share it. A defect that does not fit the stage raises `Unfit`.
`DYNAMIC` ones make some execution read a wrong value or stand still; the others break a limit or a rule.
"""

from __future__ import annotations

from dataclasses import replace

from plans import edit_group, edit_tasks, edit_template

from mpk_spec.planner.plan import Node, Plan, Span, Task, Template, Wait
from mpk_spec.planner.targets import find_target


class Unfit(Exception):
    """This defect does not exist at this place."""


def template_of(plan: Plan, kind: str, stage: int) -> Template:
    step = plan.steps[kind]
    return step.templates[step.stages[stage].template]


def _group(template: Template, name: str):
    return next((g for g in template.groups if g.name == name), None)


def _last_group(template: Template) -> str:
    return template.groups[-1].name


def _sms_of(template: Template, name: str) -> set[int]:
    g = [x.name for x in template.groups].index(name)
    return {sm for sm, queue in enumerate(template.queues) for group, _ in queue if group == g}


def _recount(template: Template, event: str, by: int) -> Template:
    """All counts of an event of this stage changed alike, so that thresholds still agree."""
    for group in template.groups:
        template = edit_tasks(
            template,
            group.name,
            lambda t: replace(
                t,
                waits=tuple(
                    replace(w, count=w.count + by) if w.event == event and w.stage == 0 else w for w in t.waits
                ),
            ),
        )
    return replace(template, events={**template.events, event: template.events[event] + by})


# Order


def dropped_event(plan: Plan, kind: str, stage: int) -> Plan:
    """The last group of the stage with waits for tasks of several SMs waits for nothing."""
    template = template_of(plan, kind, stage)
    name = _last_group(template)
    if plan.num_sms < 2 or (len(_group(template, name).tasks) < 2 and name != "sample"):
        raise Unfit
    return edit_template(plan, kind, stage, lambda t: edit_tasks(t, name, lambda task: replace(task, waits=())))


def dropped_entry(plan: Plan, kind: str, stage: int) -> Plan:
    """The first tasks of a stage do not wait for the stage before."""
    template = template_of(plan, kind, stage)
    name = template.groups[0].name
    if plan.num_sms < 2 or len(template.groups[0].tasks) < 2:
        raise Unfit
    return edit_template(plan, kind, stage, lambda t: edit_tasks(t, name, lambda task: replace(task, waits=())))


def dropped_signal(plan: Plan, kind: str, stage: int) -> Plan:
    """One task does not signal: the wait never ends."""
    group = template_of(plan, kind, stage).groups[-1]
    event, last = f"{group.name}.done", len(group.tasks) - 1

    def change(task: Task) -> Task:
        return replace(task, signals=tuple(s for s in task.signals if s != event)) if task.index == last else task

    return edit_template(plan, kind, stage, lambda t: edit_tasks(t, group.name, change))


def unseen_task(plan: Plan, kind: str, stage: int) -> Plan:
    """One task does not signal and nobody counts on it: thresholds agree, its result is not waited for."""
    template = template_of(plan, kind, stage)
    name = {"embed": None, "head": "head"}.get(template.name, "gate_up")
    if name is None or plan.num_sms < 2 or len(_group(template, name).tasks) < 2:
        raise Unfit
    group = _group(template, name)
    event = f"{name}.done"
    crosses = plan.tp if template.events[event] == plan.tp * len(group.tasks) else 1

    def change(t: Template) -> Template:
        last = len(group.tasks) - 1  # the last on its SM: none after it speaks for it
        t = edit_tasks(t, name, lambda task: replace(task, signals=()) if task.index == last else task)
        return _recount(t, event, -crosses)

    return edit_template(plan, kind, stage, change)


def _threshold(plan: Plan, kind: str, stage: int, by: int) -> Plan:
    template = template_of(plan, kind, stage)
    name = next(g.name for g in reversed(template.groups) if g.tasks[0].waits)

    def change(task: Task) -> Task:
        first = replace(task.waits[0], count=task.waits[0].count + by)
        return replace(task, waits=(first, *task.waits[1:]))

    return edit_template(plan, kind, stage, lambda t: edit_tasks(t, name, change))


def threshold_too_high(plan: Plan, kind: str, stage: int) -> Plan:
    return _threshold(plan, kind, stage, 1)


def threshold_too_low(plan: Plan, kind: str, stage: int) -> Plan:
    return _threshold(plan, kind, stage, -1)


def swapped_queue(plan: Plan, kind: str, stage: int) -> Plan:
    """On one SM a task comes before the one whose result it waits for."""

    def change(template: Template) -> Template:
        for sm, queue in enumerate(template.queues):
            static = [e for e in queue if e[1] >= 0]
            if static and static[0][0] < static[-1][0] and (static[-1][0] >= 2 or template.name == "head"):
                new = [static[-1], *(e for e in queue if e != static[-1])]
                loads = [e for e in new if e in template.loads[sm]]
                return replace(
                    template,
                    queues=_at(template.queues, sm, tuple(new)),
                    loads=_at(template.loads, sm, tuple(loads)),
                )
        raise Unfit

    return edit_template(plan, kind, stage, change)


def _at(items: tuple, index: int, value) -> tuple:
    return (*items[:index], value, *items[index + 1 :])


def wait_cycle(plan: Plan, kind: str, stage: int) -> Plan:
    """The first group also waits for the last."""
    template = template_of(plan, kind, stage)
    if len(template.groups) < 2:
        raise Unfit
    event = f"{_last_group(template)}.done"
    wait = Wait(event, template.events[event])
    name = template.groups[0].name
    return edit_template(
        plan, kind, stage, lambda t: edit_tasks(t, name, lambda task: replace(task, waits=(*task.waits, wait)))
    )


def pool_cycle(plan: Plan, kind: str, stage: int) -> Plan:
    """A pool task waits for work that comes after the pool on some SM: stuck if that SM claims it."""
    template = template_of(plan, kind, stage)
    pool = next((g for g in template.groups if g.launch == "dynamic"), None)
    if pool is None:
        raise Unfit
    number = template.groups.index(pool)
    sm = next(sm for sm, q in enumerate(template.queues) if q[-1][1] >= 0 and q[-1][0] > number)
    group, task = template.queues[sm][-1]

    def change(t: Template) -> Template:
        late = t.groups[group].name
        t = edit_tasks(t, late, lambda x: replace(x, waits=(), signals=(*x.signals, "late")) if x.index == task else x)
        cross = plan.tp if template.events[f"{late}.done"] > len(template.groups[group].tasks) else 1
        wait = Wait("late", cross)
        t = edit_tasks(t, pool.name, lambda x: replace(x, waits=(*x.waits, wait)) if x.index == 0 else x)
        return replace(t, events={**t.events, "late": cross})

    return edit_template(plan, kind, stage, change)


def ring_deadlock(plan: Plan, kind: str, stage: int) -> Plan:
    """The loader fills the ring for the SM's last task first."""
    stages = plan.ring_bytes // plan.chunk_bytes

    def change(template: Template) -> Template:
        for sm, loads in enumerate(template.loads):
            static = [e for e in loads if e[1] >= 0]
            if len(static) >= 2:
                last = static[-1]
                order = (last, *(e for e in loads if e != last))
                changed = replace(template, loads=_at(template.loads, sm, order))
                name = template.groups[last[0]].name
                return edit_tasks(
                    changed, name, lambda t, n=last[1]: replace(t, load_chunks=stages) if t.index == n else t
                )
        raise Unfit

    return edit_template(plan, kind, stage, change)


# Memory


def _rename(template: Template, old: str, new: str) -> Template:
    def renamed(spans):
        return tuple(replace(s, tensor=new) if s.tensor == old else s for s in spans)

    for group in template.groups:
        template = edit_group(
            template, group.name, lambda g: replace(g, outputs=tuple(new if o == old else o for o in g.outputs))
        )
        template = edit_tasks(
            template, group.name, lambda t: replace(t, reads=renamed(t.reads), writes=renamed(t.writes))
        )
    return template


def _overlap(plan: Plan, kind: str, stage: int, name: str, victim: str) -> Plan:
    """In this stage `name` lies on the bytes of `victim`."""
    scratch = replace(plan.tensors[name], name="scratch", offset=plan.tensors[victim].offset)
    arenas = {**plan.arena_bytes}
    arenas[scratch.placement] = max(arenas[scratch.placement], scratch.offset + scratch.bytes)
    plan = replace(plan, tensors={**plan.tensors, "scratch": scratch}, arena_bytes=arenas)
    return edit_template(plan, kind, stage, lambda t: _rename(t, name, "scratch"))


def overlapping_buffers(plan: Plan, kind: str, stage: int) -> Plan:
    """A layer's attention result lies on the residual, which is read after it."""
    if _group(template_of(plan, kind, stage), "attend") is None:
        raise Unfit
    return _overlap(plan, kind, stage, "parts", "r0")


def overlapping_inboxes(plan: Plan, kind: str, stage: int) -> Plan:
    """The two inboxes of a layer lie on each other: a fast rank writes the second while a slow one reads the first."""
    if plan.tp == 1 or _group(template_of(plan, kind, stage), "attend") is None:
        raise Unfit
    return _overlap(plan, kind, stage, "o_in", "d_in")


def read_before_append(plan: Plan, kind: str, stage: int) -> Plan:
    """The keys of this step are appended after the attention has read the cache."""
    template = template_of(plan, kind, stage)
    if _group(template, "attend") is None:
        raise Unfit
    extent = plan.states["kv"].extent

    def change(t: Template) -> Template:
        t = edit_tasks(t, "attend", lambda x: replace(x, writes=tuple(s for s in x.writes if s.tensor != "kv")))
        return edit_tasks(
            t, "down", lambda x: replace(x, writes=(*x.writes, Span("kv", 0, extent))) if x.index == 0 else x
        )

    return edit_template(plan, kind, stage, change)


def unordered_append(plan: Plan, kind: str, stage: int) -> Plan:
    """Each attention task appends for its neighbour, who does not wait for it."""
    template = template_of(plan, kind, stage)
    attend = _group(template, "attend")
    if attend is None or len(attend.tasks) < 2 or plan.num_sms < 2:
        raise Unfit
    count = len(attend.tasks)

    def change(t: Task) -> Task:
        kept = tuple(s for s in t.writes if s.tensor != "kv")
        other = (t.index + 1) % count
        return replace(t, writes=(*kept, Span("kv", other, other + 1)))

    return edit_template(plan, kind, stage, lambda t: edit_tasks(t, "attend", change))


def stale_in_next_step(plan: Plan, kind: str, stage: int) -> Plan:
    """A task of the last stage still reads the residual when the next step writes it: nothing waits for it."""
    template = template_of(plan, kind, stage)
    if template.name != "head" or plan.num_sms < 2:
        raise Unfit
    sample = next(iter(_sms_of(template, "sample")))
    group = replace(
        _group(template, "sample"),
        name="export",
        tasks=(Task(0, (0, 1), (Span("r0", 0, 12),), (), waits=_group(template, "head").tasks[0].waits),),
        outputs=(),
        nodes=(),
    )
    sm = (sample + 1) % plan.num_sms

    def change(t: Template) -> Template:
        queue = (*t.queues[sm], (len(t.groups), 0))
        return replace(t, groups=(*t.groups, group), queues=_at(t.queues, sm, queue))

    return edit_template(plan, kind, stage, change)


def late_append(plan: Plan, kind: str, stage: int) -> Plan:
    """A task of the last stage still appends when the step has ended: the next one loads the cache without it."""
    template = template_of(plan, kind, stage)
    if template.name != "head" or plan.num_sms < 2:
        raise Unfit
    sample = next(iter(_sms_of(template, "sample")))
    task = Task(
        0, (0, 1), (), (Span("kv", 0, plan.states["kv"].extent),), waits=_group(template, "head").tasks[0].waits
    )
    group = replace(_group(template, "sample"), name="late", tasks=(task,), outputs=("kv",), nodes=())
    sm = (sample + 1) % plan.num_sms

    def change(t: Template) -> Template:
        queue = (*t.queues[sm], (len(t.groups), 0))
        return replace(t, groups=(*t.groups, group), queues=_at(t.queues, sm, queue))

    return edit_template(plan, kind, stage, change)


def step_before(plan: Plan, kind: str, stage: int) -> Plan:
    """A step reads what only the step before wrote."""
    if template_of(plan, kind, stage).name != "embed":
        raise Unfit
    scratch = replace(plan.tensors["r0"], name="scratch", offset=plan.arena_bytes["cuda"])
    arenas = {**plan.arena_bytes, "cuda": scratch.offset + scratch.bytes}
    plan = replace(plan, tensors={**plan.tensors, "scratch": scratch}, arena_bytes=arenas)
    return edit_template(plan, kind, stage, lambda t: _rename(t, "r0", "scratch"))


# Rules and limits


def residual_on_every_rank(plan: Plan, kind: str, stage: int) -> Plan:
    """The residual is added to each rank's addend, before the sum over ranks."""
    if plan.tp == 1 or _group(template_of(plan, kind, stage), "o") is None:
        raise Unfit
    add = Node("out", "add", ("x", "o"), "o2")
    return edit_template(plan, kind, stage, lambda t: edit_group(t, "o", lambda g: replace(g, nodes=(*g.nodes, add))))


def summed_twice(plan: Plan, kind: str, stage: int) -> Plan:
    if plan.tp == 1 or _group(template_of(plan, kind, stage), "gate_up") is None:
        raise Unfit
    again = Node("again", "all_reduce", ("os",), "os2")
    return edit_template(
        plan, kind, stage, lambda t: edit_group(t, "gate_up", lambda g: replace(g, nodes=(*g.nodes, again)))
    )


def too_much_shared_memory(plan: Plan, kind: str, stage: int) -> Plan:
    size = find_target(plan.target).smem_bytes - plan.ring_bytes + 1
    name = _last_group(template_of(plan, kind, stage))
    return edit_template(plan, kind, stage, lambda t: edit_group(t, name, lambda g: replace(g, smem_bytes=size)))


def queued_twice(plan: Plan, kind: str, stage: int) -> Plan:
    def change(template: Template) -> Template:
        sm = next(sm for sm, q in enumerate(template.queues) if any(t >= 0 for _, t in q))
        entry = next(e for e in template.queues[sm] if e[1] >= 0)
        other = (sm + 1) % plan.num_sms
        return replace(template, queues=_at(template.queues, other, (*template.queues[other], entry)))

    return edit_template(plan, kind, stage, change)


def not_queued(plan: Plan, kind: str, stage: int) -> Plan:
    def change(template: Template) -> Template:
        sm = next(sm for sm, q in enumerate(template.queues) if q)
        return replace(template, queues=_at(template.queues, sm, template.queues[sm][1:]))

    return edit_template(plan, kind, stage, change)


def not_loaded(plan: Plan, kind: str, stage: int) -> Plan:
    def change(template: Template) -> Template:
        sm = next((sm for sm, q in enumerate(template.loads) if q), None)
        if sm is None:
            raise Unfit
        return replace(template, loads=_at(template.loads, sm, template.loads[sm][1:]))

    return edit_template(plan, kind, stage, change)


def span_gap(plan: Plan, kind: str, stage: int) -> Plan:
    """The last task of a group computes less than its part."""
    template = template_of(plan, kind, stage)
    group = max(template.groups, key=lambda g: g.tasks[-1].writes[0].hi - g.tasks[-1].writes[0].lo)
    last = group.tasks[-1].index

    def change(task: Task) -> Task:
        span = task.writes[0]
        if task.index != last:
            return task
        return replace(task, writes=(replace(span, lo=span.lo + 1), *task.writes[1:]))

    return edit_template(plan, kind, stage, lambda t: edit_tasks(t, group.name, change))


def written_twice(plan: Plan, kind: str, stage: int) -> Plan:
    template = template_of(plan, kind, stage)
    group = next((g for g in template.groups if len(g.tasks) > 1), None)
    if group is None:
        raise Unfit

    def change(task: Task) -> Task:
        span = task.writes[0]
        if task.index != 1:
            return task
        return replace(task, writes=(replace(span, lo=span.lo - 1), *task.writes[1:]))

    return edit_template(plan, kind, stage, lambda t: edit_tasks(t, group.name, change))


def too_many_threads(plan: Plan, kind: str, stage: int) -> Plan:
    name = _last_group(template_of(plan, kind, stage))
    return edit_template(plan, kind, stage, lambda t: edit_group(t, name, lambda g: replace(g, block=(1056, 1, 1))))


ORDER = (
    dropped_event,
    dropped_entry,
    dropped_signal,
    unseen_task,
    threshold_too_high,
    swapped_queue,
    wait_cycle,
    pool_cycle,
    ring_deadlock,
    overlapping_buffers,
    overlapping_inboxes,
    read_before_append,
    unordered_append,
    stale_in_next_step,
    step_before,
)
"""Seen in executions."""
RULES = (
    threshold_too_low,
    residual_on_every_rank,
    summed_twice,
    too_much_shared_memory,
    queued_twice,
    not_queued,
    not_loaded,
    late_append,
    span_gap,
    written_twice,
    too_many_threads,
)
DEFECTS = (*ORDER, *RULES)
