"""Proves a plan, from its tasks' spans and program order alone; it shares no code with the passes that made the plan.

Proved: acyclic; no deadlock of queues, rings and claim pools under any assignment; thresholds met exactly; every read
after every write that it needs and every write after every use that it ends (buffer reuse, KV cache, other ranks'
inboxes and the next step of any kind included); partial values summed over the ranks once; limits of the target.

An SM enters a step when the task that ended the one before has said so. That task comes after all appends of its step,
so a task may load what earlier steps put into the KV cache ahead of its events.

Beyond the next step: each task of a step knows all tasks of the step before it (shown for every pair of kinds), hence
of all steps. Where that fails, triples of steps are walked in full and must show it for the step after next.
"""

from __future__ import annotations

from itertools import product

from mpk_spec.planner.plan import Plan
from mpk_spec.planner.verify.code import Code, compile_template
from mpk_spec.planner.verify.data import check_data
from mpk_spec.planner.verify.events import Thresholds, check_declared
from mpk_spec.planner.verify.limits import check_plan, check_template
from mpk_spec.planner.verify.order import find_order
from mpk_spec.planner.verify.partial import check_partial
from mpk_spec.planner.verify.report import PlanError, Proof, Report
from mpk_spec.planner.verify.ring import check_ring
from mpk_spec.planner.verify.walk import Walk, Walked

__all__ = ["PlanError", "Proof", "verify"]


def verify(plan: Plan, full: bool = False) -> Proof:
    """Proves the plan or raises PlanError with every violated property. `full`: without induction over layers."""
    report = Report()
    if not check_plan(plan, report):
        raise PlanError(plan.name, report.messages())
    sound = all([check_template(plan, k, t, report) for k, step in plan.steps.items() for t in step.templates])
    for kind in plan.steps:
        check_partial(plan, kind, report)
    if not sound:
        raise PlanError(plan.name, report.messages())
    codes = {k: [compile_template(plan, k, t) for t in step.templates] for k, step in plan.steps.items()}
    acyclic = True
    for kind, kind_codes in codes.items():
        for index, code in enumerate(kind_codes):
            check_ring(plan, kind, code.template, report)
            check_declared(code, report)
            code.same = next((c for c in kind_codes[:index] if c.same is None and c.like(code)), None)
            acyclic &= find_order(code, report)
    _check_thresholds(plan, codes, report)
    if not acyclic:
        raise PlanError(plan.name, report.messages())
    proof = _prove(plan, codes, report, full)
    check_data(plan, codes, report)
    if report:
        raise PlanError(plan.name, report.messages())
    return proof


def _check_thresholds(plan: Plan, codes: dict[str, list[Code]], report: Report) -> None:
    """All waits of all stages, after a step of every kind."""
    thresholds = Thresholds(report)
    for before, kind in product(plan.steps, plan.steps):
        sequence = [codes[before][s.template] for s in plan.steps[before].stages]
        for stage in plan.steps[kind].stages:
            code = codes[kind][stage.template]
            place = f"layer {stage.layer}" if stage.layer is not None else code.template.name
            thresholds.check(code, sequence, f"{kind}, {place}")
            sequence.append(code)


def _prove(plan: Plan, codes: dict[str, list[Code]], report: Report, full: bool) -> Proof:
    """Walks every pair of step kinds."""
    walks, seen, closed = [], [], True
    for first in plan.steps:
        start = Walk(plan, codes, report, full)
        before = start.run(first)
        seen.append(before)
        for second in plan.steps:
            walk = start.copy()
            after = walk.run(second)
            walks.append(walk)
            seen.append(after)
            closed &= _ordered(plan, before, after)
    if not closed and not report:
        _prove_triples(plan, codes, report)
    examined = sum(len(w.stages) for w in seen)
    induced = sum(w.induced for w in seen)
    return Proof(
        plan=plan.name,
        kinds=tuple(plan.steps),
        transitions=tuple(product(plan.steps, plan.steps)),
        stages=examined + induced,
        examined=examined,
        induced=induced,
        tasks=sum(s.code.size for w in seen for s in w.stages),
        events=sum(len(c.totals) for kind in codes.values() for c in kind),
        reads=sum(w.hazards.reads for w in walks),
        writes=sum(w.hazards.writes for w in walks),
    )


def _ordered(plan: Plan, before: Walked, after: Walked) -> bool:
    """Whether every task of the second step comes after all of the first, so that steps further back need no look.

    Of other ranks: after all of their signals to this one; and some task of the second step, which all of the third
    come after, knows that all is done everywhere.
    """
    if before.bits & ~after.own:
        return False
    if plan.tp == 1:
        return True
    everywhere = any(not before.bits & ~known for known in after.peers_at_end)
    return everywhere and not before.crossing & ~after.peers


def _prove_triples(plan: Plan, codes: dict[str, list[Code]], report: Report) -> None:
    """Three steps in full: the third must come after all of the first, and counters must not run ahead."""
    for kinds in product(plan.steps, repeat=3):
        walk = Walk(plan, codes, report, full=True, keep=True)
        first, second, third = (walk.run(kind) for kind in kinds)
        if kinds[0] == kinds[1]:
            _check_counters(plan, walk, first, second, report)
        late = first.bits & ~third.own
        if plan.tp > 1:
            late |= first.bits & ~third.peers
        if late:
            name = walk.name((late & -late).bit_length() - 1)
            report.add(f"{name} may still run when the {kinds[2]} step after next starts: nothing waits for it")


def _check_counters(plan: Plan, walk: Walk, first: Walked, second: Walked, report: Report) -> None:
    """A counter of the next step's event must not move before all signals of this step's have come."""
    for then, now in zip(first.stages, second.stages, strict=True):
        own, peers = now.known
        for event, signallers in now.code.signallers.items():
            done = sum(1 << (then.base + n) for n in set(signallers))
            for n in signallers:
                late = done & ~own[n]
                if plan.tp > 1 and any(then.code.cross[s] for s in signallers):
                    late |= done & ~peers[n]
                if late:
                    early = walk.name(now.base + n)
                    name = walk.name((late & -late).bit_length() - 1)
                    report.add(f"{early} may signal '{event}' before {name} has", now.code.kind, event, "counter")
