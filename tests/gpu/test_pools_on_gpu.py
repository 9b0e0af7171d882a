"""Claim pools on a GPU: the bits of a plan with queues, launch after launch, whoever claims what."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu.models import TIMEOUT_S, check_lost_signal, ids_of

from mpk_spec.runtime.cuda_probe import DEFECTS, DELAYS, Probe, find_place

pytestmark = pytest.mark.gpu

CONTEXT = 256
LAYER = ("qkv", "o_add", "gate_up", "down_add")
# spec, size, what is claimed, tasks of each (None: as planned)
CASES = {
    "tiny, gate_up": ("qwen3", "tiny", ("gate_up",), None),
    "tiny, all": ("qwen3", "tiny", (*LAYER, "head"), None),
    "tiny, few tasks": ("qwen3", "tiny", LAYER, 3),
    "0.6b, gate_up in two tasks an SM": ("qwen3", "0.6b", ("gate_up",), 264),
    "0.6b, all": ("qwen3", "0.6b", (*LAYER, "head"), None),
    "smollm2, all": ("smollm2", "135m", LAYER, None),
}


def opened(gpu: str, checkpoint, case: str, claimed: bool, defines: tuple[str, ...] = ()):
    from mpk_spec.planner import plan
    from mpk_spec.runtime.cuda_backend import CudaBackend
    from mpk_spec.schema import load_spec
    from mpk_spec.tuner.space import with_rules

    name, size, groups, tasks = CASES[case]
    grid = {"grid": [tasks, 1, 1], "partition": "balanced"} if tasks else {}
    spec = with_rules(load_spec(name), {g: {"launch": "dynamic", **grid} for g in groups} if claimed else {})
    backend = CudaBackend(
        plan(spec, size=size, target=gpu, context=CONTEXT), checkpoint or random_of(name, size), defines=defines
    )
    assert bool(backend.emitted.programs.pools) == claimed
    backend.launcher.timeout_s = TIMEOUT_S
    return backend


def random_of(name: str, size: str):
    from mpk_spec.runtime.random_model import random_checkpoint
    from mpk_spec.schema import load_spec

    return random_checkpoint(load_spec(name), size, 0)


@pytest.fixture(scope="module", params=CASES)
def both(gpu, request) -> Iterator[tuple]:
    """With queues, and with pools."""
    name, size, *_ = CASES[request.param]
    checkpoint = random_of(name, size)
    backends = [opened(gpu, checkpoint, request.param, claimed) for claimed in (False, True)]
    yield *backends, request.param
    for backend in backends:
        backend.close()


def test_pools_have_the_bits_of_queues(both):
    """In steps of 16 tokens and of one, each step a launch."""
    queues, pools, _ = both
    ids = ids_of(pools, 109)
    wanted = queues.logits(ids)
    assert wanted.isfinite().all()
    assert torch.equal(pools.logits(ids), wanted)
    assert torch.equal(pools.logits(ids, alone=60), wanted)


def test_answers_are_those_of_queues_launch_after_launch(both):
    """Also where a launch was stopped within a step, when loaders had claimed of the next one."""
    queues, pools, _ = both
    prompt = ids_of(pools, 37)
    wanted = list(queues.stream(prompt, max_new_tokens=150))
    for cut in (1, 5, 40):
        pools.reset()
        stream = pools.stream(prompt, max_new_tokens=150)
        assert [next(stream) for _ in range(cut)] == wanted[:cut]
        stream.close()
        pools.reset()
        assert list(pools.stream(prompt, max_new_tokens=150)) == wanted
    queues.reset()


def test_events_may_pass_the_ends_of_their_numbers(both):
    queues, pools, _ = both
    prompt = ids_of(pools, 20)
    queues.reset()
    wanted = list(queues.stream(prompt, max_new_tokens=12))
    total = max(t for row in pools.emitted.programs.event_total for t in row)
    try:
        for start in (2**31, 2**32):
            pools.reset()
            pools.launcher.reset_events(start // total - 6)
            assert list(pools.stream(prompt, max_new_tokens=12)) == wanted
    finally:
        pools.launcher.reset_events()


@pytest.mark.parametrize("case", ["tiny, gate_up", "tiny, all", "tiny, few tasks", "0.6b, all"])
def test_delays_change_no_bit_and_a_lost_signal_is_said(gpu, case):
    backend = opened(gpu, None, case, True, (DELAYS, DEFECTS))
    ids = ids_of(backend, 90)
    prompt = ids[:20]
    wanted, answer = backend.logits(ids, last=60, alone=40), None
    backend.launcher.probe = probe = Probe(backend.emitted, backend.memory.arena.device)
    for seed in (0, 1, 2, 3):  # 0: no delays
        probe.delay_seed = seed
        assert torch.equal(backend.logits(ids, last=60, alone=40), wanted), seed
        backend.reset()
        made = list(backend.stream(prompt, max_new_tokens=40))
        answer = answer or made
        assert made == answer, seed
    probe.delay_seed = 0
    probe.defect, probe.at = "dropped-signal", find_place(backend.emitted, "gate_up", stage=1, task=2)
    check_lost_signal(backend, prompt)
    probe.defect = None
    assert list(backend.stream(prompt, max_new_tokens=40)) == answer
    backend.close()
