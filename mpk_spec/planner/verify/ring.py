"""The shared-memory ring cannot block: no chunk waits for the room of a task that runs later.

The loader of an SM fills the ring's stages in the order of `loads`; chunk `c` needs the room of chunk `c - stages`, and
of all before it. A task frees its chunks while it runs. So a task can end exactly if every chunk up to (its last one -
stages) belongs to itself or to a task before it in the queue. Stages follow one another in queue and loads alike, so
looking at each template is enough. How many tasks of a pool an SM claims is unknown: everything loaded before a pool
must run before it, and everything loaded after it after it.

What an attention reads of the cache comes through the ring of the CUDA kernel too. How much that is depends on the
position, so a plan does not count it. Its loader streams all of a queue in the order of the queue: then no chunk waits
for the room of a task that runs later, however many chunks there are.
"""

from __future__ import annotations

from mpk_spec.planner.plan import Plan, Template
from mpk_spec.planner.verify.report import Report


def check_ring(plan: Plan, kind: str, template: Template, report: Report) -> None:
    """Reports SMs whose loader and workers can wait for each other."""
    stages = plan.ring_stages
    for sm, loads in enumerate(template.loads):
        place = {entry: i for i, entry in enumerate(template.queues[sm])}
        ends, total = [], 0  # (chunks loaded when the entry's are, entry)
        for entry in loads:
            total += 0 if entry[1] < 0 else template.groups[entry[0]].tasks[entry[1]].load_chunks
            ends.append(total)
        freed, latest = 0, None  # entries whose chunks must be gone; the one of them that runs last
        for i, entry in enumerate(loads):
            limit = ends[i] if entry[1] < 0 else ends[i] - stages
            while freed < i and (ends[freed - 1] if freed else 0) < limit:
                if latest is None or place[loads[freed]] > place[latest]:
                    latest = loads[freed]
                freed += 1
            if latest is not None and place[latest] > place[entry]:
                names = [_name(template, e) for e in (entry, latest)]
                report.add(
                    f"{kind}, template '{template.name}': ring deadlock on SM {sm}: {names[0]} needs room in the "
                    f"{stages} stages that {names[1]}, loaded before it and run after it, holds",
                    kind,
                    template.name,
                    "ring",
                )
            if entry[1] < 0 and (latest is None or place[entry] > place[latest]):
                latest = entry  # the loader stands still until the pool is empty


def _name(template: Template, entry: tuple[int, int]) -> str:
    group = template.groups[entry[0]].name
    return f"the pool of {group}" if entry[1] < 0 else f"{group}[{entry[1]}]"
