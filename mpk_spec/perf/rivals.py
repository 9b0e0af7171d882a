"""What a decode step costs elsewhere, on the same weights and the same GPU: Hugging Face's model, three ways.

eager    the model as it is, with its growing cache
compile  torch.compile(mode="reduce-overhead", fullgraph=True) over a static cache: as Hugging Face's guide sets it up
graph    torch.compile(mode="max-autotune-no-cudagraphs"), the sample included, captured as one CUDA graph by hand: no
         work for the host but the replay

All start from a cache filled at random, so that a long context needs no long prompt, and read each token on the host
as whoever prints it must.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from mpk_spec.perf.clock import start_of
from mpk_spec.runtime.torch_backend import cache_name

if TYPE_CHECKING:
    import torch

EAGER_TOKENS = 16  # at tens of milliseconds each
ROUND = 64  # positions of a static cache: odd lengths cost attention its fast kernels
WARM_UP = 4  # steps: compile, record, replay


@dataclass(frozen=True)
class RivalTimes:
    """Milliseconds per token as the host sees them; `setup_s`: until the first token at full speed."""

    ms: float
    ms_min: float
    ms_max: float
    setup_s: float
    tokens: int

    def data(self) -> dict[str, Any]:
        return {k: round(v, 5) if isinstance(v, float) else v for k, v in asdict(self).items()}


def time_rival(name: str, model, context: int, tokens: int, repeats: int) -> RivalTimes:
    """`model`: a transformers causal model on the GPU (or, to test this, on the CPU). name: one of `RIVALS`."""
    import torch

    tokens = min(tokens, EAGER_TOKENS) if name == "eager" else tokens
    started = time.perf_counter()
    with torch.no_grad():  # as generate() has it: compiled CUDA graphs want tensors that count their versions
        rival = RIVALS[name](model, context, tokens)
        _pace(rival.decode(WARM_UP))
        setup = time.perf_counter() - started
        paces = [_pace(rival.decode(tokens + 1)) for _ in range(repeats)]
    torch.compiler.reset()  # the next rival compiles on its own
    return RivalTimes(median(paces), min(paces), max(paces), setup, tokens)


def _pace(tokens: Iterator[int]) -> float:
    """Milliseconds from token to token."""
    seen = [time.perf_counter() for _ in tokens]
    return (seen[-1] - seen[0]) / (len(seen) - 1) * 1e3


class Eager:
    """transformers' own forward pass and growing cache."""

    def __init__(self, model, context: int, tokens: int):
        from transformers import DynamicCache

        self.model, self.start = model, start_of(context, tokens)
        self.filled = DynamicCache(config=model.config)
        self.named = {cache_name(model): self.filled}
        model(input_ids=_token(model), use_cache=True, **self.named)  # shapes, dtype and device
        for layer in self.filled.layers:
            layer.keys, layer.values = (_filled(t, self.start) for t in (layer.keys, layer.values))

    def decode(self, count: int) -> Iterator[int]:
        token = _token(self.model)
        for _ in range(count):
            out = self.model(input_ids=token, use_cache=True, logits_to_keep=1, **self.named)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            yield int(token)
        self.filled.crop(-count)


class Static:
    """A static cache, filled from its start on; `step` appends one token and gives the next."""

    def __init__(self, model, context: int, tokens: int):
        from transformers import StaticCache

        self.model, self.start = model, start_of(context, tokens)
        room = self.start + max(tokens, WARM_UP) + 1
        self.cache = StaticCache(config=model.config, max_cache_len=-(-room // ROUND) * ROUND)
        self.named = {cache_name(model): self.cache}
        model(input_ids=_token(model), use_cache=True, **self.named)  # allocates its tensors
        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()

    def rewind(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.start)

    def forward(self, token: torch.Tensor) -> torch.Tensor:
        out = self.model(input_ids=token, use_cache=True, **self.named)
        return out.logits[:, -1].argmax(-1, keepdim=True)


class Compiled(Static):
    """CUDA graphs by torch.compile itself."""

    mode = "reduce-overhead"

    def __init__(self, model, context: int, tokens: int):
        import torch

        super().__init__(model, context, tokens)
        self.step: Callable = torch.compile(self.forward, fullgraph=True, dynamic=False, mode=self.mode)

    def decode(self, count: int) -> Iterator[int]:
        self.rewind()
        token = _token(self.model)
        for _ in range(count):
            token = self.step(token).clone()  # a graph's output is overwritten by its next run
            yield int(token)


class Graphed(Static):
    """One CUDA graph, captured by hand: forward pass, sample, and the token fed back."""

    mode = "max-autotune-no-cudagraphs"

    def __init__(self, model, context: int, tokens: int):
        import torch

        super().__init__(model, context, tokens)
        step = torch.compile(self.forward, mode=self.mode, fullgraph=True, dynamic=False)
        self.token = _token(model)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and lets libraries allocate what they need
            for _ in range(WARM_UP):
                self.rewind()
                step(self.token)
        torch.cuda.current_stream().wait_stream(side)
        self.rewind()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.token.copy_(step(self.token))

    def decode(self, count: int) -> Iterator[int]:
        self.rewind()
        for _ in range(count):
            self.graph.replay()
            yield int(self.token)


RIVALS: dict[str, type] = {"eager": Eager, "compile": Compiled, "graph": Graphed}


def _token(model) -> torch.Tensor:
    import torch

    return torch.tensor([[17 % model.config.get_text_config().vocab_size]], device=model.device)


def _filled(like: torch.Tensor, positions: int) -> torch.Tensor:
    """Random keys or values `[batch, heads, positions, head_dim]`."""
    return like.new_empty((*like.shape[:2], positions, like.shape[3])).normal_()
