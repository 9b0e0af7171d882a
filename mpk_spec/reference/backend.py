"""The CPU backend: the plan executed by torch. Slow beside a GPU, exact in its rounding, and everywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mpk_spec.errors import UserError
from mpk_spec.planner.plan import Plan

if TYPE_CHECKING:
    import torch


class ReferenceBackend:
    """`runtime.backend.Backend` over an `Executor`; one sequence, in slot 0."""

    name = "cpu"

    def __init__(self, plan: Plan, checkpoint, progress=None):
        from mpk_spec.reference.executor import Executor

        self.plan = plan
        self.executor = Executor(plan, checkpoint, progress)
        self.context = plan.context
        decode = plan.steps["decode"]
        tasks = sum(len(g.tasks) for s in decode.stages for g in decode.templates[s.template].groups)
        ranks = f"{plan.tp} ranks in one process, " if plan.tp > 1 else ""
        size = f"{len(decode.stages)} stages, {tasks} tasks a token, context {self.context}"
        self.description = f"cpu reference, {ranks}{size}"
        nodes = (n for t in decode.templates for g in t.groups for n in g.nodes)
        self._logits = next(n.inputs[0] for n in nodes if n.op == "argmax_partial")
        self._cached: list[int] = []

    @property
    def vocab_size(self) -> int:
        head = next(w for w in self.plan.weights.values() if w.kind == "embedding")
        return head.full_shape[0]

    def stream(self, ids: Sequence[int], *, max_new_tokens: int, stop: frozenset[int] = frozenset()) -> Iterator[int]:
        if not ids:
            raise UserError("there is nothing to continue: no token ids were given")
        if len(ids) > self.context:
            raise UserError(f"{len(ids)} tokens do not fit a context of {self.context}", "a larger context: -c")
        known = _common(self._cached, ids[:-1])
        self._cached = list(ids[:known])
        token = self._prefill(list(ids[known:]))
        for made in range(max_new_tokens):
            yield token
            if token in stop or made + 1 == max_new_tokens or len(self._cached) == self.context:
                return
            token = self._decode(token)

    def _prefill(self, ids: list[int]) -> int:
        """Reads the prompt in chunks; returns the token after it."""
        chunk = self.plan.steps["prefill"].tokens
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            self._step("prefill", part, last_only=True)
        return self._sampled()

    def _decode(self, token: int) -> int:
        self._step("decode", [token])
        return self._sampled()

    def _step(self, kind: str, ids: list[int], last_only: bool = False) -> None:
        import torch

        from mpk_spec.reference.executor import StepInput

        start = len(self._cached)
        self.last_row = torch.tensor([len(ids) - 1])
        rows = self.last_row if last_only else None
        positions = torch.arange(start, start + len(ids))
        step = StepInput(torch.tensor(ids), positions, torch.zeros_like(positions), kind == "decode")
        with torch.inference_mode():
            self.executor.run(kind, step, rows=rows)
        self._cached += ids

    def _sampled(self) -> int:
        return int(self.executor.value(self.plan.feeds["token_ids"], self.last_row))

    def logits(self, ids: Sequence[int], *, last: int | None = None, alone: int = 0) -> torch.Tensor:
        import torch

        from mpk_spec.runtime.backend import pieces

        self.reset()
        chunk, parts = self.plan.steps["prefill"].tokens, []
        unread = len(ids) - (len(ids) if last is None else last)
        for lo, hi in pieces(0, unread, chunk, 0):
            self._step("prefill", list(ids[lo:hi]), last_only=True)
        for lo, hi in pieces(unread, len(ids), chunk, alone):
            self._step("decode" if lo >= len(ids) - alone else "prefill", list(ids[lo:hi]))
            parts.append(self.executor.value(self._logits)[:, : self.vocab_size])
        return torch.cat(parts)

    def reset(self) -> None:
        self._cached = []

    def close(self) -> None:
        self._cached = []
        self.executor.ranks.clear()


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n
