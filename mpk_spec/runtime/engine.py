"""`Engine(plan, weights)`: a plan with weights, ready to run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mpk_spec.errors import UserError
from mpk_spec.planner.plan import Plan

if TYPE_CHECKING:
    import torch

    from mpk_spec.runtime.backend import Backend
    from mpk_spec.runtime.built import Build


class Engine:
    """Runs a plan: on the CPU if it was made for the target `cpu`, else on the GPU, or on `plan.tp` of them.

    Several GPUs have a process each: this one is rank 0 and starts the others (unless torchrun did); `close` ends them.

    weights: a `Checkpoint` (see `mpk_spec.weights`) or a state dict already in memory, names as Hugging Face has them,
    whose tensors are used where they lie. progress: called with (what, done, total) while loading.
    build: the compiled kernel of a folder that `mpk-spec build` made of `plan`, for the GPU.
    Raises UserError where a weight is missing or of another shape, where the checkpoint has tensors that nothing reads,
    and for a machine or a plan that the kernel cannot run on.
    """

    def __init__(self, plan: Plan, weights: Any, *, progress=None, build: Build | None = None):
        from mpk_spec.reference.state import unread_tensors

        if isinstance(weights, Mapping):
            from mpk_spec.weights import StateDictCheckpoint

            weights = StateDictCheckpoint(weights, plan.architecture, plan.config)
        unread = unread_tensors(plan, weights)
        if unread:
            shown = ", ".join(unread[:3]) + (", ..." if len(unread) > 3 else "")
            raise UserError(
                f"{weights.source}: spec '{plan.spec}' reads no weight from {len(unread)} tensors: {shown}",
                "another spec may fit; tensors that may stay unread belong in the spec's model.ignore",
            )
        self.plan = plan
        self.backend: Backend = self._make(plan, weights, progress, build)

    @staticmethod
    def _make(plan: Plan, checkpoint: Any, progress, build: Build | None) -> Backend:
        if plan.target != "cpu":
            from mpk_spec.runtime.parallel_backend import open_kernel

            return open_kernel(plan, checkpoint, progress, build=build)
        from mpk_spec.reference.backend import ReferenceBackend

        return ReferenceBackend(plan, checkpoint, progress)

    def __getattr__(self, name: str) -> Any:
        if name == "backend":
            raise AttributeError(name)
        return getattr(self.backend, name)

    def stream(self, ids: Sequence[int], *, max_new_tokens: int, stop: frozenset[int] = frozenset()) -> Iterator[int]:
        """See `Backend.stream`."""
        return self.backend.stream(ids, max_new_tokens=max_new_tokens, stop=stop)

    def logits(self, ids: Sequence[int], *, last: int | None = None, alone: int = 0) -> torch.Tensor:
        """See `Backend.logits`."""
        return self.backend.logits(ids, last=last, alone=alone)
