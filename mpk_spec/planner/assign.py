"""Tasks to SMs: every group spread over the SMs, in program order within each queue."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from mpk_spec.planner.plan import Group, Task

Queue = tuple[tuple[int, int], ...]


def assign(groups: tuple[Group, ...], num_sms: int, order: str) -> tuple[tuple[Queue, ...], tuple[Queue, ...]]:
    """(queues, loads) for each SM.

    `balanced`: static tasks go to the least loaded SM (by bytes over the whole stage, one task of a group to each SM
    before a second); `in_turn`: task after task to SM after SM, each group going on where the one before it ended. A
    dynamic group is one claim entry on every SM, in `loads` too where it has weights: the loader stands there until the
    pool is empty.
    """
    queues: list[list[tuple[int, int]]] = [[] for _ in range(num_sms)]
    loads: list[list[tuple[int, int]]] = [[] for _ in range(num_sms)]
    spread = _InTurn(num_sms) if order == "in_turn" else _Balanced(num_sms)
    for n, group in enumerate(groups):
        if group.launch == "dynamic":
            for lists in (queues, loads) if any(t.load_chunks for t in group.tasks) else (queues,):
                for entries in lists:
                    entries.append((n, -1))
            continue
        chosen: dict[int, list[int]] = {}
        for task, sm in spread.place(group):
            chosen.setdefault(sm, []).append(task.index)
        for sm, tasks in chosen.items():
            for index in sorted(tasks):
                queues[sm].append((n, index))
                if group.tasks[index].load_chunks:
                    loads[sm].append((n, index))
    return tuple(map(tuple, queues)), tuple(map(tuple, loads))


class _Balanced:
    def __init__(self, num_sms: int):
        self.streamed = [0] * num_sms
        self.counts = [0] * num_sms

    def place(self, group: Group) -> Iterator[tuple[Task, int]]:
        heap = [(0, *state, sm) for sm, state in enumerate(zip(self.streamed, self.counts, strict=True))]
        heapq.heapify(heap)
        for task in sorted(group.tasks, key=lambda t: (-t.load_bytes, t.index)):
            rounds, load, count, sm = heapq.heappop(heap)
            yield task, sm
            self.streamed[sm] += task.load_bytes
            self.counts[sm] += 1
            heapq.heappush(heap, (rounds + 1, load + task.load_bytes, count + 1, sm))


class _InTurn:
    def __init__(self, num_sms: int):
        self.num_sms, self.placed = num_sms, 0

    def place(self, group: Group) -> Iterator[tuple[Task, int]]:
        for task in group.tasks:
            yield task, self.placed % self.num_sms
            self.placed += 1
