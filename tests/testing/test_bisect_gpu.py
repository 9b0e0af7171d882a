"""Which group goes wrong first, with a stand-in for the kernel: the reference itself, run with changed weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import checkpoint_of, spec_of

from mpk_spec.errors import UserError
from mpk_spec.planner import plan
from mpk_spec.schema.models import Rule
from mpk_spec.testing.bisect_gpu import STOP_AFTER, bisect_gpu, compare, examined, find_group, merged, reference
from mpk_spec.testing.defects import find_defect

IDS = torch.randint(0, 515, (40,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def made():
    return plan(spec_of("qwen3"), size="tiny", target="h100", context=128)


@pytest.fixture(scope="module")
def made_for_two():
    return plan(spec_of("qwen3"), size="tiny", target="h100", context=128, tp=2)


class StandIn:
    """Has run the whole step; gives what each group left, as an arena whose bytes are used again would not."""

    def __init__(self, made, checkpoint, spoil=None):
        self.left = {place: values for place, _, _, values in reference(made, checkpoint, IDS)}
        self.asked, self.spoil = [], spoil

    def values(self, stage, group, names):
        self.asked.append((stage, group))
        found = [{name: held[name].clone() for name in names} for held in self.left[stage, group]]
        return [self.spoil((stage, group), *found)] if self.spoil else found


def run(made, defect=None, stop_after="all", spoil=None):
    checkpoint = checkpoint_of("qwen3")
    theirs = find_defect(defect).weights(checkpoint, made) if defect else checkpoint
    kernel = StandIn(made, theirs, spoil)
    found = compare("title", made, checkpoint, IDS, kernel, find_group(made, stop_after))
    return found, kernel


def test_a_kernel_that_computes_the_same_passes(made):
    found, kernel = run(made)
    assert found.passed and found.tokens == 8 == len(IDS) - examined(made, len(IDS))
    assert max(entry.error for entry in found.entries) == 0
    names = [entry.operator for entry in found.entries if entry.layer == 1]
    assert names == ["attention.q", "attention.k", "attention.v", "attention.a", "attention.out", "mlp.act", "mlp.out"]
    assert found.entries[-1].place == "logits"
    assert kernel.asked == sorted(kernel.asked)
    assert "ours against the reference of the same plan" in found.page()[1]


@pytest.mark.parametrize(("defect", "place"), [("swapped-heads", "attention.q@0"), ("missing-gain", "mlp.act@0")])
def test_a_defect_in_packed_weights_is_named(made, defect, place):
    found, _ = run(made, defect)
    assert not found.passed
    assert found.first.place == place


@pytest.mark.parametrize(
    ("at", "tensor", "place"),
    [((1, 1), "attention.a.splits", "attention.a@1"), ((2, 4), "y.other", "mlp.out@2"), ((3, 0), "logits", "logits")],
)
def test_values_spoilt_in_one_place_are_found_there(made, at, tensor, place):
    def spoil(where, values):
        if where == at:
            name = tensor if tensor in values else next(iter(values))
            values[name] = values[name].roll(1, 0)  # another token's
        return values

    found, _ = run(made, spoil=spoil)
    assert found.first.place == place


def test_sums_in_two_shots_are_compared_where_they_were_sent():
    rule = Rule.model_validate({"set": {"*": {"all_reduce": "two_shot"}}})
    spec = replace(spec_of("qwen3"), schedule=[*spec_of("qwen3").schedule, rule])
    made, checkpoint = plan(spec, size="tiny", target="h100", context=128, tp=2), checkpoint_of("qwen3")
    assert made.tensors["attention.o"].shares == "scattered"
    found = compare("title", made, checkpoint, IDS, StandIn(made, checkpoint), None)
    assert found.passed and max(entry.error for entry in found.entries) == 0
    assert "mlp.out" in {entry.operator for entry in found.entries}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_part_that_did_not_arrive_at_one_rank_is_found_there(made_for_two, rank):
    """The part of rank 1 in one inbox is what was there before; the sum that comes after is right, as it is given."""

    def stale(where, *held):
        if where == (1, 2):
            held[rank]["attention.o"][1] = 0.5
        return list(held)

    checkpoint = checkpoint_of("qwen3")
    kernel = StandIn(made_for_two, checkpoint)
    assert compare("title", made_for_two, checkpoint, IDS, kernel, None).passed
    values = kernel.values
    kernel.values = lambda stage, group, names: stale((stage, group), *values(stage, group, names))
    found = compare("title", made_for_two, checkpoint, IDS, kernel, None)
    assert not found.passed
    assert found.first.place == "attention.o@1"


def test_defects_are_planted_in_one_gpu():
    with pytest.raises(UserError, match="'swapped-heads' is planted in the kernel of one GPU"):
        bisect_gpu(spec_of("qwen3"), "tiny", checkpoint_of("qwen3"), defect=find_defect("swapped-heads"), tp=2)


def test_it_asks_for_nothing_after_the_operator(made):
    found, kernel = run(made, stop_after="attention.h@1")
    assert kernel.asked[-1] == (1, 0)
    assert found.entries[-1].place == "attention.v@1"
    assert find_group(made, "attend@2") == (2, 1)


@pytest.mark.parametrize(
    ("stop_after", "message"),
    [
        ("mlp.dwn", "there is no operator 'mlp.dwn'\n  hint: did you mean 'mlp.down'?"),
        ("mlp.down@9", "operator 'mlp.down' has no layer 9"),
        ("mlp.down@x", "'x' in 'mlp.down@x' is no layer\n  hint: write it as in attention.o@5"),
    ],
)
def test_an_operator_that_is_not_there(made, stop_after, message):
    with pytest.raises(UserError) as caught:
        find_group(made, stop_after)
    assert str(caught.value) == message


def test_splits_are_added_up_whatever_they_are_relative_to():
    """Two splits of one head; the second has seen nothing of the first token, and holds rubbish."""
    sums = torch.tensor([[[2.0, 4.0], [9.0, 9.0]], [[1.0, 0.0], [3.0, 6.0]]])
    peak = torch.tensor([[0.5, 9e9], [0.0, 1.0]])
    total = torch.tensor([[2.0, torch.nan], [1.0, 3.0]])
    value = torch.cat((sums, peak[..., None], total[..., None]), -1).flatten(1)
    found = merged(value, splits=2, heads=1, head_dim=2, block=64, start=63)
    weight = torch.tensor([1.0, torch.e])
    wanted = (weight[:, None] * sums[1]).sum(0) / (weight * total[1]).sum()
    assert torch.allclose(found, torch.stack((torch.tensor([1.0, 2.0]), wanted)))
    moved = value.clone().view(2, 2, 4)
    moved[1, 1, :2] *= torch.e
    moved[1, 1, 3] *= torch.e
    moved[1, 1, 2] -= 1.0  # the same numbers relative to another maximum
    assert torch.allclose(merged(moved.flatten(1), 2, 1, 2, 64, 63), found)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_a_build_that_stops_compiles_without_spills(arch, tmp_path, monkeypatch):
    pytest.importorskip("cuda.core", reason="needs cuda-core and NVRTC: pip install mpk-spec[cuda]")
    from mpk_spec.emit.compiler import compile_kernel
    from mpk_spec.emit.source import emit

    monkeypatch.setenv("MPK_SPEC_CACHE", str(tmp_path))
    target = {"sm_90a": "h100", "sm_100a": "b200"}[arch]
    source = emit(plan(spec_of("qwen3"), size="tiny", target=target, context=128)).source
    stopping = compile_kernel("stops", source, arch, (STOP_AFTER,))
    assert stopping.report.spill_bytes == 0
    assert b"megakernel_stop" in stopping.cubin
    assert b"megakernel_stop" not in compile_kernel("runs", source, arch).cubin
