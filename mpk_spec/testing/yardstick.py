"""The truth about a checkpoint: Hugging Face in float32, and how far from it Hugging Face in bf16 is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING

from mpk_spec.errors import UserError
from mpk_spec.testing.metrics import Metrics, Verdict, measure

if TYPE_CHECKING:
    import torch

    from mpk_spec.runtime.backend import Backend
    from mpk_spec.weights import Checkpoint

POSITIONS, SEEDS = 2000, 4
SMALL = 5_000_000  # parameters: threads that wait for one another cost more than they save


def sequences(vocab: int, positions: int = POSITIONS, seeds: int = SEEDS, context: int = 512) -> list[list[int]]:
    """Random token ids: at least `positions` of them in `seeds` or more sequences of at most `context`, all as long."""
    import torch

    count = max(seeds, -(-positions // context))
    length = max(1, -(-positions // count))
    drawn = [torch.Generator().manual_seed(seed) for seed in range(count)]
    return [torch.randint(0, vocab, (length,), generator=generator).tolist() for generator in drawn]


class Yardstick:
    """True logits of some sequences, and the distance of the rival: what any number of backends can be held against.

    checkpoint: read twice, once per dtype; the two Hugging Face models are never in memory together.
    progress: called with (what, done, total).
    """

    def __init__(self, checkpoint: Checkpoint, ids: list[list[int]], progress: Callable = lambda *_: None):
        self.ids = ids
        self.parameters = need_memory(checkpoint, sum(map(len, ids)))
        with self.threads():
            self.truth = list(_huggingface(checkpoint, ids, "float32", progress))
            rival = _huggingface(checkpoint, ids, "bfloat16", progress)
            self.rival: Metrics = measure(zip(self.truth, rival, strict=True))

    def judge(self, backend: Backend, progress: Callable = lambda *_: None) -> Verdict:
        """How `backend` does on the same ids."""
        return Verdict(self.rival, self.measure(backend, progress))

    def measure(self, backend: Backend, progress: Callable = lambda *_: None) -> Metrics:
        with self.threads():
            return measure(zip(self.truth, _each(backend.logits, self.ids, "running ours", progress), strict=True))

    def threads(self):
        """`threads_for` the model."""
        return threads_for(self.parameters)


@contextmanager
def threads_for(parameters: int) -> Iterator[None]:
    """Inside it torch uses as many threads as a model of that size is worth."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1 if parameters < SMALL else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def count_parameters(checkpoint: Checkpoint) -> int:
    return sum(prod(checkpoint.shape(name)) for name in checkpoint.names())


def _huggingface(checkpoint: Checkpoint, ids: list[list[int]], dtype: str, progress: Callable):
    """float32 logits of each sequence by transformers' own model."""
    import torch
    from transformers.utils import logging

    from mpk_spec.weights import load_hf_model

    logging.disable_progress_bar()  # ours says what is being run
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_hf_model(checkpoint, dtype=dtype, device=device)

    def logits(sequence: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            batch = torch.tensor([sequence], device=device)
            return model(input_ids=batch, use_cache=False).logits[0].float().cpu()

    yield from _each(logits, ids, f"running Hugging Face in {dtype}", progress)


def _each(logits: Callable, ids: list[list[int]], what: str, progress: Callable):
    for done, sequence in enumerate(ids):
        progress(what, done, len(ids))
        yield logits(sequence)
    progress(what, len(ids), len(ids))


def need_memory(checkpoint: Checkpoint, positions: int) -> int:
    """The number of parameters. Raises UserError where the float32 truth does not fit: weights twice, and logits."""
    from mpk_spec.weights import text_config

    parameters = count_parameters(checkpoint)
    needed = parameters * (4 + 2) + positions * text_config(checkpoint.config)["vocab_size"] * 4
    free = free_memory()
    if free is not None and needed > free:
        raise UserError(
            f"the truth, Hugging Face in float32, needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free",
            "a smaller size of the spec has the same operators; fewer --positions need less for their logits",
        )
    return parameters


def free_memory() -> int | None:
    """Bytes that programs can still take; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
