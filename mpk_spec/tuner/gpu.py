"""Measures plans on this machine's GPU: time by its clock, and logits against those of the plan without rules."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from mpk_spec.errors import UserError, VerdictFailed
from mpk_spec.ops.linear import WARPS_COLUMNS
from mpk_spec.planner.kv_splits import FUSED_SPLITS
from mpk_spec.tuner.journal import Measurement, NotJudged

if TYPE_CHECKING:
    import torch

    from mpk_spec.planner.plan import Plan
    from mpk_spec.runtime.cuda_backend import CudaBackend
    from mpk_spec.testing.yardstick import Yardstick

REPEATS = 3
POSITIONS, SEEDS, LENGTH = 256, 2, 512  # logits that are compared: the ends of two sequences
ALONE = 16  # of each sequence, computed token by token
BUILDERS = 8  # kernels compiled at once


def compile_plan(plan: Plan) -> None:
    """Into the cache of cubins. Raises UserError where the kernel does not compile or spills."""
    from mpk_spec.emit.compiler import compile_kernel
    from mpk_spec.emit.source import emit
    from mpk_spec.planner.targets import find_target

    compile_kernel(plan.name, emit(plan).source, find_target(plan.target).arch)


@dataclass
class GpuMeasurer:
    """opened: the backend of a plan; given the one whose packed weights it can share, None at first.

    yardstick: the truth about these sequences, whose last positions are judged. Made once, if other `roundings` are
    tried at all: such logits cannot have the same bits.
    """

    baseline: Plan
    opened: Callable[[Plan, Any], CudaBackend]
    yardstick: Callable[[list[list[int]], int], Yardstick]
    context: int
    tokens: int
    compiled: Callable[[Plan], None] = compile_plan
    truth: Yardstick | UserError | None = None
    first: CudaBackend | None = None
    ids: list[list[int]] = field(default_factory=list)
    expected: list[torch.Tensor] = field(default_factory=list)

    def prepare(self, plans: list[Plan]) -> None:
        """Compiles them side by side; what does not compile is said when it is measured."""
        from concurrent.futures import ThreadPoolExecutor

        if len(plans) > 1:
            with ThreadPoolExecutor(min(BUILDERS, os.cpu_count() or 1)) as pool:
                for done in [pool.submit(self.compiled, plan) for plan in plans]:
                    done.exception()

    def measure(self, plan: Plan) -> Measurement:
        from mpk_spec.perf.clock import time_decode

        self._open_first()
        is_first = plan.key == self.baseline.key
        if roundings(plan) != roundings(self.baseline):
            self._open_truth()
        backend = self.first if is_first else self._open(plan)
        try:
            times = time_decode(backend, self.context, self.tokens, REPEATS)
            right, output = (True, "the plan to beat") if is_first else self._judge(backend)
        finally:
            if not is_first:
                backend.close()
        return Measurement(times.kernel_ms, times.kernel_ms_min, times.kernel_ms_max, right, output)

    def _open(self, plan: Plan) -> CudaBackend:
        """NotJudged where its weights lie otherwise than those of the plan without rules, and both have no room."""
        from mpk_spec.runtime.cuda_device import OutOfMemory

        try:
            return self.opened(plan, self.first)
        except OutOfMemory as error:
            raise NotJudged(f"no room beside the plan without rules: {error.message}", error.hint) from None

    def in_turn(self, plans: tuple[Plan, Plan], pairs: int) -> list[tuple[float, float]]:
        from mpk_spec.perf.clock import pace, start_of

        self._open_first()
        backends = [self.first if p.key == self.baseline.key else self.opened(p, self.first) for p in plans]
        ids = [backend.fill_cache(start_of(self.context, self.tokens)) for backend in backends]
        turns = [[pace(b, i, self.tokens) for b, i in zip(backends, ids, strict=True)] for _ in range(pairs + 1)]
        for backend in backends:
            if backend is not self.first:
                backend.close()
        return [(before, after) for before, after in turns[1:]]

    def _open_first(self) -> None:
        """The plan without rules, whose weights all share, and what its logits are."""
        from mpk_spec.testing.yardstick import sequences

        if self.first is not None:
            return
        self.first = self.opened(self.baseline, None)
        length = min(self.first.context, LENGTH)
        self.ids = sequences(self.first.vocab_size, POSITIONS, SEEDS, length, whole=True)
        self.expected = self._logits(self.first)
        if not all(t.isfinite().all() for t in self.expected):
            raise UserError("the logits of the plan without rules are no numbers (NaN)", "are these weights whole?")

    @property
    def _last(self) -> int:
        """Positions of each sequence that are looked at."""
        return min(len(self.ids[0]), POSITIONS // SEEDS)

    def _logits(self, backend: CudaBackend) -> list[torch.Tensor]:
        return [backend.logits(ids, last=self._last, alone=ALONE) for ids in self.ids]

    def _judge(self, backend: CudaBackend) -> tuple[bool, str]:
        """Whether a candidate's logits are right, and in words why."""
        import torch

        found = self._logits(backend)
        if all(torch.equal(a, b) for a, b in zip(found, self.expected, strict=True)):
            return True, "same bits"
        if roundings(backend.plan) == roundings(self.baseline):
            worst = max((a - b).abs().max().item() for a, b in zip(found, self.expected, strict=True))
            return False, f"logits differ from the plan's without rules by up to {worst:.3g}, and should not"
        return self._against_truth(found)

    def _open_truth(self) -> None:
        """NotJudged where this machine cannot compute it, VerdictFailed where already the plan without rules fails."""
        if self.truth is None:
            try:
                self.truth = self.yardstick(self.ids, self._last)
            except UserError as error:
                self.truth = error
        if isinstance(self.truth, UserError):
            raise NotJudged(f"other sums and fusions cannot be judged: {self.truth.message}", self.truth.hint)
        right, output = self._against_truth(self.expected)
        if not right:
            raise VerdictFailed(f"nothing can be tuned: the plan without rules is {output}")

    def _against_truth(self, logits: list[torch.Tensor]) -> tuple[bool, str]:
        """The verdict of `compare`, and in words."""
        given = iter(logits)
        verdict = self.truth.judge(SimpleNamespace(logits=lambda ids, **how: next(given)))
        if verdict.passed:
            return True, "as near the truth as compare asks"
        wrong = [f"{row.name} {row.ours:.3g}, at most {row.limit:.3g}" for row in verdict.rows if not row.passed]
        return False, f"too far from the truth: {'; '.join(wrong) or 'logits are no numbers'}"


def roundings(plan: Plan) -> tuple[dict, dict, dict]:
    """What decides a plan's bits: the order of its sums, and the fusions whose values are rounded on their way."""
    fusions = {name: rule["fuse"] for name, rule in plan.schedule.items() if "fuse" in rule}
    return attention_orders(plan), linear_orders(plan), fusions


def attention_orders(plan: Plan) -> dict[str, tuple[int, str | None]]:
    """By group: what decides the order of attention's sums. Few splits are merged alike by readers and by tasks."""
    groups = [g for t in plan.steps["decode"].templates for g in t.groups if g.task == "attention"]
    merge = {g.name: plan.schedule[g.name].get("kv_merge") for g in groups if g.kv_splits > FUSED_SPLITS}
    return {g.name: (g.kv_splits, merge.get(g.name)) for g in groups}


def linear_orders(plan: Plan) -> dict[str, int]:
    """By group: the columns of a copy, in each of which the warps begin with the first again. 0 where that is its turn
    anyway, or where a row is one copy: then the size of copies does not matter."""
    columns = {name: weight.shape[-1] for name, weight in plan.weights.items()}
    whole = {p.group: p.tile_k % WARPS_COLUMNS == 0 or columns[p.weights[0]] <= p.tile_k for p in plan.packings}
    return {p.group: 0 if whole[p.group] else p.tile_k for p in plan.packings}
