"""The plan's queues as bytes: one `SmProgram` (cuda_templates/runtime/program.cuh) per SM, and the events' numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise

import numpy as np

from mpk_spec.emit.layout import Layout, rows_of
from mpk_spec.emit.pools import FROM_POOL, MOST_TASKS, ClaimPool, check_order, dynamic_groups
from mpk_spec.errors import UserError
from mpk_spec.planner.crossing import further_back
from mpk_spec.planner.plan import Group, Plan, Step, Task

ENTRY = np.dtype(
    [
        ("run", "<u2"),
        ("group", "<u2"),
        ("task", "<u2"),
        ("num_waits", "<u2"),
        ("first_wait", "<u2"),
        ("num_signals", "<u2"),
        ("first_signal", "<u2"),
        ("spare", "<u2"),
        ("lo", "<i4"),
        ("hi", "<i4"),
        ("share_lo", "<i4"),
        ("share_hi", "<i4"),
    ]
)
LOAD = np.dtype([("what", "<u4"), ("lo", "<i4"), ("hi", "<i4")])
ROW_TASKS = frozenset({"rmsnorm", "add", "gated_act", "embedding", "rope"})  # row operators on their own
MOST_STAGES = 255  # a wait counts stages in a byte
WAIT = np.dtype([("event", "<u2"), ("back", "u1"), ("data", "u1"), ("count", "<u4")])


@dataclass(frozen=True)
class Sizes:
    """The largest of all SMs, which every SM's program has room for."""

    entries: int
    loads: int
    waits: int
    signals: int
    bytes: int


@dataclass(frozen=True)
class Programs:
    sizes: Sizes
    blob: bytes  # num_sms programs, one after the other, and the entries of all pools
    events: tuple[str, ...]
    event_total: tuple[tuple[int, ...], ...]  # [template][event]
    max_queue: int
    sampling_sm: int
    from_peers: frozenset[str]  # events that every rank's tasks signal on every rank
    pools: tuple[ClaimPool, ...] = ()
    pool_rows: tuple[int, ...] = ()  # of each pool's tasks the first rows, and the end of the last one's


def pack_programs(plan: Plan, step: Step, layout: Layout, runs: list[list[int]]) -> Programs:
    """`runs[template][group]`: the case of the generated switch."""
    events = tuple(sorted({name for t in step.templates for name in t.events}))
    number = {name: n for n, name in enumerate(events)}
    streamed = {name: n for n, name in enumerate([*layout.packed, *layout.caches])}
    if len(step.stages) > MOST_STAGES:
        raise UserError(f"the CUDA kernel runs at most {MOST_STAGES} stages, this plan has {len(step.stages)}")
    for template in step.templates:
        check_order(template)
    pools = _PoolDraft(step, runs, number, layout, streamed)
    drafts = [_SmDraft(step, runs, number, layout, streamed, sm, pools) for sm in range(plan.num_sms)]
    most = [max(1, max(len(getattr(d, k)) for d in drafts)) for k in ("entries", "loads", "waits", "signals")]
    dtype = _program_dtype(len(step.templates), *most)
    blob = np.zeros(plan.num_sms, dtype)
    for n, draft in enumerate(drafts):
        draft.fill(blob[n])
    totals = tuple(tuple(t.events.get(name, 0) for name in events) for t in step.templates)
    longest = max(len(q) for t in step.templates for q in t.queues)
    whole = blob.tobytes() + np.array(pools.entries, ENTRY).tobytes()
    return Programs(
        Sizes(*most, dtype.itemsize), whole, events, totals, longest, _sampling_sm(step), crossing(plan, step),
        tuple(pools.found), tuple(pools.rows),
    )  # fmt: skip


def crossing(plan: Plan, step: Step) -> frozenset[str]:
    """Events of tasks that write into inboxes: every rank's. UserError where others have one of the same name."""
    ours, theirs = set(), set()
    for group in (g for t in step.templates for g in t.groups):
        writes = {s.tensor for task in group.tasks for s in task.writes}
        shared = any(plan.tensors[name].inbox for name in writes & plan.tensors.keys())
        (theirs if shared else ours).update(name for task in group.tasks for name in task.signals)
    if ours & theirs:
        raise UserError(f"event '{min(ours & theirs)}' is signalled by peers in one layer and not in another")
    return frozenset(theirs)


def _program_dtype(templates: int, entries: int, loads: int, waits: int, signals: int) -> np.dtype:
    """With the padding that C++ puts in: every part is aligned to 4 bytes, and so is the whole."""
    begins = 2 * (templates + 1)
    fields = [("queue_begin", ("<u2", templates + 1), 0), ("load_begin", ("<u2", templates + 1), begins)]
    at = -(-2 * begins // 4) * 4
    for name, dtype, count in (("entry", ENTRY, entries), ("load", LOAD, loads), ("wait", WAIT, waits)):
        fields.append((name, (dtype, count), at))
        at += dtype.itemsize * count
    fields.append(("signal", ("<u2", signals), at))
    at = -(-(at + 2 * signals) // 4) * 4
    names, formats, offsets = zip(*fields, strict=True)
    return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": at})


class _Draft:
    """Entries, and what they wait for and signal."""

    def __init__(self, number: dict[str, int], layout: Layout):
        self.entries: list[tuple] = []
        self.waits: list[tuple] = []
        self.signals: list[int] = []
        self.layout, self.number = layout, number
        self.further: Callable[[int], int] = lambda stage: 0  # of the template at hand, see `further_back`

    def _entry(self, group: Group, task: Task, run: int, index: int) -> None:
        waits = [(self.number[w.event], -w.stage, self.further(w.stage) if w.data else 0, w.count) for w in task.waits]
        signals = [self.number[s] for s in task.signals]
        share = next(((s.lo, s.hi) for s in task.writes if s.tensor in group.published), (0, 0))
        first_wait, first_signal = self._place(self.waits, waits), self._place(self.signals, signals)
        self.entries.append(
            (run, index, task.index, len(waits), first_wait, len(signals), first_signal, 0,
             *bounds(group, task, self.layout), *share)
        )  # fmt: skip

    def _place(self, whole: list, part: list) -> int:
        """Where `part` begins in the list that it is put behind."""
        whole += part
        return len(whole) - len(part)


class _PoolDraft(_Draft):
    """The entries of all pools' tasks. Their waits and signals, each list once, begin those of every SM."""

    def __init__(self, step: Step, runs, number: dict[str, int], layout: Layout, streamed: dict[str, int]):
        super().__init__(number, layout)
        self.found: list[ClaimPool] = []
        self.rows: list[int] = []
        self.numbers: dict[tuple[int, int], int] = {}  # (template, group) -> the pool's
        self._known: dict[tuple, int] = {}
        for t, g, group in dynamic_groups(step):
            self.numbers[t, g] = len(self.found)
            self.found.append(
                ClaimPool(t, g, group.name, streamed[group.name], len(group.tasks), len(self.entries), len(self.rows))
            )
            self.further = cache(partial(further_back, step, t))
            for task in group.tasks:
                self._entry(group, task, runs[t][g], g)
            self.rows += self._rows(group)

    def _rows(self, group: Group) -> list[int]:
        found = [rows_of(task, self.layout.packed[group.name]) for task in group.tasks]
        if any(here[1] != after[0] for here, after in pairwise(found)):
            raise UserError(f"the tasks of '{group.name}', claimed at run time, do not follow each other")
        if len(found) > MOST_TASKS:
            raise UserError(f"'{group.name}' is claimed at run time in {len(found)} tasks, {MOST_TASKS} at most can be")
        return [lo for lo, _ in found] + [found[-1][1]]

    def _place(self, whole: list, part: list) -> int:
        key = whole is self.waits, *part
        if key not in self._known:
            self._known[key] = super()._place(whole, part)
        return self._known[key]


class _SmDraft(_Draft):
    """The lists of one SM, template after template."""

    def __init__(
        self, step: Step, runs, number: dict[str, int], layout: Layout, streamed: dict[str, int], sm: int,
        pools: _PoolDraft,
    ):  # fmt: skip
        super().__init__(number, layout)
        self.loads: list[tuple] = []
        self.waits += pools.waits
        self.signals += pools.signals
        self.queue_begin, self.load_begin = [0], [0]
        for t, template in enumerate(step.templates):
            self.further = cache(partial(further_back, step, t))
            for group, task in template.queues[sm]:
                if task < 0:
                    pool = pools.numbers[t, group]
                    self.entries.append((FROM_POOL, group, 0, 0, 0, 0, 0, 0, pool, 0, 0, 0))
                    self.loads.append((streamed[template.groups[group].name], -1, pool))
                    continue
                self._entry(template.groups[group], template.groups[group].tasks[task], runs[t][group], group)
                self.loads += self._loads(template.groups[group], template.groups[group].tasks[task], streamed)
            self.queue_begin.append(len(self.entries))
            self.load_begin.append(len(self.loads))

    def _loads(self, group: Group, task: Task, streamed: dict[str, int]) -> list[tuple]:
        """What the task takes through the ring: weights, or what an attention reads of the cache."""
        if task.load_chunks:
            return [(streamed[group.name], *bounds(group, task, self.layout))]
        reads = [n.values["state"] for n in group.nodes if n.op == "attention"]
        return [(streamed[state], *bounds(group, task, self.layout)) for state in reads]

    def fill(self, record) -> None:
        record["queue_begin"], record["load_begin"] = self.queue_begin, self.load_begin
        for name, rows in (
            ("entry", self.entries),
            ("load", self.loads),
            ("wait", self.waits),
            ("signal", self.signals),
        ):
            if rows:
                record[name][: len(rows)] = rows


def bounds(group: Group, task: Task, layout: Layout) -> tuple[int, int]:
    """`Entry.lo` and `Entry.hi`, as the task's header reads them."""
    if group.task == "linear":
        return rows_of(task, layout.packed[group.name])
    if group.task == "attention":
        return task.index // group.kv_splits, task.k[0]
    if group.task == "attention_merge":
        head_dim = group.nodes[-1].values["head_dim"]
        return task.out[0] // head_dim, task.out[1] // head_dim
    if group.task == "argmax_partial":
        return task.out[0] // 2, task.out[1] // 2
    if group.task in ROW_TASKS or group.nodes[0].op == "all_reduce":
        return task.out
    return 0, 0


def _sampling_sm(step: Step) -> int:
    for template in step.templates:
        for sm, queue in enumerate(template.queues):
            if any(template.groups[g].task == "argmax_reduce" for g, _ in queue):
                return sm
    raise UserError("the plan samples nothing: it has no argmax_reduce task")


def check_one_schedule(plan: Plan) -> Step:
    """The kernel runs prompts and answers with one set of queues; raises UserError where the plan wants two."""
    decode = plan.steps["decode"]
    for kind, step in plan.steps.items():
        if _skeleton(step) != _skeleton(decode):
            raise UserError(
                f"the CUDA kernel runs every step with the queues of 'decode'; '{kind}' is planned otherwise"
            )
    return decode


def _skeleton(step: Step):
    groups = [
        [
            (g.name, g.grid, g.split_k, g.kv_splits, [(t.out, t.k, t.waits, t.signals) for t in g.tasks])
            for g in t.groups
        ]
        for t in step.templates
    ]
    return groups, [(t.events, t.queues, t.loads) for t in step.templates], step.stages
