from __future__ import annotations

import pytest
import torch
from tiny import SHORT, checkpoint_of, spec_of, yardstick_of

from mpk_spec.errors import UserError
from mpk_spec.testing import yardstick
from mpk_spec.testing.yardstick import sequences
from mpk_spec.weights import load_hf_model, text_config


@pytest.mark.parametrize(
    ("positions", "seeds", "context", "shape"),
    [(2000, 4, 512, (4, 500)), (2000, 4, 48, (42, 48)), (100, 4, 512, (4, 25)), (2048, 1, 512, (4, 512))],
)
def test_there_are_enough_positions_from_enough_seeds(positions, seeds, context, shape):
    drawn = sequences(515, positions, seeds, context)
    assert (len(drawn), len(drawn[0])) == shape
    assert len({tuple(ids) for ids in drawn}) == len(drawn)
    assert drawn == sequences(515, positions, seeds, context)
    assert {len(ids) for ids in drawn} == {shape[1]}
    assert min(map(min, drawn)) >= 0 and max(map(max, drawn)) < 515


def test_the_truth_is_hugging_face_in_float32():
    measured = yardstick_of("qwen3", SHORT)
    model = load_hf_model(checkpoint_of("qwen3"), "float32")
    with torch.inference_mode():
        wanted = model(torch.tensor([measured.ids[2]])).logits[0]
    assert torch.allclose(measured.truth[2], wanted, atol=1e-5)
    assert measured.rival.positions == 6 * SHORT
    assert measured.rival.kl_mean > 1e-5  # bf16 rounds


def test_a_truth_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(yardstick, "free_memory", lambda: 10_000_000)
    with pytest.raises(UserError, match=r"needs 0\.\d GB of memory, 0\.0 GB are free"):
        yardstick.need_memory(checkpoint_of("qwen3"), 50_000)
    yardstick.need_memory(checkpoint_of("qwen3"), 10)


def test_a_gpu_needs_the_hosts_memory_for_logits_only(monkeypatch):
    checkpoint = checkpoint_of("qwen3")
    logits = 10 * 515 * 4
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(yardstick, "free_memory", lambda: logits)
    assert yardstick.need_memory(checkpoint, 10) == yardstick.count_parameters(checkpoint)
    with pytest.raises(UserError, match="of memory"):
        yardstick.need_memory(checkpoint, 11)


@pytest.mark.parametrize(("files", "free", "whole"), [(True, 1, False), (True, 4, True), (False, 1, True)])
def test_on_a_gpu_files_that_the_host_cannot_hold_are_streamed(files, free, whole, monkeypatch):
    """free: bytes of the host's memory for each parameter, 2 of which are read."""
    checkpoint = checkpoint_of("qwen3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 << 30, 80 << 30))
    monkeypatch.setattr(yardstick, "free_memory", lambda: free * yardstick.count_parameters(checkpoint))
    if files:
        monkeypatch.setattr(yardstick, "on_device", lambda same, _: same)
    assert yardstick.fits_here(checkpoint, [[0] * 12], 6, "float32") == whole


def test_free_memory_is_read_from_the_system():
    assert yardstick.free_memory() > 1_000_000


def test_long_sequences_are_judged_at_their_end():
    """The truth of the last positions, in the company of all before them, computed in chunks and then one by one."""
    from mpk_spec.testing.ours import open_ours
    from mpk_spec.testing.yardstick import Yardstick, wanted

    ids = sequences(515, 40, 2, 96, whole=True)
    assert (len(ids), len(ids[0]), wanted(40, 2, 96)) == (2, 96, 20)
    part, whole = (Yardstick(checkpoint_of("qwen3"), ids, last=last) for last in (20, None))
    for some, everything in zip(part.truth, whole.truth, strict=True):
        assert some.shape == (20, 515)
        assert torch.allclose(some, everything[-20:], atol=1e-5)
    verdict = part.judge(open_ours(spec_of("qwen3"), "tiny", checkpoint_of("qwen3"), "cpu", 96), alone=8)
    assert (verdict.ours.positions, verdict.alone.ours.positions) == (40, 16)
    assert verdict.alone.rival.kl_mean != verdict.rival.kl_mean
    assert verdict.passed and verdict.data()["token_by_token"]["positions"] == 16


def test_a_mistake_in_decode_steps_alone_fails():
    class Wrong:
        def logits(self, ids, *, last, alone):
            right = truth[tuple(ids)].clone()
            right[-alone:] = right[-alone:].roll(1, -1)
            return right

    measured = yardstick_of("qwen3", SHORT)
    truth = {tuple(ids): logits for ids, logits in zip(measured.ids, measured.truth, strict=True)}
    verdict = measured.judge(Wrong(), alone=2)
    assert not verdict.alone.passed and not verdict.passed


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_what_does_not_fit_is_streamed_and_gives_the_same_truth(name, monkeypatch):
    """As on a GPU: all sequences in one batch, read layer by layer."""
    ids = sequences(515, 24, 2, 12)
    checkpoint = checkpoint_of(name)
    whole = list(yardstick._huggingface(checkpoint, ids, 6, "float32", lambda *_: None))
    monkeypatch.setattr(yardstick, "fits_here", lambda *asked: False)
    streamed = list(yardstick._huggingface(checkpoint, ids, 6, "float32", lambda *_: None))
    for one, other in zip(whole, streamed, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
@pytest.mark.parametrize("last", [3, 14, 23])
@pytest.mark.parametrize("whole", [True, False])
def test_long_sequences_are_read_in_pieces_and_give_the_same_truth(name, last, whole, monkeypatch):
    ids = sequences(515, 46, 2, 23)
    checkpoint = checkpoint_of(name)
    at_once = list(yardstick._huggingface(checkpoint, ids, last, "float32", lambda *_: None))
    monkeypatch.setattr(yardstick, "fits_here", lambda *asked: whole)
    monkeypatch.setattr(yardstick, "AT_ONCE", 20)
    monkeypatch.setattr(yardstick, "PIECE", 5)
    in_pieces = list(yardstick._huggingface(checkpoint, ids, last, "float32", lambda *_: None))
    for one, other in zip(at_once, in_pieces, strict=True):
        assert one.shape == other.shape == (last, 515)
        assert torch.allclose(one, other, atol=1e-4)


def test_of_a_long_sequence_the_cache_and_the_scores_of_a_piece_must_fit(monkeypatch):
    free = {"bytes": 0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free["bytes"], 0))
    checkpoint, length = checkpoint_of("qwen3"), yardstick.AT_ONCE + 1
    config = text_config(checkpoint.config)
    cache = 2 * config["num_key_value_heads"] * config["head_dim"] * config["num_hidden_layers"] * 4
    needed = yardstick.count_parameters(checkpoint) * 6 + 10 * 515 * 8 + yardstick.PIECE * (4 * 256 + 12 * 96) * 4
    needed += length * (cache + yardstick.PIECE * config["num_attention_heads"] * 8)
    free["bytes"] = yardstick.SPARE_BYTES + needed
    assert not yardstick.fits(checkpoint, [[0] * length], 10, "float32")
    free["bytes"] += 1
    assert yardstick.fits(checkpoint, [[0] * length], 10, "float32")


def test_a_model_fits_if_its_weights_and_activations_do(monkeypatch):
    ids = [[0] * 1000]
    free = {"bytes": 0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free["bytes"], 0))
    checkpoint = checkpoint_of("qwen3")
    assert not yardstick.fits(checkpoint, ids, 10, "float32")
    free["bytes"] = yardstick.SPARE_BYTES + yardstick.count_parameters(checkpoint) * 6
    assert not yardstick.fits(checkpoint, ids, 10, "float32")  # but its activations
    free["bytes"] += 1000 * 4 * (4 * 256 + 12 * 96) + 10 * 515 * 8 + 1
    assert yardstick.fits(checkpoint, ids, 10, "float32")
