"""One place that knows which backends there are and opens the one that was asked for."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from mpk_spec.errors import UserError, did_you_mean
from mpk_spec.progress import quiet

if TYPE_CHECKING:
    from mpk_spec.planner.plan import Plan
    from mpk_spec.planner.targets import Target
    from mpk_spec.progress import Progress
    from mpk_spec.runtime.backend import Backend
    from mpk_spec.runtime.built import Build
    from mpk_spec.schema import Spec
    from mpk_spec.weights import Checkpoint

BACKENDS = ("auto", "cuda", "cpu", "torch")
DEFAULT_CONTEXT = 4096  # positions; a conversation rarely needs more, and a KV cache costs memory for each
SEEN_RUNNING = ("sm_90a",)  # architectures that "auto" gives the kernel to; the others only compile it so far


def open_backend(
    spec: Spec,
    size: str | None,
    checkpoint: Checkpoint,
    backend: str = "auto",
    context: int | None = None,
    progress: Progress = quiet,
    build: Build | None = None,
    tp: int = 1,
) -> Backend:
    """The model of `checkpoint`, ready to run as `spec` says, or as the plan of `build` does.

    `backend`: one of `BACKENDS`; what "auto" chose is said in one line on standard error.
    `progress(stage, done, total)` hears of what takes long.
    `tp`: ranks: GPUs, each with a process of its own; on the CPU all in this process. A build's own number.
    `context`: positions of the KV cache; None takes `DEFAULT_CONTEXT`, or what the model was made for if that is less.
    Raises UserError for a backend that this machine or version lacks and for a context past the model's positions.
    """
    if backend not in BACKENDS:
        raise UserError(f"there is no backend '{backend}'", hint=did_you_mean(backend, BACKENDS, "backends"))
    if build is not None:
        check_degree(build, tp)
        return open_built(build, checkpoint, backend, context, progress)
    context = choose_context(context, checkpoint.config)
    if backend == "auto":
        backend, why = choose_backend(spec, size, checkpoint, context, tp)
        print(f"backend: {backend}, chosen since {why} (--backend chooses)", file=sys.stderr)
    return OPENERS[backend](spec, size, checkpoint, context, progress, tp)


def choose_degree(wanted: int | None, build: Build | None = None) -> int:
    """Ranks to run on, from what was asked for, what torchrun started, and what a build was made for."""
    import os

    if wanted is not None:
        return wanted
    return int(os.environ.get("WORLD_SIZE", str(build.plan.tp if build else 1)))


def check_degree(build: Build, tp: int) -> None:
    """Raises UserError where a build is for another number of ranks."""
    if tp != build.plan.tp:
        ranks = "one rank" if build.plan.tp == 1 else f"{build.plan.tp} ranks"
        raise UserError(f"{build.folder} was built for {ranks}, {tp} asked for", f"build it again with --tp {tp}")


def open_built(
    build: Build, checkpoint: Checkpoint, backend: str, context: int | None, progress: Progress = quiet
) -> Backend:
    """A build on its GPU (`auto`, `cuda`), its plan on the CPU (`cpu`), or Hugging Face beside it (`torch`)."""
    plan = build.plan
    if context not in (None, plan.context):
        raise UserError(
            f"{build.folder} was built for a context of {plan.context}, {context} was asked for",
            f"build it again with -c {context}",
        )
    choose_context(plan.context, checkpoint.config)
    if backend == "torch":
        return _open_torch(None, None, checkpoint, plan.context, progress, 1)
    if backend == "cpu":
        from mpk_spec.reference.backend import ReferenceBackend

        return ReferenceBackend(plan, checkpoint, progress)
    from mpk_spec.runtime.engine import Engine

    return Engine(plan, checkpoint, progress=progress, build=build)


def choose_context(wanted: int | None, config: dict) -> int:
    """Positions to hold, from what was asked for and what the model was made for."""
    from mpk_spec.weights import text_config

    most = text_config(config).get("max_position_embeddings")
    if wanted is None:
        return min(DEFAULT_CONTEXT, most or DEFAULT_CONTEXT)
    if most is not None and wanted > most:
        raise UserError(f"a context of {wanted} is more than the {most} positions that this model was made for")
    return wanted


def choose_backend(spec: Spec, size: str | None, checkpoint: Checkpoint, context: int, tp: int = 1) -> tuple[str, str]:
    """("cuda" or "cpu", why): the GPU if there is one and the kernel can run this model on it."""
    from mpk_spec.emit.compiler import nvrtc_version
    from mpk_spec.emit.source import emit
    from mpk_spec.planner.targets import find_target

    try:
        plan = plan_for_gpu(spec, size, checkpoint, context, tp)
        emit(plan)
        nvrtc_version()
    except UserError as error:
        return "cpu", error.message
    arch = find_target(plan.target).arch
    if arch not in SEEN_RUNNING:
        return "cpu", f"the kernel was never run on {arch}; '--backend cuda' tries it, 'compare' judges it"
    return "cuda", "there is a GPU that runs this plan" if tp == 1 else f"there are {tp} GPUs that run this plan"


def target_here() -> tuple[Target, Any]:
    """(what plans for this machine's GPU are made for, the GPU's properties). UserError where there is none."""
    import torch

    from mpk_spec.planner.targets import target_of
    from mpk_spec.runtime.cuda_device import find_device

    found = torch.cuda.get_device_properties(find_device())
    return target_of(found.name, f"sm_{found.major}{found.minor}", found.multi_processor_count), found


def plan_for_gpu(spec: Spec, size: str | None, checkpoint: Checkpoint, context: int, tp: int = 1) -> Plan:
    """The plan for this machine's GPUs. Raises UserError where there are too few, or none that plans are made for."""
    from mpk_spec.planner import plan_for

    if tp > 1:
        from mpk_spec.runtime.parallel_backend import check_gpus

        check_gpus(tp)
    target, _ = target_here()
    return plan_for(checkpoint, spec, size, target=target.name, tp=tp, context=context)


def _open_cuda(spec, size, checkpoint, context, progress, tp) -> Backend:
    from mpk_spec.runtime.engine import Engine

    return Engine(plan_for_gpu(spec, size, checkpoint, context, tp), checkpoint, progress=progress)


def _open_cpu(spec, size, checkpoint, context, progress, tp) -> Backend:
    from mpk_spec.planner import plan_for
    from mpk_spec.runtime.engine import Engine

    made = plan_for(checkpoint, spec, size, target="cpu", tp=tp, context=context)
    return Engine(made, checkpoint, progress=progress)


def _open_torch(spec, size, checkpoint, context, progress, tp) -> Backend:
    if tp > 1:
        raise UserError("the backend 'torch' runs on one rank", "--backend cuda or cpu")
    import torch
    from transformers.utils import logging

    from mpk_spec.runtime.torch_backend import TorchBackend
    from mpk_spec.weights import load_hf_model

    logging.disable_progress_bar()  # ours says what is being loaded
    progress("loading the model", 0, 0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return TorchBackend(load_hf_model(checkpoint, dtype="bfloat16", device=device), context)


OPENERS = {"cuda": _open_cuda, "cpu": _open_cpu, "torch": _open_torch}
