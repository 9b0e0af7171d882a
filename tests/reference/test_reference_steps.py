"""A token's bits depend neither on its neighbours, nor on the chunk it came in, nor on the number of ranks' tasks."""

from __future__ import annotations

import pytest
import torch
from tiny_specs import executor_of, forced, planned, spec_of, step_input, tokens

from mpk_spec.reference.executor import StepInput


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "qwen3_moe"])
def test_chunk_sizes(name):
    spec, ids = spec_of(name), tokens(90)
    first, *others = (forced(executor_of(spec, chunk=chunk), ids, 90) for chunk in (64, 16, 7))
    for other in others:
        assert torch.equal(first, other)


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "qwen3_moe"])
def test_sixteen_sequences_in_one_step(name):
    """Sequences of different lengths, decoded together, give each what it gets alone."""
    spec = spec_of(name)
    together, alone = executor_of(spec, batch=16), executor_of(spec)
    prompts = [tokens(3 + 5 * slot, seed=slot) for slot in range(16)]
    for slot, ids in enumerate(prompts):
        forced(together, ids[:-1], len(ids) - 1, slot=slot)
    last = torch.tensor([ids[-1] for ids in prompts])
    positions = torch.tensor([len(ids) - 1 for ids in prompts])
    with torch.inference_mode():
        together.run("decode", StepInput(last, positions, torch.arange(16), True))
    got = together.value("logits")
    for slot, ids in enumerate(prompts):
        alone.reset()
        want = forced(alone, ids, len(ids) - 1)[-1]
        assert torch.equal(got[slot, :515], want), slot
        assert together.value("next_ids")[slot].item() == want.argmax()


def test_several_sequences_in_one_prefill_step():
    spec = spec_of("qwen3")
    together, alone = executor_of(spec, batch=2, chunk=24), executor_of(spec)
    a, b = tokens(10, seed=3), tokens(14, seed=4)
    at = torch.cat((torch.arange(10), torch.arange(14)))
    with torch.inference_mode():
        together.run("prefill", StepInput(torch.tensor(a + b), at, torch.tensor([0] * 10 + [1] * 14), False))
    got = together.value("logits")[:, :515]
    for ids, rows in ((a, got[:10]), (b, got[10:])):
        alone.reset()
        assert torch.equal(rows, forced(alone, ids, len(ids)))


def test_several_tokens_of_a_sequence_in_one_step():
    """A verify step of four tokens is four decode steps."""
    spec, ids = spec_of("gemma3"), tokens(34)
    made = planned(spec, steps=("decode", "prefill", "verify"))
    one, other = executor_of(spec, made), executor_of(spec, made)
    want = forced(one, ids, 30)[30:]
    forced(other, ids[:30], 30)
    with torch.inference_mode():
        other.run("verify", step_input(ids[30:], 30, True))
    assert torch.equal(other.value("logits")[:, :515], want)


def test_only_the_rows_wanted():
    """The head for the last token alone is the last row of the head for all."""
    spec, ids = spec_of("qwen3"), tokens(16)
    executor = executor_of(spec)
    with torch.inference_mode():
        executor.run("prefill", step_input(ids, 0, False))
        want = executor.value("next_ids")[-1].item()
        executor.reset()
        executor.run("prefill", step_input(ids, 0, False), rows=torch.tensor([15]))
    assert executor.value("next_ids", torch.tensor([15])).item() == want


def test_degrees_agree():
    """Sums over ranks are added in another order, so bits differ; the numbers must not."""
    spec, ids = spec_of("llama3"), tokens(24)
    one, four = (forced(executor_of(spec, tp=tp), ids, 20) for tp in (1, 4))
    assert (one - four).abs().max() < 0.02 * one.abs().max()
