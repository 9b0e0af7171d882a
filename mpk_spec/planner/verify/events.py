"""Thresholds: a wait is for all signals of an event instance, not fewer (no order follows) and not more (never comes).

An event instance is one event of one stage. A task that writes peers' inboxes signals on all ranks, so its signals
count `tp` times.
"""

from __future__ import annotations

from collections.abc import Sequence

from mpk_spec.planner.verify.code import Code
from mpk_spec.planner.verify.report import Report


def check_declared(code: Code, report: Report) -> None:
    """What a template says of its events is what its tasks do."""
    where = f"{code.kind}, template '{code.template.name}'"
    for event, said in code.template.events.items():
        total = code.totals.get(event, 0)
        if said != total:
            report.add(f"{where}: event '{event}' is said to get {said} signals and gets {total}")
    for event in code.totals.keys() - code.template.events.keys():
        report.add(f"{where}: {code.name(code.signallers[event][0])} signals '{event}', which is not declared")


class Thresholds:
    """Checks waits against the stages that they look back to, once per pair of templates."""

    def __init__(self, report: Report):
        self.report = report
        self.seen: set[tuple[int, int, int]] = set()

    def check(self, code: Code, before: Sequence[Code], where: str) -> None:
        """`before` are the codes of the stages before this one, the last of them next to it."""
        reach = {w.stage for g in code.template.groups for t in g.tasks for w in t.waits}
        for stage in sorted(reach):
            if stage > 0:
                self.report.add(f"{where}: waits on a stage to come ({stage:+d})")
                continue
            if -stage > len(before):
                continue  # before the first step: nothing ran, nothing to wait for
            source = code if stage == 0 else before[stage]
            key = (id(code), id(source), stage)
            if key not in self.seen:
                self.seen.add(key)
                self._check_pair(code, source, stage, where)

    def _check_pair(self, code: Code, source: Code, stage: int, where: str) -> None:
        for g, group in enumerate(code.template.groups):
            for t, task in enumerate(group.tasks):
                for wait in task.waits:
                    if wait.stage != stage:
                        continue
                    name = f"{where}: {code.name(code.offsets[g] + t)}"
                    total = source.totals.get(wait.event, 0)
                    key = (where, group.name, wait.event, stage)
                    of = f"'{wait.event}'" + (f" of template '{source.template.name}'" if stage else "")
                    if not total:
                        self.report.add(f"{name} waits for {of}, which nothing signals", *key)
                    elif wait.count > total:
                        said = f"{wait.count} signals of {of}, which gets {total}: never reached"
                        self.report.add(f"{name} waits for {said}", *key)
                    elif wait.count < total:
                        said = f"{wait.count} of the {total} signals of {of}: no particular task is known to be done"
                        self.report.add(f"{name} waits for {said}", *key)
