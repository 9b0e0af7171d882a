"""Several ranks run the programs that the host packs, as the kernel's schedulers do, in random order, for some steps.

What the kernel gets is checked here, not the plan: the bytes of the programs, which events peers signal, the running
bases of counters, and that a slot of an inbox is written again only when every reader has had it.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
from tiny_specs import child
from unfused import spec_without

from mpk_spec.emit.program import _program_dtype
from mpk_spec.emit.source import emit
from mpk_spec.planner import plan
from mpk_spec.schema import load_spec

STEPS = 3
NEVER = -1


class Machine:
    """`ranks` GPUs, each as many SMs as the plan has, one task at a time."""

    def __init__(self, emitted, from_peers, seed: int, first_step: int = 0):
        self.emitted, self.plan, self.from_peers = emitted, emitted.plan, from_peers
        step, programs = emitted.step, emitted.programs
        self.templates = [s.template for s in step.stages]
        sizes = programs.sizes
        dtype = _program_dtype(len(step.templates), sizes.entries, sizes.loads, sizes.waits, sizes.signals)
        self.programs = np.frombuffer(programs.blob, dtype)
        self.ranks, self.choose, self.first = range(self.plan.tp), random.Random(seed), first_step
        totals = np.array([programs.event_total[t] for t in self.templates], np.int64)
        self.counters = [totals * first_step for _ in self.ranks]
        self.published = [first_step + 1 for _ in self.ranks]
        inboxes = [t for t in self.plan.tensors.values() if t.inbox]
        self.inbox = [{t.name: np.full((self.plan.tp, t.extent), NEVER, np.int64) for t in inboxes} for _ in self.ranks]
        self.written = self._writers(step, {t.name for t in inboxes})
        self.cursors = {(r, sm): self._walk(r, sm) for r in self.ranks for sm in range(self.plan.num_sms)}

    @staticmethod
    def _writers(step, inboxes: set[str]) -> dict[tuple[int, str, str], int]:
        """For each reader of an inbox, (stage, group, tensor), the stage that it must find written: the last before."""
        latest, found = {}, {}
        for stage in range(len(step.stages)):
            for group in step.templates[step.stages[stage].template].groups:
                for tensor in inboxes & {s.tensor for t in group.tasks for s in t.reads}:
                    found[stage, group.name, tensor] = latest[tensor]
                latest |= dict.fromkeys(inboxes & {s.tensor for t in group.tasks for s in t.writes}, stage)
        return found

    def run(self) -> None:
        """Until all SMs have done all steps. Fails where none can go on."""
        waiting = {where: next(cursor) for where, cursor in self.cursors.items()}
        while waiting:
            ready = [where for where, blocked in waiting.items() if not blocked()]
            assert ready, f"deadlock: {len(waiting)} SMs wait"
            for where in self.choose.sample(ready, max(1, len(ready) // 3)):
                if waiting[where]():
                    continue
                following = next(self.cursors[where], None)
                if following is None:
                    del waiting[where]
                else:
                    waiting[where] = following

    def _walk(self, rank: int, sm: int):
        """One SM: yields, before each thing it does, whether that is still blocked."""
        program = self.programs[sm]
        for step in range(self.first, self.first + STEPS):
            yield lambda step=step: self.published[rank] < step + 1
            for stage, kind in enumerate(self.templates):
                for n in range(program["queue_begin"][kind], program["queue_begin"][kind + 1]):
                    entry = program["entry"][n]
                    waits = program["wait"][entry["first_wait"] :][: entry["num_waits"]]
                    yield (
                        lambda step=step, stage=stage, waits=waits: (
                            not all(self._arrived(rank, step, stage, wait) for wait in waits)
                        )
                    )
                    self._run(rank, step, stage, entry, program["signal"])

    def _exchanged(self, span, writer: int, reader: int) -> slice:
        """What of a span goes from one rank to another: in two shots what the reader sums, then what the writer has."""
        tensor = self.plan.tensors[span.tensor]
        if tensor.shares == "all":
            return slice(span.lo, span.hi)
        share, owner = tensor.extent // self.plan.tp, reader if tensor.shares == "scattered" else writer
        lo, hi = max(span.lo, owner * share), min(span.hi, (owner + 1) * share)
        return slice(lo, max(lo, hi))

    def _arrived(self, rank: int, step: int, stage: int, wait) -> bool:
        before = int(wait["back"]) > stage
        at = stage - int(wait["back"]) + (len(self.templates) if before else 0)
        total = self.emitted.programs.event_total[self.templates[at]][wait["event"]]
        wanted = (step - before) * total + int(wait["count"])
        return self.counters[rank][at, wait["event"]] >= wanted

    def _run(self, rank: int, step: int, stage: int, entry, signal) -> None:
        group = self.emitted.step.templates[self.templates[stage]].groups[entry["group"]]
        task, now = group.tasks[entry["task"]], step * len(self.templates) + stage
        for span in task.reads:
            if span.tensor in self.inbox[rank]:
                wanted = step * len(self.templates) + self.written[stage, group.name, span.tensor]
                for writer in self.ranks:
                    found = self.inbox[rank][span.tensor][writer, self._exchanged(span, writer, rank)]
                    assert (found == wanted).all(), f"{group.name} reads {span} of {set(found.flat)} in {now}"
        for span in task.writes:
            for peer in self.ranks:
                if span.tensor in self.inbox[peer]:
                    self.inbox[peer][span.tensor][rank, self._exchanged(span, rank, peer)] = now
        if group.task == "argmax_reduce" and rank == 0:
            self.published = [n + 1 for n in self.published]
        for event in signal[entry["first_signal"] :][: entry["num_signals"]]:
            peers = self.ranks if self.emitted.programs.events[event] in self.from_peers else [rank]
            for peer in peers:
                self.counters[peer][stage, event] += 1


def emitted(spec: str, tp: int):
    return emit(plan(load_spec(spec), size="tiny", target="h100", context=128, tp=tp))


def in_two_shots(spec: str, tp: int):
    made = child(spec, schedule=[{"set": {"*": {"all_reduce": "two_shot"}}}])
    return emit(plan(made, size="tiny", target="h100", context=128, tp=tp))


@pytest.mark.parametrize(("spec", "tp"), [("qwen3", 2), ("qwen3", 4), ("qwen3", 8), ("llama3", 2), ("qwen2_5", 2)])
def test_the_ranks_run_to_the_end_and_read_what_they_should(spec, tp):
    made = emitted(spec, tp)
    machine = Machine(made, made.programs.from_peers, seed=tp, first_step=5)
    machine.run()
    assert [n - 5 for n in machine.published] == [STEPS + 1] * tp


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_so_do_they_with_sums_in_two_shots(tp):
    made = in_two_shots("qwen3", tp)
    assert {t.shares for t in made.plan.tensors.values()} == {"all", "scattered", "gathered"}
    Machine(made, made.programs.from_peers, seed=tp, first_step=5).run()


@pytest.mark.parametrize("case", ["layers and head", "all"])
def test_so_do_they_where_nothing_is_fused(case):
    made = emit(plan(spec_without(case), size="tiny", target="h100", context=128, tp=2))
    assert any(g.task == "all_reduce" for t in made.step.templates for g in t.groups)
    Machine(made, made.programs.from_peers, seed=3, first_step=5).run()


def test_every_count_of_a_peers_signal_is_needed():
    made = emitted("qwen3", 2)
    for name in sorted(made.programs.from_peers):
        with pytest.raises(AssertionError, match="deadlock"):
            Machine(made, made.programs.from_peers - {name}, seed=1).run()


def test_events_of_an_inbox_are_the_ones_that_peers_signal():
    made = emitted("qwen3", 2)
    groups = {name.partition(".done")[0] for name in made.programs.from_peers}
    assert groups == {"o_add", "down_add", "head"}
    two = in_two_shots("qwen3", 2)
    assert {name.partition(".done")[0] for name in two.programs.from_peers} == {
        "o_add", "attention.o.all_reduce", "down_add", "mlp.down.all_reduce", "head",
    }  # fmt: skip
    for name in sorted(two.programs.from_peers):
        with pytest.raises(AssertionError, match="deadlock"):
            Machine(two, two.programs.from_peers - {name}, seed=1).run()
    assert emitted("qwen3", 1).programs.from_peers == frozenset()
