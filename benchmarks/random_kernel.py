"""The kernel of a model with random weights, for the benchmarks: of any degree, with other rules, without fusions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mpk_spec.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from mpk_spec.emit.compiler import Compiled
    from mpk_spec.planner.plan import Plan
    from mpk_spec.runtime.cuda_backend import CudaBackend
    from mpk_spec.schema import Spec
    from mpk_spec.weights import RandomCheckpoint

STARTED = time.perf_counter()
TIMEOUT_S = 3.0  # of a kernel that hangs


def say(what: str) -> None:
    """With the seconds since the program began."""
    print(f"  [{time.perf_counter() - STARTED:6.2f} s] {what}", flush=True)


def target_here(needed: bool) -> str:
    """What plans for this machine's GPU are made for. Where there is none, NoGpu if it is `needed`, else h100."""
    from mpk_spec.runtime import select
    from mpk_spec.runtime.cuda_device import NoGpu

    try:
        return select.target_here()[0].name
    except NoGpu:
        if needed:
            raise
        return "h100"


def spec_of(model: str) -> tuple[Spec, str]:
    """The spec and the size that SPEC:SIZE names."""
    from mpk_spec.schema import load_spec

    name, _, size = model.partition(":")
    spec = load_spec(name)
    if size not in spec.sizes:
        hint = did_you_mean(size, spec.sizes, "sizes") if size else f"{name}:SIZE, one of {', '.join(spec.sizes)}"
        raise UserError(f"'{model}' names no size of '{spec.name}'", hint)
    return spec, size


def ruled(spec: Spec, rules: Sequence[str]) -> Spec:
    """The spec with rules for `*`, as in crossing=event, or for one group, as in gate_up.launch=dynamic."""
    from pydantic import ValidationError

    from mpk_spec.schema.models import Settings
    from mpk_spec.tuner.space import with_rules

    words: dict[str, dict] = {}
    for rule in rules:
        name, equals, value = rule.partition("=")
        if not equals:
            raise UserError(f"'{rule}' is no rule", "KEY=VALUE or GROUP.KEY=VALUE, as in in_flight=32768")
        group, _, key = name.rpartition(".")
        if key not in Settings.model_fields:
            raise UserError(f"the schedule has no rule '{key}'", did_you_mean(key, Settings.model_fields, "rules"))
        number = int(value) if value.isdecimal() else value
        words.setdefault(group or "*", {})[key] = [number] if key in ("grid", "block") else number
    try:
        return with_rules(spec, words) if words else spec
    except ValidationError as error:
        wrong = {f"{part['loc'][2]}: {part['msg'][0].lower()}{part['msg'][1:]}" for part in error.errors()}
        raise UserError(f"rules that cannot be: {'; '.join(sorted(wrong))}") from None


def unfused(spec: Spec, without: Sequence[str]) -> Spec:
    """The spec with fusions left out, as in o_add, or with less of them, as in attend=attention.cache,attention.a."""
    from mpk_spec.tuner.space import with_rules

    settings = {}
    for word in without:
        name, _, operators = word.partition("=")
        if name not in spec.fusions:
            raise UserError(f"there is no fusion '{name}'", did_you_mean(name, spec.fusions, "fusions"))
        kept, known = operators.split(",") if operators else [], spec.fusions[name].of
        if strange := next((o for o in kept if o not in known), None):
            hint = did_you_mean(strange, known, "operators")
            raise UserError(f"the fusion '{name}' has no operator '{strange}'", hint)
        settings[name] = {"fuse": kept or False}
    return with_rules(spec, settings) if settings else spec


def planned(
    model: str, *, target: str, tp: int = 1, context: int = 512, rules: Sequence[str] = (), without: Sequence[str] = ()
) -> Plan:
    """`rules`, `without`: see `ruled` and `unfused`."""
    from mpk_spec.planner import plan

    spec, size = spec_of(model)
    return plan(unfused(ruled(spec, rules), without), size=size, target=target, tp=tp, context=context)


def compiled(plan: Plan, defines: tuple[str, ...] = ()) -> Compiled:
    """The plan's kernel, which the cache of cubins then has; needs no GPU. defines: see `CudaBackend`."""
    from mpk_spec.emit.source import emit
    from mpk_spec.runtime.cuda_rank import compile_for
    from mpk_spec.runtime.transport import wanted_transport

    transport = "nvshmem" if plan.tp > 1 and wanted_transport() == "nvshmem" else "peer"
    return compile_for(transport, emit(plan), defines)


def described(found: Compiled) -> str:
    report = found.report
    how = "from the cache" if found.cached else f"compiled in {report.seconds} s"
    return f"{report.registers} registers, {report.spill_bytes} bytes spilled, {how}"


def open_random(plan: Plan, seed: int = 0, defines: tuple[str, ...] = ()) -> tuple[CudaBackend, RandomCheckpoint]:
    """The kernel on `plan.tp` GPUs, whose ranks each draw their weights, and what they are drawn from.

    defines: see `CudaBackend`. Each step is said before it is tried.
    """
    from mpk_spec.runtime.parallel_backend import open_kernel
    from mpk_spec.runtime.random_model import checkpoint_of_plan

    def progress(what: str, done: int, total: int) -> None:
        if done <= 1:
            say(what)

    checkpoint = checkpoint_of_plan(plan, seed)
    backend = open_kernel(plan, checkpoint, progress, defines=defines)
    if plan.tp > 1:
        backend.ranks.call("configure", TIMEOUT_S)
    else:
        backend.launcher.timeout_s = TIMEOUT_S
    say(f"ready: {described(backend.compiled)}; {backend.description}")
    return backend, checkpoint
