"""What builds for profiling and testing are told and what they leave: the host's side of runtime/probe.cuh.

Such a build is made with `defines` of `PROFILE`, `CONFORM`, `DELAYS`, `DEFECTS`; a `Probe` handed to its launcher says
what to record and what to get wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpk_spec.emit.pools import dynamic_groups
from mpk_spec.emit.source import Emitted
from mpk_spec.errors import UserError
from mpk_spec.planner.cost import kv_of
from mpk_spec.planner.plan import Plan, Task, Template

PROFILE, CONFORM, DELAYS, DEFECTS = "MPK_PROFILE", "MPK_CONFORM", "MPK_DELAYS", "MPK_DEFECTS"

TIMES_FIELDS = ("global_ns", "asked", "ready", "seen", "opened", "waited", "computed", "stored", "signalled")
TIMES = np.dtype([(name, "<u8") for name in TIMES_FIELDS])
LOG_FIELDS = ("kind", "step", "stage", "group", "task", "event", "value", "wanted", "clock")
LOG = np.dtype([(name, "<u4") for name in LOG_FIELDS])
COPIES = np.dtype([(name, "<u4") for name in ("clock", "bytes")])
WAIT, START, SIGNAL = 1, 2, 3  # LogEntry.kind
QUERY_ROWS = 8  # CachePages::rows
LOGS = 2  # of an SM: the scheduler's, the workers'
PROBES = np.dtype(
    [("times", "<u8"), ("log", "<u8"), ("copies", "<u8"), ("copy_capacity", "<u8")]
    + [
        (name, "<u4")
        for name in (
            "trace_step", "trace_steps", "log_capacity", "delay_seed", "defect", "at_stage", "at_group", "at_task",
        )
    ]
)  # fmt: skip
KERNEL_DEFECTS = (
    "dropped-signal", "early-event", "wrong-page", "lost-residual", "late-position", "missing-gain", "wrong-eps",
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A task of the plan. A dropped signal is this task's; an early event concerns all tasks of its group's name."""

    stage: int
    group: int
    task: int


def find_place(emitted: Emitted, group: str, stage: int = 0, task: int = 0) -> Place:
    """The place of a group in a stage. Raises UserError where the stage has no group of that name."""
    step = emitted.step
    template = step.templates[step.stages[stage].template]
    names = [g.name for g in template.groups]
    if group not in names:
        raise UserError(f"stage {stage} has no group '{group}'", f"it has: {', '.join(names)}")
    return Place(stage, names.index(group), task)


def check_defines(plan: Plan, defines: tuple[str, ...]) -> None:
    """UserError for builds that record what a queue's tasks do, where tasks are in no queue."""
    pool = next(dynamic_groups(plan.steps["decode"]), None)
    if pool and (recording := {CONFORM, PROFILE}.intersection(defines)):
        raise UserError(
            f"a kernel whose tasks are claimed at run time ('{pool[2].name}') cannot be built with {min(recording)}",
            "plan it with `launch: static`",
        )


class Probe:
    """Buffers on the GPU and settings for launches of a probing build: set fields, launch, read `times` or `log`."""

    def __init__(self, emitted: Emitted, device, trace_steps: int = 0, log_entries: int = 0):
        """trace_steps: how many steps' times there is room for; log_entries: per SM and role."""
        import torch

        self.emitted, self.trace_steps, self.log_entries = emitted, trace_steps, log_entries
        shape = (trace_steps, emitted.plan.num_sms, len(emitted.step.stages), emitted.programs.max_queue)
        self._times = torch.zeros(*shape, TIMES.itemsize, dtype=torch.uint8, device=device)
        copies = 1 << (trace_steps * _most_copies(emitted) - 1).bit_length() if trace_steps else 0
        self._copies = torch.zeros(emitted.plan.num_sms, copies, COPIES.itemsize, dtype=torch.uint8, device=device)
        self._log = torch.zeros(emitted.plan.num_sms, LOGS, log_entries, LOG.itemsize, dtype=torch.uint8, device=device)
        self.trace_step = 0  # the first step whose times are kept, counted as the launcher counts
        self.delay_seed = 0
        self.defect: str | None = None
        self.at = Place(0, 0, 0)
        torch.cuda.synchronize()

    def record(self) -> np.ndarray:
        """The `PROBES` of a launch."""
        record = np.zeros((), PROBES)
        record["times"], record["log"] = self._times.data_ptr(), self._log.data_ptr()
        record["copies"], record["copy_capacity"] = self._copies.data_ptr(), self._copies.shape[1]
        record["trace_step"], record["trace_steps"] = self.trace_step & 0xFFFFFFFF, self.trace_steps
        record["log_capacity"], record["delay_seed"] = self.log_entries, self.delay_seed
        record["defect"] = 0 if self.defect is None else 1 + KERNEL_DEFECTS.index(self.defect)
        record["at_stage"], record["at_group"], record["at_task"] = self.at.stage, self.at.group, self.at.task
        return record

    def times(self) -> np.ndarray:
        """`TIMES` `[step, SM, stage, place in the SM's queue]` of the steps since the last `clear`."""
        raw = self._times.cpu().numpy()
        return raw.view(TIMES)[..., 0] if raw.size else np.zeros(raw.shape[:-1], TIMES)

    def copies(self) -> np.ndarray:
        """`COPIES` `[SM, copy]` of those steps, in no order; those of no bytes are none."""
        raw = self._copies.cpu().numpy()
        return raw.view(COPIES)[..., 0] if raw.size else np.zeros(raw.shape[:-1], COPIES)

    def log(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each SM the `LOG` entries of its scheduler and of its workers, in the order they were made.

        Raises UserError where one was full: then something may be missing.
        """
        entries = self._log.cpu().numpy().view(LOG)[..., 0]
        found = []
        for sm, (waits, works) in enumerate(entries):
            if any(len(part) and part[-1]["kind"] for part in (waits, works)):
                raise UserError(f"the log of SM {sm} is full after {self.log_entries} entries")
            found.append((waits[waits["kind"] != 0], works[works["kind"] != 0]))
        return found

    def clear(self) -> None:
        import torch

        self._times.zero_()
        self._copies.zero_()
        self._log.zero_()
        torch.cuda.synchronize()


def _most_copies(emitted: Emitted) -> int:
    """How many copies the loader of an SM issues in a step of one token, at most."""
    plan, step = emitted.plan, emitted.step

    def copies(task: Task) -> int:
        caches = [emitted.layout.caches[s.tensor] for s in task.reads if s.tensor in emitted.layout.caches]
        passes = max((-(-cache.group // QUERY_ROWS) for cache in caches), default=0)
        return task.load_chunks + 2 * passes * kv_of(plan, step, task, None, plan.context)[0]

    def of_template(template: Template, sm: int) -> int:
        return sum(copies(template.groups[g].tasks[t]) for g, t in template.queues[sm])

    return max(
        1, *(sum(of_template(step.templates[s.template], sm) for s in step.stages) for sm in range(plan.num_sms))
    )
