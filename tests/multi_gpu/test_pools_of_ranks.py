"""Two ranks on one GPU, each with claim pools of its own: the bits of queues."""

from __future__ import annotations

import pytest
import torch
from one_gpu import open_here
from tiny_ranks import skip_without_gpu

pytestmark = pytest.mark.gpu
IDS = [(7 + 29 * n + 5 * n * n) % 515 for n in range(100)]
CLAIMED = ("qkv", "o_add", "gate_up", "down_add", "head")


@pytest.mark.parametrize("transport", ["peer", "nvshmem"])
def test_pools_of_ranks_have_the_bits_of_queues(monkeypatch, transport):
    skip_without_gpu(transport)
    found = []
    for claimed in ((), CLAIMED):
        backend = open_here(2, monkeypatch, transport=transport, claimed=claimed)
        found.append(
            (backend.logits(IDS), backend.logits(IDS, alone=40), list(backend.stream(IDS[:20], max_new_tokens=30)))
        )
        backend.close()
    (queues, queues_alone, answer), (pools, pools_alone, claimed_answer) = found
    assert queues.isfinite().all()
    assert torch.equal(queues, pools) and torch.equal(queues_alone, pools_alone) and answer == claimed_answer


def test_random_delays_change_no_bit(monkeypatch):
    skip_without_gpu("peer")
    slow = open_here(2, monkeypatch, ("MPK_DELAYS",), claimed=CLAIMED)
    found = []
    for seed in (0, 1, 2):
        slow.ranks.call("probe", {"delay_seed": seed})
        found.append(slow.logits(IDS, last=60, alone=40))
    slow.close()
    assert all(torch.equal(logits, found[0]) for logits in found)
