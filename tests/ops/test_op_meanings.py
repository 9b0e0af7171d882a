"""What operators compute, against plain torch and transformers' own modules, rounding points included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mpk_spec.ops import all_ops
from mpk_spec.ops.base import Op, Scope, elementwise, round_to, without_rounding


def op(name: str, **fields) -> Op:
    cls = all_ops()[name]
    operand = {"inputs": ["a", "b"]} if "inputs" in cls.model_fields else {"input": "a"}
    return cls.model_construct(**operand, **fields)


def compute(made: Op, *inputs: torch.Tensor, weights=None, span=None, **values) -> torch.Tensor:
    extras = {k: values.pop(k) for k in ("rank", "head_dim", "rope_rows") if k in values}
    return made.compute(
        inputs, weights or {}, Scope(values=values, span=span or (0, inputs[0].shape[-1]), extras=extras)
    )


def bf16(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---- rmsnorm


@pytest.mark.parametrize("width", [32, 96])
def test_rmsnorm_as_qwen3(width):
    """The normalised value is rounded to bf16 before the gain, the product after it."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    theirs = Qwen3RMSNorm(width, eps=1e-5).bfloat16()
    theirs.weight.data = torch.randn(width).bfloat16()
    x = bf16(torch.randn(7, width) * 3)
    ours = compute(op("rmsnorm"), x, weights={"weight": theirs.weight.detach()}, eps=1e-5, weight_offset=0)
    assert torch.equal(bf16(ours), theirs(x.bfloat16()).detach().float())


def test_rmsnorm_as_gemma3():
    """Everything in float32, times (1 + gain), rounded once."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    theirs = Gemma3RMSNorm(96, eps=1e-6).bfloat16()
    theirs.weight.data = torch.randn(96).bfloat16()
    x = bf16(torch.randn(5, 96))
    ours = compute(op("rmsnorm"), x, weights={"weight": theirs.weight.detach()}, eps=1e-6, weight_offset=1)
    assert torch.equal(bf16(ours), theirs(x.bfloat16()).detach().float())


def test_rmsnorm_head_by_head():
    gain, x = torch.randn(16), torch.randn(3, 64)
    ours = compute(op("rmsnorm"), x, weights={"weight": gain}, eps=1e-6, weight_offset=0)
    alone = [compute(op("rmsnorm"), h, weights={"weight": gain}, eps=1e-6, weight_offset=0) for h in x.split(16, -1)]
    assert torch.equal(ours, torch.cat(alone, -1))


def test_rounding_points_can_be_skipped():
    gain, x = torch.randn(32), torch.randn(2, 32)
    exact = F.rms_norm(x, (32,), gain, 1e-6)
    rounded = compute(op("rmsnorm"), x, weights={"weight": gain}, eps=1e-6, weight_offset=0)
    with without_rounding():
        free = compute(op("rmsnorm"), x, weights={"weight": gain}, eps=1e-6, weight_offset=0)
        assert torch.equal(round_to(x, "bf16"), x)
    assert torch.allclose(free, exact, atol=1e-6) and not torch.allclose(rounded, exact, atol=1e-6)
    assert torch.equal(round_to(x, "bf16"), bf16(x)) and torch.equal(round_to(x, "f16"), x.half().float())


# ---- embedding, sums, activations


def test_embedding():
    table, ids = torch.randn(11, 8), torch.tensor([[3], [10], [3]])
    scaled = compute(op("embedding"), ids, weights={"weight": table}, span=(2, 6), scale=5.5)
    assert torch.equal(scaled, table[[3, 10, 3], 2:6] * 5.5)


def test_add_is_in_order():
    parts = [torch.randn(4, 9) * 10**n for n in (0, 4, 7)]
    assert torch.equal(compute(op("add"), *parts), (parts[0] + parts[1]) + parts[2])


@pytest.mark.parametrize(
    ("fn", "torch_fn"),
    [
        ("silu", F.silu),
        ("gelu", F.gelu),
        ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        ("relu", F.relu),
    ],
)
def test_gated_act(fn, torch_fn):
    gate, up = torch.randn(5, 37) * 4, torch.randn(5, 37)
    assert torch.allclose(compute(op("gated_act", fn=fn), gate, up), torch_fn(gate) * up, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 5), width=st.integers(1, 40), lo=st.integers(0, 39))
def test_elementwise_bits_do_not_depend_on_the_shape(rows, width, lo):
    whole = torch.linspace(-9, 9, rows * 80).view(rows, 80)
    part = whole[:, lo : lo + width]
    for function in (torch.exp, torch.tanh, F.silu, F.gelu):
        assert torch.equal(elementwise(function, part), elementwise(function, whole)[:, lo : lo + width])


# ---- experts


@pytest.mark.parametrize("renormalize", [True, False])
def test_top_k_as_qwen3_moe(renormalize):
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    config = Qwen3MoeConfig(hidden_size=24, num_experts=16, num_experts_per_tok=3, norm_topk_prob=renormalize)
    router = Qwen3MoeTopKRouter(config)
    router.weight.data = torch.randn(16, 24)
    logits, weights, ids = (t.detach() for t in router(torch.randn(9, 24)))
    route = compute(op("top_k", score="softmax"), logits, k=3, renormalize=renormalize)
    assert torch.equal(route[:, :3].long(), ids)
    assert torch.allclose(route[:, 3:], weights, atol=1e-6)


def test_top_k_ties_go_to_the_lower_expert():
    route = compute(op("top_k", score="softmax"), torch.tensor([[1.0, 5.0, 5.0, 1.0, 5.0]]), k=4, renormalize=False)
    assert route[0, :4].tolist() == [1, 2, 4, 0]
    sigmoid = compute(op("top_k", score="sigmoid"), torch.tensor([[0.0, 2.0]]), k=1, renormalize=True)
    assert sigmoid.tolist() == [[1.0, 1.0]]
    plain = compute(op("top_k", score="sigmoid"), torch.tensor([[0.0, 2.0]]), k=2, renormalize=False)
    assert torch.allclose(plain[0, 2:], torch.tensor([2.0, 0.0]).sigmoid())


def test_combine():
    rows, weights = torch.randn(4, 3, 10), torch.rand(4, 3)
    route = torch.cat((torch.zeros(4, 3), weights), -1)
    mixed = compute(op("combine", route="r"), rows, route)
    assert torch.allclose(mixed, (rows * weights[..., None]).sum(1), atol=1e-6)
    first = rows[:, 0] * weights[:, :1] + rows[:, 1] * weights[:, 1:2]
    assert torch.equal(mixed, first + rows[:, 2] * weights[:, 2:])


# ---- sums over ranks and splits


def test_sums_have_a_fixed_order():
    parts = torch.tensor([1e8, 1.0, -1e8, 1.0])
    expected = parts[0]
    for part in parts[1:]:
        expected = expected + part
    assert compute(op("all_reduce"), parts.view(4, 1, 1)).item() == expected.item()
    splits = parts.view(1, 4)
    assert compute(op("split_k_reduce", splits=4, features=1), splits, span=(0, 1)).item() == expected.item()


def test_split_k_reduce_cuts_features():
    parts = torch.randn(3, 2 * 8)
    out = compute(op("split_k_reduce", splits=2, features=8), parts, span=(3, 6))
    assert torch.equal(out, parts[:, 3:6] + parts[:, 11:14])


# ---- sampling


def argmax(
    logits: torch.Tensor, unit: int, ranks: int = 1, valid: int | None = None, slices: int | None = None
) -> list[int]:
    """Both stages, `ranks` ranks having an equal share of the vocabulary each. `slices`: else one for each unit."""
    share = -(-logits.shape[1] // ranks)
    padded = F.pad(logits, (0, share * ranks - logits.shape[1]))
    valid = logits.shape[1] if valid is None else valid
    stride = share if ranks > 1 else 0
    count = slices or -(-share // unit)
    made = op("argmax_partial", slices=count, unit=unit, vocab=share, valid=valid, rank_stride=stride)
    parts = [
        torch.cat([
            compute(made, part[:, made.edge(n) : made.edge(n + 1)], span=(2 * n, 2 * n + 2), rank=rank)
            for n in range(count)
        ], -1)
        for rank, part in enumerate(padded.split(share, -1))
    ]  # fmt: skip
    pairs = parts[0] if ranks == 1 else torch.stack(parts)
    return compute(op("argmax_reduce", slices=count), pairs)[:, 0].tolist()


@settings(max_examples=40, deadline=None)
@given(
    vocab=st.integers(2, 60),
    unit=st.integers(1, 20),
    few=st.integers(1, 5),
    ranks=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 1000),
)
def test_argmax(vocab, unit, few, ranks, seed):
    """With ties (few different values), at any slicing and degree: the lowest id among equals.

    Slices have one unit each, or share them out as tasks do.
    """
    logits = torch.randint(-2, 3, (3, vocab), generator=torch.Generator().manual_seed(seed)).float()
    expected = [row.tolist().index(row.max()) for row in logits]
    assert argmax(logits, unit, ranks) == expected
    share = -(-vocab // ranks)
    assert argmax(logits, unit, ranks, slices=min(few, -(-share // unit))) == expected


def test_padding_is_never_sampled():
    """Padded rows give logits of 0, which may be the highest."""
    assert argmax(torch.full((2, 9), -3.0), 2, ranks=4) == [0, 0]
    assert argmax(torch.tensor([[1.0, 2.0, 9.0]]), 3, valid=2) == [1]
