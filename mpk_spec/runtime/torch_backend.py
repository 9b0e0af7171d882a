"""The `torch` backend: Hugging Face's own model with its KV cache. What the others are held against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mpk_spec.errors import UserError

if TYPE_CHECKING:
    import torch


class TorchBackend:
    """A `transformers` causal language model behind the interface of `mpk_spec.runtime.backend.Backend`."""

    name = "torch"

    def __init__(self, model, context: int):
        """`model`: a `PreTrainedModel` in evaluation mode; `context`: positions that a conversation may take."""
        self.model = model
        self.context = context
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        kind = type(model).__name__
        self.description = f"torch, {kind} of transformers, {model.dtype} on {model.device}, context {context}"
        self.reset()

    def reset(self) -> None:
        self._cache = None
        self._ids: list[int] = []  # the ids whose keys and values are in the cache

    def close(self) -> None:
        self.reset()
        self.model = None

    def stream(self, ids: Sequence[int], *, max_new_tokens: int, stop: frozenset[int] = frozenset()) -> Iterator[int]:
        check_fits(len(ids), self.context)
        pending = self._keep_common_prefix(list(ids))
        length = len(ids)
        for _ in range(max_new_tokens):
            token = int(self._forward(pending).argmax())
            yield token
            length += 1
            if token in stop or length >= self.context:
                return
            pending = [token]

    def logits(self, ids: Sequence[int], *, last: int | None = None, alone: int = 0) -> torch.Tensor:
        import torch

        check_fits(len(ids), self.context + 1)  # no answer follows
        wanted = len(ids) if last is None else last
        if not alone:
            with torch.inference_mode():
                batch = torch.tensor([list(ids)], device=self.model.device)
                return self.model(input_ids=batch, use_cache=False, logits_to_keep=wanted).logits[0].float()
        self.reset()
        edge = len(ids) - alone
        parts = [self._forward(list(ids[:edge]), wanted - alone)] if edge else []
        parts += [self._forward([token], 1) for token in ids[edge:]]
        self.reset()
        return torch.cat(parts)

    def _keep_common_prefix(self, ids: list[int]) -> list[int]:
        """Crops the cache to what it shares with `ids`; returns the rest, at least one id, to have a logit."""
        common = 0
        for ours, theirs in zip(self._ids, ids[:-1], strict=False):
            if ours != theirs:
                break
            common += 1
        surplus = len(self._ids) - common
        if common == 0:
            self.reset()
        elif surplus:
            self._cache.crop(-surplus)  # a negative length means "remove so many" in every transformers 5
            del self._ids[common:]
        return ids[common:]

    def _forward(self, ids: list[int], last: int = 1) -> torch.Tensor:
        """Appends `ids` to the cache; returns the logits after the last ones, `[last, vocab_size]`."""
        import torch
        from transformers import DynamicCache

        if self._cache is None:
            # Without a config every layer keeps all positions, also those with a sliding window, so it can be cropped.
            self._cache = DynamicCache()
        seen, self._ids = self._ids, []  # an exception between layers must leave no half-filled cache behind
        cache, self._cache = self._cache, None
        with torch.inference_mode():
            batch = torch.tensor([ids], device=self.model.device)
            named = {cache_name(self.model): cache}
            out = self.model(input_ids=batch, use_cache=True, logits_to_keep=max(last, 1), **named)
        self._cache, self._ids = cache, seen + ids
        return out.logits[0, len(out.logits[0]) - last :].float()


def cache_name(model) -> str:
    """The name of forward's cache: transformers is renaming it, and a name that it does not know goes unnoticed."""
    from inspect import signature

    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


def check_fits(length: int, context: int) -> None:
    """Raises UserError where a prompt of `length` tokens leaves no position of `context` for an answer."""
    if length == 0:
        raise UserError("the prompt is empty: there is nothing to continue")
    if length >= context:
        raise UserError(
            f"the conversation has {length} tokens and the context holds {context}",
            hint="start with a larger -c, or /clear the conversation",
        )
