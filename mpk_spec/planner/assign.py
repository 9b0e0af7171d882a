"""Tasks to SMs: every group spread over the SMs that have streamed least so far, in program order within each queue."""

from __future__ import annotations

import heapq

from mpk_spec.planner.plan import Group

Queue = tuple[tuple[int, int], ...]


def assign(groups: tuple[Group, ...], num_sms: int) -> tuple[tuple[Queue, ...], tuple[Queue, ...]]:
    """(queues, loads) for each SM. Static tasks go to the least loaded SM (by bytes over the whole stage, one task of a
    group to each SM before a second); a dynamic group is one claim entry on every SM, in
    `loads` too where it has weights: the loader stands there until the pool is empty."""
    queues: list[list[tuple[int, int]]] = [[] for _ in range(num_sms)]
    loads: list[list[tuple[int, int]]] = [[] for _ in range(num_sms)]
    streamed = [0] * num_sms
    counts = [0] * num_sms
    for n, group in enumerate(groups):
        if group.launch == "dynamic":
            for lists in (queues, loads) if any(t.load_chunks for t in group.tasks) else (queues,):
                for entries in lists:
                    entries.append((n, -1))
            continue
        chosen: dict[int, list[int]] = {}
        heap = [(0, streamed[sm], counts[sm], sm) for sm in range(num_sms)]
        heapq.heapify(heap)
        for task in sorted(group.tasks, key=lambda t: (-t.load_bytes, t.index)):
            rounds, load, count, sm = heapq.heappop(heap)
            chosen.setdefault(sm, []).append(task.index)
            streamed[sm] += task.load_bytes
            counts[sm] += 1
            heapq.heappush(heap, (rounds + 1, load + task.load_bytes, count + 1, sm))
        for sm, tasks in chosen.items():
            for index in sorted(tasks):
                queues[sm].append((n, index))
                if group.tasks[index].load_chunks:
                    loads[sm].append((n, index))
    return tuple(map(tuple, queues)), tuple(map(tuple, loads))
