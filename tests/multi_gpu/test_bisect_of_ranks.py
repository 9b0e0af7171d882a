"""`compare --stop-after` looks into the kernels of several ranks that share one GPU."""

from __future__ import annotations

import pytest
import torch
from one_gpu import open_here
from tiny_ranks import tiny_checkpoint

from mpk_spec.testing.bisect_gpu import STOP_AFTER, StoppedRanks, compare, find_group

IDS = [(7 + 29 * n + 5 * n * n) % 515 for n in range(40)]


@pytest.mark.gpu
def test_no_operator_of_any_rank_adds_an_error_of_its_own(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, this machine has none")
    backend = open_here(2, monkeypatch, (STOP_AFTER,))
    kernel = StoppedRanks(backend, IDS)
    found = compare("title", backend.plan, tiny_checkpoint(), IDS, kernel, find_group(backend.plan, "mlp.out@1"))
    assert found.passed, "\n".join(found.page())
    assert {"attention.o", "mlp.down", "mlp.act"} <= {entry.operator for entry in found.entries}
    backend.reset()
    assert backend.logits(IDS).isfinite().all()  # the kernels can run on
    backend.close()
