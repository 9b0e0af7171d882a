"""What is measured of a kernel and how its logits are judged, with kernels that only claim to run."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from fake_measurer import planned

from mpk_spec.errors import UserError, VerdictFailed
from mpk_spec.planner import plan
from mpk_spec.runtime.cuda_device import OutOfMemory
from mpk_spec.schema import load_spec
from mpk_spec.testing.metrics import Metrics, Verdict
from mpk_spec.tuner.gpu import GpuMeasurer, attention_orders, linear_orders, roundings
from mpk_spec.tuner.journal import NotJudged
from mpk_spec.tuner.space import with_rules

VOCAB = 515


class FakeKernel:
    """Takes 0.3 ms for a launch and `ms` for a step; its logits are a table of the ids, changed by `wrong`."""

    def __init__(self, made, ms=0.5, wrong=0.0):
        self.plan, self.context, self.vocab_size, self.wrong = made, made.context, VOCAB, wrong
        self.launches, self.closed = [], False
        self.launcher = SimpleNamespace(elapsed_ms=lambda: 0.3 + ms * self.launches[-1])

    def fill_cache(self, count):
        return list(range(count))

    def stream(self, ids, *, max_new_tokens):
        assert not self.closed
        self.launches.append(max_new_tokens)
        yield from range(max_new_tokens)

    def logits(self, ids, *, last, alone):
        assert len(ids) == self.context and (last, alone) == (128, 16)
        table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
        return table[torch.tensor(ids[-last:])] + self.wrong

    def close(self):
        self.closed = True


def yardstick(limit=0.01, trouble=None):
    """Passes logits whose largest error is at most `limit` times 1.1 and a third."""

    def made(ids, last):
        if trouble:
            raise UserError(trouble)
        truth = [FakeKernel(planned({})).logits(i, last=last, alone=16) for i in ids]

        def judge(backend):
            error = max((backend.logits(i, last=last) - t).abs().max().item() for i, t in zip(ids, truth, strict=True))
            same = (256, 1e-3, 1e-4, 1e-2, 1e-3)
            return Verdict(Metrics(*same, limit, 0), Metrics(*same, error, 0))

        return SimpleNamespace(judge=judge)

    return made


def measurer(ms=0.5, wrong=0.0, first=0.0, truth=None):
    opened = []

    def open_(made, share):
        assert (share is None) == (not opened) and (share is None or share is opened[0])
        opened.append(FakeKernel(made, 0.5 if share is None else ms, first if share is None else wrong))
        return opened[-1]

    return GpuMeasurer(planned({}), open_, truth or yardstick(), 128, 8), opened


LOADER = {"*": {"in_flight": 32768}}
CACHE = ["attention.cache", "attention.a"]
SPLITS = {"attend": {"kv_splits": 3}}


def test_the_baseline_is_opened_once_and_the_others_share_its_weights():
    found, opened = measurer(ms=0.4)
    first = found.measure(planned({}))
    assert first.ms == pytest.approx(0.5) and first.right and first.output == "the plan to beat"
    other = found.measure(planned(LOADER))
    assert other.ms == pytest.approx(0.4) and other.ms_min <= other.ms <= other.ms_max
    assert other.right and other.output == "same bits"
    assert [k.closed for k in opened] == [False, True]


def test_other_bits_are_wrong_where_sums_keep_their_order():
    found, _ = measurer(wrong=1e-3)
    measured = found.measure(planned(LOADER))
    assert not measured.right and measured.ms == pytest.approx(0.5)
    assert re.fullmatch(
        r"logits differ from the plan's without rules by up to 0\.00\d+, and should not", measured.output
    )


@pytest.mark.parametrize(
    "rules", [SPLITS, {"*": {"weight_chunk": 1024}}, {"o_add": {"fuse": False}}, {"attend": {"fuse": CACHE}}]
)
def test_other_sums_and_fusions_may_differ_as_far_as_compare_allows(rules):
    assert roundings(planned(rules)) != roundings(planned({}))
    measured = measurer(wrong=1e-3)[0].measure(planned(rules))
    assert measured.right and measured.output == "as near the truth as compare asks"
    assert measurer(wrong=0.0)[0].measure(planned(rules)).output == "same bits"
    measured = measurer(wrong=0.1)[0].measure(planned(rules))
    assert not measured.right and measured.output == "too far from the truth: max logit error 0.1, at most 0.0147"
    assert not measurer(wrong=float("nan"))[0].measure(planned(rules)).right
    assert not measurer(wrong=float("nan"))[0].measure(planned(LOADER)).right


@pytest.mark.parametrize(("splits", "same"), [(3, True), (6, False)])
def test_who_merges_decides_the_order_of_many_splits_only(splits, same):
    """Readers merge four at a time, tasks of their own all at once."""
    fused, apart = (
        plan(with_rules(load_spec("qwen3"), {"attend": {"kv_splits": splits, "kv_merge": how}}), size="tiny",
             target="h100", context=512, verified=False)
        for how in ("fused", "apart")
    )  # fmt: skip
    assert (attention_orders(fused) == attention_orders(apart)) == same


@pytest.mark.parametrize(
    ("size", "most", "others"),
    [
        ("8b", 8192, {}),  # 512 columns: the eight warps take the same blocks of 32, in the same order
        ("tiny", 4096, {}),  # one copy of 96 or of 256 columns
        ("tiny", 1024, {"qkv": 64, "o_add": 64, "gate_up": 64, "down_add": 64, "head": 64}),
        ("8b", 12288, {"qkv": 704, "o_add": 704, "gate_up": 704, "head": 704}),  # of down's 12288, 768
    ],
)
def test_copies_decide_the_order_where_they_end_within_a_round_of_the_warps(size, most, others):
    def made(rules):
        return plan(with_rules(load_spec("qwen3"), rules), size=size, target="h100", context=512)

    found = linear_orders(made({"*": {"weight_chunk": most}}))
    assert set(linear_orders(made({})).values()) == {0}
    assert {name: columns for name, columns in found.items() if columns} == others


def test_no_truth_no_judgement_and_it_is_asked_once():
    asked = []
    truth = yardstick(trouble="the truth needs more memory")
    found, opened = measurer(truth=lambda ids, last: asked.append(last) or truth(ids, last))
    for _ in range(2):
        with pytest.raises(NotJudged, match="other sums and fusions cannot be judged: the truth needs more memory"):
            found.measure(planned(SPLITS))
    assert asked == [128] and len(opened) == 1
    assert found.measure(planned(LOADER)).right


def test_weights_that_lie_otherwise_and_have_no_room_are_no_failure():
    found, _ = measurer()
    assert found.measure(planned({})).right

    def full(made, share):
        raise OutOfMemory("the model needs 60 GiB", "a smaller model would fit")

    found.opened = full
    with pytest.raises(NotJudged, match="no room beside the plan without rules: the model needs 60 GiB"):
        found.measure(planned({"qkv": {"fuse": False}}))


def test_a_baseline_far_from_the_truth_ends_it():
    found, _ = measurer(first=0.1)
    with pytest.raises(VerdictFailed, match="nothing can be tuned: the plan without rules is too far from the truth"):
        found.measure(planned(SPLITS))


def test_a_baseline_of_no_numbers_ends_it():
    with pytest.raises(UserError, match="are no numbers"):
        measurer(first=float("nan"))[0].measure(planned({}))


def test_two_plans_in_turn():
    found, opened = measurer(ms=0.4)
    pairs = found.in_turn((planned({}), planned(LOADER)), 3)
    assert pairs == [(pytest.approx(0.5), pytest.approx(0.4))] * 3
    assert opened[0].launches == opened[1].launches == [1, 9] * 4 and opened[1].closed and not opened[0].closed


def test_what_does_not_compile_is_said_when_it_is_measured():
    compiled = []

    def compile_(made):
        compiled.append(made.key)
        raise UserError("spills")

    found, _ = measurer()
    found.compiled = compile_
    found.prepare([planned({}), planned(LOADER)])
    assert sorted(compiled) == sorted([planned({}).key, planned(LOADER).key])
