"""Attention over a paged cache in splits, against float64 written as in the textbook."""

from __future__ import annotations

import pytest
import torch

from mpk_spec.ops import all_ops
from mpk_spec.ops.base import Scope, round_to
from mpk_spec.planner.plan import State
from mpk_spec.reference.attend import append, attend
from mpk_spec.reference.executor import StepInput
from mpk_spec.reference.state import Cache, Rank

KV_HEADS, GROUP, WIDTH, CONTEXT = 2, 3, 16, 256
STATE = State("kv", KV_HEADS, WIDTH, 1, CONTEXT, 2, dtype="f32", extent=KV_HEADS)


def textbook(q, k, v, positions, scale, window, softcap):
    """`q [tokens, heads, width]`, `k`, `v [positions, kv heads, width]`, all float64."""
    out = torch.empty_like(q)
    for token, position in enumerate(positions.tolist()):
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(q.shape[1]):
            keys, values = (t[first : position + 1, head // GROUP] for t in (k, v))
            scores = keys @ q[token, head] * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[token, head] = scores.softmax(0) @ values
    return out


def rank_of() -> Rank:
    rank = Rank(None, 0, {})
    empty = torch.full((1, 2, KV_HEADS, CONTEXT, WIDTH), float("nan"))
    rank.caches["kv"] = Cache(empty.clone(), empty.clone(), STATE.dtype)
    return rank


def computed(q, k, v, start, splits, values, decode=False) -> torch.Tensor:
    """The cache filled up to the last token, in two steps, then attention of the last `len(q)` tokens and its merge."""
    rank, heads = rank_of(), range(KV_HEADS)
    positions = torch.arange(len(k))
    for lo, hi in ((0, start), (start, len(k))):
        step = StepInput(positions[lo:hi], positions[lo:hi], torch.ones(hi - lo, dtype=torch.int64), decode)
        for split in range(splits):
            append(rank, STATE, None, heads, (split, splits), k[lo:hi].flatten(1), v[lo:hi].flatten(1), step)
    parts = [attend(rank, STATE, None, heads, (n, splits), q.flatten(1), values, step) for n in range(splits)]
    if splits == 1:
        return parts[0].unflatten(-1, (-1, WIDTH))
    fields = {"kv_splits": splits, "heads": KV_HEADS * GROUP, "head_dim": WIDTH}
    merge = all_ops()["attention_merge"].model_construct(input="a", **fields)
    joined = torch.cat(parts, -1)
    return merge.compute([joined], {}, Scope(span=(0, KV_HEADS * GROUP * WIDTH))).unflatten(-1, (-1, WIDTH))


@pytest.mark.parametrize("splits", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("window", "softcap", "scale"), [(None, None, 0.25), (70, None, 0.25), (5, 20.0, 0.4), (1, None, 1.0)]
)
@pytest.mark.parametrize("decode", [False, True])
def test_against_float64(splits, window, softcap, scale, decode):
    torch.manual_seed(0)
    count = 150
    k, v = (torch.randn(count, KV_HEADS, WIDTH) for _ in range(2))
    q = round_to(torch.randn(count, KV_HEADS * GROUP, WIDTH) * 2, "bf16")
    values = {"scale": scale, "window": window, "softcap": softcap}
    start = 131
    got = computed(q[start:], k, v, start, splits, values, decode)
    exact = (t.double() for t in (q[start:], k, v))
    want = textbook(*exact, torch.arange(start, count), scale, window, softcap)
    assert (got - want).abs().max() < 2e-6 * 10


def test_a_split_that_sees_nothing_counts_for_nothing():
    """Three positions lie in the first block: the other splits have no maximum."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 6, WIDTH), torch.randn(3, 2, WIDTH), torch.randn(3, 2, WIDTH)
    values = {"scale": 0.25}
    one, four = (computed(q, k, v, 2, splits, values, True) for splits in (1, 4))
    assert torch.isfinite(four).all() and torch.allclose(one, four, atol=1e-6)


def test_sequences_do_not_mix():
    """Two sequences in one step see their own caches."""
    torch.manual_seed(0)
    rank, heads = rank_of(), range(KV_HEADS)
    slots = torch.tensor([0, 1, 0, 1])
    step = StepInput(slots, torch.tensor([0, 0, 1, 1]), slots, False)
    k, v, q = (torch.randn(4, n, WIDTH) for n in (2, 2, 6))
    append(rank, STATE, None, heads, (0, 1), k.flatten(1), v.flatten(1), step)
    out = attend(rank, STATE, None, heads, (0, 1), q.flatten(1), {"scale": 0.25}, step).unflatten(-1, (-1, WIDTH))
    for slot in (0, 1):
        rows = (slots == slot).nonzero()[:, 0]
        exact = (t[rows].double() for t in (q, k, v))
        assert torch.allclose(out[rows].double(), textbook(*exact, torch.arange(2), 0.25, None, None), atol=1e-5)


def test_append_rounds_to_the_cache():
    rank, state = rank_of(), State("kv", KV_HEADS, WIDTH, 1, CONTEXT, 2)
    rank.caches["kv"].dtype = "bf16"
    k, v = torch.randn(3, 32), torch.randn(3, 32)
    step = StepInput(torch.zeros(3), torch.tensor([70, 71, 72]), torch.ones(3, dtype=torch.int64), False)
    append(rank, state, None, range(2), (0, 1), k, v, step)
    cache = rank.caches["kv"]
    assert torch.equal(cache.keys[0, 1, :, 70:73], k.bfloat16().float().unflatten(-1, (2, WIDTH)).transpose(0, 1))
    assert torch.equal(cache.values[0, 1, :, 70:73], v.bfloat16().float().unflatten(-1, (2, WIDTH)).transpose(0, 1))
    assert int((~cache.keys.isnan()).sum()) == 3 * 32
    append(rank, state, None, range(2), (0, 2), k + 1, v, step)  # these positions belong to split 1
    assert torch.equal(cache.keys[0, 1, :, 70:73], k.bfloat16().float().unflatten(-1, (2, WIDTH)).transpose(0, 1))


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("decode", [False, True])
def test_a_head_alone_has_the_same_bits(splits, decode):
    """As a task computes it, beside all heads at once; and tokens of one step, beside each in a step of its own."""
    torch.manual_seed(0)
    rank, heads, start = rank_of(), range(KV_HEADS), 197
    k, v = (torch.randn(200, KV_HEADS * WIDTH) for _ in range(2))
    q = torch.randn(3, KV_HEADS * GROUP * WIDTH)
    positions = torch.arange(200)
    whole = StepInput(positions, positions, torch.ones_like(positions), decode)
    last = StepInput(positions[start:], positions[start:], torch.ones(3, dtype=torch.int64), decode)
    for split in ((n, splits) for n in range(splits)):
        append(rank, STATE, None, heads, split, k, v, whole)
        both = attend(rank, STATE, None, heads, split, q, {"scale": 0.25}, last)
        for head in heads:
            mine = slice(*(h * GROUP * WIDTH for h in (head, head + 1)))
            one = attend(rank, STATE, None, range(head, head + 1), split, q[:, mine], {"scale": 0.25}, last)
            assert torch.equal(one, both.unflatten(-1, (KV_HEADS, -1))[:, head])
        for n in range(3):
            step = StepInput(*(t[n : n + 1] for t in (last.ids, last.positions, last.slots)), decode)
            alone = attend(rank, STATE, None, heads, split, q[n : n + 1], {"scale": 0.25}, step)
            assert torch.equal(alone[0], both[n])
