from __future__ import annotations

import time

import pytest
import torch

from mpk_spec.perf import rivals
from mpk_spec.runtime.random_model import random_checkpoint
from mpk_spec.schema import load_spec
from mpk_spec.weights import load_hf_model


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return load_hf_model(random_checkpoint(load_spec("qwen3"), "tiny", 0), "float32")


def known_cache(rival, like):
    """The same keys and values in both kinds of cache."""
    for layer, (keys, values) in zip(rival.layers, like, strict=True):
        layer.keys[:, :, : keys.shape[2]].copy_(keys)
        layer.values[:, :, : values.shape[2]].copy_(values)


def test_a_static_cache_gives_the_tokens_of_the_growing_one(model):
    torch.manual_seed(0)  # of the caches' fillings: some make the tiny model say one token for ever
    with torch.no_grad():
        eager = rivals.Eager(model, context=40, tokens=8)
        static = rivals.Compiled(model, context=40, tokens=8)
        assert eager.start == static.start == 36
        known_cache(static.cache, [(layer.keys, layer.values) for layer in eager.filled.layers])
        static.step = static.forward  # compiled code is the subject of another test
        first = list(eager.decode(8))
        assert first == list(static.decode(8))
        assert first == list(eager.decode(8)) == list(static.decode(8))  # both start anew each time
        assert len(set(first)) > 1


def test_the_step_is_one_graph_for_every_position(model):
    """What torch.compile makes of it is run with eager kernels: only the capture differs from the GPU's."""
    captured = []

    def keep(graph, inputs):
        captured.append(graph)
        return graph.forward

    with torch.no_grad():
        static = rivals.Compiled(model, context=20, tokens=4)
        static.step = torch.compile(static.forward, backend=keep, fullgraph=True, dynamic=False)
        compiled = [*static.decode(4), *static.decode(4)]
        static.step = static.forward
        assert compiled == [*static.decode(4), *static.decode(4)]
    assert len(captured) == 1
    torch.compiler.reset()


def test_a_rival_is_timed_from_token_to_token(model, monkeypatch):
    class Slow:
        def __init__(self, model, context, tokens):
            self.made = (context, tokens)
            time.sleep(0.02)

        def decode(self, count):
            for _ in range(count):
                time.sleep(0.003)
                yield 1

    monkeypatch.setitem(rivals.RIVALS, "eager", Slow)
    found = rivals.time_rival("eager", model, context=128, tokens=64, repeats=2)
    assert found.tokens == rivals.EAGER_TOKENS
    assert 3 <= found.ms_min <= found.ms <= found.ms_max < 30
    assert found.setup_s > 0.03
