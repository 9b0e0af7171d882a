"""Our side of a comparison: a backend on the checkpoint, with a defect planted in it if one is asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mpk_spec.errors import UserError

if TYPE_CHECKING:
    from mpk_spec.planner.plan import Plan
    from mpk_spec.runtime.backend import Backend
    from mpk_spec.runtime.built import Build
    from mpk_spec.schema import Spec
    from mpk_spec.testing.defects import Defect
    from mpk_spec.weights import Checkpoint

CHUNKS = 8  # at least so many steps a sequence: most of it is read back from the cache


def plan_ours(
    spec: Spec, size: str | None, checkpoint: Checkpoint, context: int, tp: int = 1, defect: Defect | None = None
) -> Plan:
    """The plan that is judged, for the CPU; proved, unless a defect is planted in it."""
    from mpk_spec.planner import plan_for

    changed = spec if defect is None else defect.spec(spec)
    made = plan_for(
        checkpoint,
        changed,
        size,
        target="cpu",
        tp=tp,
        context=context,
        chunk=max(16, context // CHUNKS),
        verified=defect is None,
    )
    # a dropped operator leaves its weights unread, which would be refused
    return made if defect is None else replace(defect.plan(made), ignore=(*made.ignore, "*"))


def open_ours(
    spec: Spec,
    size: str | None,
    checkpoint: Checkpoint,
    backend: str = "cpu",
    context: int = 512,
    tp: int = 1,
    defect: Defect | None = None,
    build: Build | None = None,
) -> Backend:
    """A backend to judge. Raises UserError for what it cannot do: a defect or a degree that only plans have.

    build: what `mpk-spec build` made; `spec` is not looked at then.
    """
    if build is not None:
        from mpk_spec.runtime.select import check_degree, open_built

        check_degree(build, tp)
        return open_built(build, checkpoint, backend, None)
    if backend == "cpu":
        return _cpu(plan_ours(spec, size, checkpoint, context, tp, defect), checkpoint, defect)
    if defect is not None and backend == "cuda" and tp == 1:
        return _cuda(spec, size, checkpoint, context, defect)
    if defect is not None:
        raise UserError(f"defects are planted into plans; the backend '{backend}' runs none", "--backend cpu")
    if tp > 1 and backend != "cuda":
        raise UserError(f"the backend '{backend}' runs on one rank", "--backend cpu runs all ranks in one process")
    from mpk_spec.runtime.select import open_backend

    return open_backend(spec, size, checkpoint, backend, context, tp=tp)


def _cuda(spec: Spec, size: str | None, checkpoint: Checkpoint, context: int, defect: Defect) -> Backend:
    """The kernel with a defect in its plan or its packed weights; what it holds beside them is not the executor's."""
    from mpk_spec.runtime.cuda_backend import CudaBackend
    from mpk_spec.runtime.select import plan_for_gpu

    if defect.executor is not None:
        raise UserError(f"'{defect.name}' changes what the CPU's executor holds: the kernel has none", "--backend cpu")
    made = defect.plan(plan_for_gpu(defect.spec(spec), size, checkpoint, context))
    return CudaBackend(made, defect.weights(checkpoint, made))


def _cpu(plan: Plan, checkpoint: Checkpoint, defect: Defect | None) -> Any:
    from mpk_spec.runtime.engine import Engine

    if defect is None:
        return Engine(plan, checkpoint)
    engine = Engine(plan, defect.weights(checkpoint, plan))
    if defect.executor is not None:
        engine.backend.executor = defect.executor(engine.backend.executor)
    return engine
