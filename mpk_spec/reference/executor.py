"""Executes steps of a plan: all tasks of a group at once, or task by task in any order that waits and queues allow."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cached_property

import torch

from mpk_spec.ops.rope import rope_table
from mpk_spec.planner.plan import Group, Plan, Step, Task
from mpk_spec.reference.evaluate import GroupRun, rope_key
from mpk_spec.reference.state import Cache, load_ranks


@dataclass
class StepInput:
    """The step descriptor: for each token its id, its position and its sequence (slot); int64 `[tokens]`."""

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    decode: bool
    _rope_rows: dict = field(default_factory=dict)

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """(slot, position) of each token."""
        return list(zip(self.slots.tolist(), self.positions.tolist(), strict=True))

    @cached_property
    def parts(self) -> list[tuple[int, torch.Tensor]]:
        """(slot, rows) of tokens that attend together: those of one sequence."""
        return [(int(s), (self.slots == s).nonzero()[:, 0]) for s in self.slots.unique()]

    def rope_rows(self, tables: dict, key: str) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of these tokens, float32 `[tokens, 1, rotated dims]`."""
        if key not in self._rope_rows:
            cos, sin = tables[key]
            self._rope_rows[key] = cos[self.positions, None], sin[self.positions, None]
        return self._rope_rows[key]


class Executor:
    """A plan with weights and caches, on the CPU. Every rank lives in this process."""

    def __init__(self, plan: Plan, checkpoint, progress=None):
        self.plan = plan
        self.ranks = load_ranks(plan, checkpoint, progress)
        self._programs: dict[str, list[tuple[bool, list[GroupRun]]]] = {}
        tables = self._rope_tables()
        for rank in self.ranks:
            rank.rope = tables
        self.reset()

    def reset(self) -> None:
        """Empties the caches; positions never written are NaN."""
        for rank in self.ranks:
            for state in self.plan.states.values():
                shape = (state.layers, state.batch, state.kv_heads, state.context, state.head_dim)
                rank.caches[state.name] = Cache(
                    torch.full(shape, float("nan")), torch.full(shape, float("nan")), state.dtype
                )

    def _rope_tables(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for step in self.plan.steps.values():
            for node in (n for t in step.templates for g in t.groups for n in g.nodes if n.op == "rope"):
                key = rope_key(node)
                if key not in found:
                    found[key] = rope_table(
                        node.values["parameters"], node.values["head_dim"], self.plan.config, self.plan.context
                    )
        return found

    def run(
        self, kind: str, step_input: StepInput, *, rows: torch.Tensor | None = None, shuffle: int | None = None
    ) -> None:
        """One step. `rows`: tokens that the head is wanted for. `shuffle`: a seed for a random legal order of tasks."""
        step = self.plan.steps[kind]
        for rank in self.ranks:
            rank.allocate(len(step_input.ids), poison=shuffle is not None)
            rank.buffers["token_ids"] = step_input.ids[:, None]
            rank.rows = None
        if shuffle is not None:
            _Shuffled(self, step, step_input, random.Random(shuffle)).run()
            return
        for wanted_only, runs in self._program(kind):
            if wanted_only:
                for rank in self.ranks:
                    rank.rows = rows
            for run in runs:
                run.run(step_input)

    def _program(self, kind: str) -> list[tuple[bool, list[GroupRun]]]:
        """Per stage: whether it comes after the layers, and the groups of all ranks in order. Made once."""
        if kind not in self._programs:
            step = self.plan.steps[kind]
            last_layer = max((n for n, s in enumerate(step.stages) if s.layer is not None), default=len(step.stages))
            self._programs[kind] = [
                (
                    n > last_layer,
                    [GroupRun(r, g, stage.layer) for g in step.templates[stage.template].groups for r in self.ranks],
                )
                for n, stage in enumerate(step.stages)
            ]
        return self._programs[kind]

    def value(self, name: str, rows: torch.Tensor | None = None) -> torch.Tensor:
        """A tensor after the step, all ranks' shares of the vocabulary joined: float32 `[tokens, features]`."""
        parts = [r.buffers[name] for r in self.ranks]
        joined = torch.cat(parts, -1) if self._split_over_ranks(name) else parts[0]
        return joined if rows is None else joined[rows]

    def _split_over_ranks(self, name: str) -> bool:
        """Whether a value is logits of which every rank has a share."""
        nodes = (n for s in self.plan.steps.values() for t in s.templates for g in t.groups for n in g.nodes)
        return any(n.op == "argmax_partial" and n.inputs[0] == name and n.values["rank_stride"] for n in nodes)


class _Shuffled:
    """Runs one step task by task: at each turn a random SM of a random rank whose next task may start."""

    def __init__(self, executor: Executor, step: Step, step_input: StepInput, choose: random.Random):
        self.executor, self.step, self.input, self.choose = executor, step, step_input, choose
        ranks, sms = range(len(executor.ranks)), range(executor.plan.num_sms)
        self.queues = {(r, sm): self._entries(sm) for r in ranks for sm in sms}
        self.ready = [where for where, queue in self.queues.items() if queue]
        self.parked: dict[tuple[int, int, str], list[tuple[int, int]]] = {}  # by the event that they wait for
        self.counts: dict[tuple[int, int, str], int] = {}
        self.pools: dict[tuple[int, int, int], list[int]] = {}

    def _entries(self, sm: int) -> list[tuple[int, int, int]]:
        """(stage, group, task) in reverse, so that the next one is popped off the end."""
        found = [
            (s, g, t)
            for s, stage in enumerate(self.step.stages)
            for g, t in self.step.templates[stage.template].queues[sm]
        ]
        return found[::-1]

    def run(self) -> None:
        while self.ready:
            n = self.choose.randrange(len(self.ready))
            where = self.ready[n]
            event = self._advance(where)
            if event is not None or not self.queues[where]:
                self.ready[n] = self.ready[-1]
                self.ready.pop()
            if event is not None:
                self.parked.setdefault(event, []).append(where)
        left = sum(map(len, self.queues.values()))
        if left:
            raise RuntimeError(f"deadlock: {left} tasks wait for one another")

    def _advance(self, where: tuple[int, int]) -> tuple[int, int, str] | None:
        """Runs the next task of a queue, or returns an event that it waits for."""
        rank, _ = where
        stage, number, index = self.queues[where][-1]
        group = self.step.templates[self.step.stages[stage].template].groups[number]
        pool = self.pools.setdefault((rank, stage, number), list(range(len(group.tasks)))) if index < 0 else [index]
        if not pool:
            self.queues[where].pop()
            return None
        task = group.tasks[pool[0]]
        event = self._missing(rank, stage, task)
        if event is None:
            pool.pop(0)
            if index >= 0:
                self.queues[where].pop()
            self._do(rank, stage, group, task)
        return event

    def _missing(self, rank: int, stage: int, task: Task) -> tuple[int, int, str] | None:
        """An event that the task waits for. Stages before the first belong to the step before, which is over."""
        for wait in task.waits:
            event = (rank, stage + wait.stage, wait.event)
            if event[1] >= 0 and self.counts.get(event, 0) < wait.count:
                return event
        return None

    def _do(self, rank: int, stage: int, group: Group, task: Task) -> None:
        GroupRun(self.executor.ranks[rank], group, self.step.stages[stage].layer, task).run(self.input)
        crossing = any(
            self.executor.plan.tensors[s.tensor].inbox for s in task.writes if s.tensor in self.executor.plan.tensors
        )
        for peer in range(len(self.executor.ranks)) if crossing else (rank,):
            for event in task.signals:
                key = (peer, stage, event)
                self.counts[key] = self.counts.get(key, 0) + 1
                self.ready += self.parked.pop(key, [])
