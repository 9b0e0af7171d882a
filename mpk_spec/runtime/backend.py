"""What every backend offers: megakernel, CPU reference and Hugging Face look the same to chat and compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Backend(Protocol):
    """A loaded model that turns token ids into token ids.

    A backend keeps the KV cache of the ids it has seen. Given ids that start as the cached ones do, it computes only
    the rest, so a chat turn costs its new tokens alone.
    """

    name: str  # "cuda", "cpu" or "torch"
    description: str  # one line for people: "cpu, 30 layers, 163 tasks a layer, context 2048"
    context: int  # positions that the KV cache holds
    vocab_size: int

    def stream(self, ids: Sequence[int], *, max_new_tokens: int, stop: frozenset[int] = frozenset()) -> Iterator[int]:
        """Yields greedy continuations of `ids`, one token at a time.

        Ends after a token of `stop` (which is yielded), after `max_new_tokens`, or when the context is full.
        Closing the iterator stops the work within one step and keeps the cache usable.
        Raises UserError where `ids` alone does not fit the context.
        """
        ...

    def logits(self, ids: Sequence[int], *, last: int | None = None, alone: int = 0) -> torch.Tensor:
        """Teacher-forced logits, float32 `[last, vocab_size]`, from an empty cache.

        last: positions that are wanted, at the end (default: all). alone: how many of them, the final ones, are
        computed token by token, as an answer's are; the others in chunks, as a prompt's.
        """
        ...

    def reset(self) -> None:
        """Forgets the cached ids."""
        ...

    def close(self) -> None:
        """Frees what the backend holds; it cannot be used afterwards."""
        ...


def pieces(lo: int, hi: int, chunk: int, alone: int) -> list[tuple[int, int]]:
    """The positions from `lo` to `hi` in chunks, the final `alone` of them one by one."""
    edge = max(lo, hi - alone)
    return [(n, min(n + chunk, edge)) for n in range(lo, edge, chunk)] + [(n, n + 1) for n in range(edge, hi)]
