"""The truth about a checkpoint: Hugging Face in float32, and how far from it Hugging Face in bf16 is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING

from mpk_spec.errors import UserError
from mpk_spec.runtime.cuda_device import free_gpu
from mpk_spec.runtime.torch_backend import cache_name
from mpk_spec.testing.metrics import Metrics, Verdict, tally
from mpk_spec.weights.checkpoint import on_device

if TYPE_CHECKING:
    import torch

    from mpk_spec.runtime.backend import Backend
    from mpk_spec.weights import Checkpoint

POSITIONS, SEEDS = 2000, 4
SPARE_BYTES = 2 << 30  # of GPU memory: libraries and what torch keeps for later
AT_ONCE = 4096  # tokens; longer sequences are read in pieces, since scores of all of their positions would not fit
PIECE = 1024
SMALL = 5_000_000  # parameters: threads that wait for one another cost more than they save


def sequences(
    vocab: int, positions: int = POSITIONS, seeds: int = SEEDS, context: int = 512, whole: bool = False
) -> list[list[int]]:
    """Random token ids: at least `positions` of them in `seeds` or more sequences of at most `context`, all as long.

    whole: each is `context` long however few positions are wanted; the last ones are then the ones to judge.
    """
    import torch

    count = max(seeds, -(-positions // context))
    length = context if whole else wanted(positions, count, context)
    drawn = [torch.Generator().manual_seed(seed) for seed in range(count)]
    return [torch.randint(0, vocab, (length,), generator=generator).tolist() for generator in drawn]


def wanted(positions: int, count: int, context: int) -> int:
    """Positions to judge of each of `count` sequences of at most `context`."""
    return min(context, max(1, -(-positions // count)))


class Yardstick:
    """True logits of some sequences, and the distance of the rival: what any number of backends can be held against.

    checkpoint: read twice, once per dtype; the two Hugging Face models are never in memory together.
    last: positions of each sequence that are judged (default: all); the others are only read.
    progress: called with (what, done, total).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ids: list[list[int]],
        progress: Callable = lambda *_: None,
        last: int | None = None,
    ):
        self.ids, self.last = ids, len(ids[0]) if last is None else last
        self.parameters = need_memory(checkpoint, len(ids) * self.last)
        with self.threads():
            self.truth = list(_huggingface(checkpoint, ids, self.last, "float32", progress))
            free_gpu()
            rival = _huggingface(checkpoint, ids, self.last, "bfloat16", progress)
            self._rival = tally(zip(self.truth, rival, strict=True))
            del rival  # and with it the model
        free_gpu()

    @property
    def rival(self) -> Metrics:
        return self._rival.metrics()

    def judge(self, backend: Backend, progress: Callable = lambda *_: None, alone: int = 0) -> Verdict:
        """How `backend` does on the same ids. alone: of each sequence's last positions, computed token by token."""
        with self.threads():
            logits = _each(
                lambda ids: backend.logits(ids, last=self.last, alone=alone), self.ids, "running ours", progress
            )
            ours = tally(zip(self.truth, logits, strict=True))
        rows = self._alone(alone) if alone else None
        part = Verdict(self._rival.metrics(rows), ours.metrics(rows)) if alone else None
        return Verdict(self.rival, ours.metrics(), part)

    def measure(self, backend: Backend, progress: Callable = lambda *_: None) -> Metrics:
        return self.judge(backend, progress).ours

    def _alone(self, alone: int) -> torch.Tensor:
        import torch

        return (torch.arange(self.last) >= self.last - alone).repeat(len(self.ids))

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


def _huggingface(checkpoint: Checkpoint, ids: list[list[int]], last: int, dtype: str, progress: Callable):
    """float32 logits of each sequence's last positions by transformers' own model, `[last, vocab]` on the CPU."""
    import torch
    from transformers.utils import logging

    from mpk_spec.weights import load_hf_model, stream_hf_model

    logging.disable_progress_bar()  # ours says what is being run
    device = "cuda" if torch.cuda.is_available() else "cpu"
    what = f"running Hugging Face in {dtype}"
    whole = fits_here(checkpoint, ids, last, dtype)
    model = (load_hf_model if whole else stream_hf_model)(checkpoint, dtype=dtype, device=device)

    if whole:
        yield from _each(lambda sequence: _last_logits(model, [sequence], last, device)[0], ids, what, progress)
    else:  # all in one batch: the weights are read once
        progress(f"{what}, layer by layer", 0, 0)
        yield from _last_logits(model, ids, last, device)


def _last_logits(model, batch: list[list[int]], last: int, device: str) -> torch.Tensor:
    """float32 `[sequences, last, vocab]` on the CPU. Long sequences are read in pieces, whose scores fit."""
    import torch
    from transformers import DynamicCache

    with torch.inference_mode():
        given = torch.tensor(batch, device=device)
        length, parts = given.shape[1], []
        if length <= AT_ONCE:
            return model(input_ids=given, use_cache=False, logits_to_keep=last).logits.float().cpu()
        cache = {cache_name(model): DynamicCache(config=model.config)}
        for lo in range(0, length, PIECE):
            piece = given[:, lo : lo + PIECE]
            wanted = min(piece.shape[1], lo + piece.shape[1] - (length - last))
            out = model(input_ids=piece, use_cache=True, logits_to_keep=max(1, wanted), **cache)
            if wanted > 0:
                parts.append(out.logits[:, -wanted:].float().cpu())
        return torch.cat(parts, 1)


def fits_here(checkpoint: Checkpoint, ids: list[list[int]], last: int, dtype: str) -> bool:
    """Whether the model is run as a whole. On a GPU if it `fits`, and what is read of files before it gets there fits
    into the host's memory; on the CPU always (`need_memory` was asked before)."""
    import torch

    if not torch.cuda.is_available():
        return True
    from_files = on_device(checkpoint, "cuda") is checkpoint
    free = free_memory() if from_files else None
    return (free is None or count_parameters(checkpoint) * 2 < free) and fits(checkpoint, ids, last, dtype)


def fits(checkpoint: Checkpoint, ids: list[list[int]], last: int, dtype: str) -> bool:
    """Whether the model, the tensors that it is made from, its activations and logits fit into free GPU memory."""
    import torch

    from mpk_spec.weights import text_config

    size = {"float32": 4, "bfloat16": 2}[dtype]
    config = text_config(checkpoint.config)
    wide = 4 * config.get("intermediate_size", 0) + 12 * config["hidden_size"]  # values of a token alive at once
    length = len(ids[0])
    in_pieces = length > AT_ONCE
    needed = count_parameters(checkpoint) * (size + 2) + last * config["vocab_size"] * 8
    needed += (PIECE if in_pieces else length) * wide * size
    if in_pieces:
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        kept = 2 * config.get("num_key_value_heads", heads) * head_dim * config["num_hidden_layers"]
        needed += length * (kept * size + PIECE * heads * (size + 4))  # the cache, and scores before and after softmax
    free, _ = torch.cuda.mem_get_info()
    return needed + SPARE_BYTES < free


def _each(logits: Callable, ids: list[list[int]], what: str, progress: Callable):
    for done, sequence in enumerate(ids):
        progress(what, done, len(ids))
        yield logits(sequence)
    progress(what, len(ids), len(ids))


def need_memory(checkpoint: Checkpoint, positions: int) -> int:
    """The number of parameters. Raises UserError where the float32 truth does not fit into the host's memory: its
    logits, and where no GPU holds the weights, or reads them layer by layer, these as read and in float32."""
    import torch

    from mpk_spec.weights import text_config

    parameters = count_parameters(checkpoint)
    weights = 0 if torch.cuda.is_available() else parameters * (4 + 2)
    needed = weights + positions * text_config(checkpoint.config)["vocab_size"] * 4
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
