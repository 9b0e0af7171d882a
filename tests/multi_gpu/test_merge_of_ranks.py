"""Two ranks whose attention's splits are merged by tasks of their own: each its own heads."""

from __future__ import annotations

import pytest
import torch
from one_gpu import open_here
from tiny_ranks import skip_without_gpu

pytestmark = pytest.mark.gpu
IDS = [(7 + 29 * n + 5 * n * n) % 515 for n in range(500)]


def opened(monkeypatch, splits: int, context: int, merge: str = "apart", defines: tuple[str, ...] = ()):
    skip_without_gpu("peer")
    made = open_here(2, monkeypatch, defines, attend={"kv_splits": splits, "kv_merge": merge}, context=context)
    assert any(g.task == "attention_merge" for g in made.plan.steps["decode"].templates[1].groups) == (merge == "apart")
    return made


def test_they_have_the_bits_of_a_merge_by_readers(monkeypatch):
    found = []
    for merge in ("apart", "fused"):
        backend = opened(monkeypatch, 4, 256, merge)
        found.append(backend.logits(IDS[:250], alone=60))
        backend.close()
    assert found[0].isfinite().all() and torch.equal(*found)


def test_token_by_token_has_the_bits_of_chunks(monkeypatch):
    backend = opened(monkeypatch, 7, 512)
    chunks, alone = (backend.logits(IDS, last=100, alone=n) for n in (0, 100))
    backend.close()
    assert chunks.isfinite().all() and torch.equal(chunks, alone)


def test_random_delays_change_no_bit(monkeypatch):
    slow = opened(monkeypatch, 7, 512, defines=("MPK_DELAYS",))
    found = []
    for seed in (0, 1, 2):
        slow.ranks.call("probe", {"delay_seed": seed})
        found.append(slow.logits(IDS[:460], last=40, alone=40))
    slow.close()
    assert all(torch.equal(logits, found[0]) for logits in found)
