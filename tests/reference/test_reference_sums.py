"""Sums over ranks in two shots have the bits of those in one, on every rank; each rank adds up only its share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_specs import SPECS, child, executor_of, forced, planned, spec_of, tokens

from mpk_spec.errors import SpecError
from mpk_spec.planner.targets import TARGETS

IDS = tokens(70)


def in_two_shots(name: str):
    return child(name, schedule=[{"set": {"*": {"all_reduce": "two_shot"}}}])


def scattered(made) -> list[str]:
    return [n for n, t in made.tensors.items() if t.shares == "scattered"]


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("name", SPECS)
def test_two_shots_give_the_bits_of_one(name, tp):
    spec, two = spec_of(name), in_two_shots(name)
    if tp not in degrees(spec):
        pytest.skip(f"the tiny {name} does not divide into {tp}")
    made = planned(two, tp=tp, chunk=64)
    assert len(scattered(made)) == 2
    ours = executor_of(two, made)
    assert torch.equal(forced(ours, IDS, 66), forced(executor_of(spec, tp=tp, chunk=64), IDS, 66))
    gathered = [n for n, t in made.tensors.items() if t.shares == "gathered"]
    assert len(gathered) == 2
    for value in gathered:
        assert all(torch.equal(rank.buffers[value], ours.ranks[0].buffers[value]) for rank in ours.ranks)


def degrees(spec) -> tuple[int, ...]:
    found = []
    for tp in (2, 4, 8):
        try:
            planned(spec, tp=tp, verified=False)
        except SpecError:
            continue
        found.append(tp)
    return tuple(found)


@pytest.mark.parametrize(("name", "tp"), [("qwen3", 2), ("qwen3", 4), ("qwen3_moe", 2), ("gemma3", 2)])
def test_any_legal_order(name, tp, monkeypatch):
    """Task by task in a random order, on poisoned buffers: no rank reads what it was not sent."""
    monkeypatch.setitem(TARGETS, "h100", replace(TARGETS["h100"], num_sms=11))
    spec = in_two_shots(name)
    made = planned(spec, target="h100", chunk=48, context=200, tp=tp)
    straight, shuffled = executor_of(spec, made), executor_of(spec, made)
    want = forced(straight, IDS, 68)
    assert torch.isfinite(want).all()
    assert torch.equal(forced(shuffled, IDS, 68, shuffle=7), want)
    share = made.tensors[scattered(made)[0]].extent // tp
    for rank in shuffled.ranks:
        held = rank.buffers[scattered(made)[0]]
        own = held[..., rank.index * share : (rank.index + 1) * share]
        assert own.isfinite().all() and held.isfinite().sum() == own.numel()


def test_one_sum_in_one_shot_and_one_in_two():
    spec = child("qwen3", schedule=[{"set": {"o_add": {"all_reduce": "two_shot"}}}])
    made = planned(spec, tp=2, chunk=64)
    assert scattered(made) == ["attention.o"]
    assert torch.equal(
        forced(executor_of(spec, made), IDS, 66), forced(executor_of(spec_of("qwen3"), tp=2, chunk=64), IDS, 66)
    )
    other = child("qwen3", schedule=[{"set": {"down_add": {"all_reduce": "two_shot"}}}])
    made = planned(other, tp=2, chunk=64)
    assert scattered(made) == ["mlp.down"]
    assert torch.equal(
        forced(executor_of(other, made), IDS, 66), forced(executor_of(spec_of("qwen3"), tp=2, chunk=64), IDS, 66)
    )
