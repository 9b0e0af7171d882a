from __future__ import annotations

import pytest
import torch
from tiny import SHORT, checkpoint_of, yardstick_of

from mpk_spec.errors import UserError
from mpk_spec.testing import yardstick
from mpk_spec.testing.yardstick import sequences
from mpk_spec.weights import load_hf_model


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


def test_free_memory_is_read_from_the_system():
    assert yardstick.free_memory() > 1_000_000
