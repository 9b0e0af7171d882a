"""`profile` of several ranks on one GPU, where it is known what lies between their clocks: nothing."""

from __future__ import annotations

import pytest
import torch
from one_gpu import open_here

from mpk_spec.planner.simulate import simulate
from mpk_spec.profiler.clock import common_clock
from mpk_spec.profiler.ranks import align
from mpk_spec.profiler.report import report
from mpk_spec.profiler.run import record
from mpk_spec.runtime.cuda_probe import PROFILE

CONTEXT, TOKENS = 100, 4


@pytest.mark.gpu
def test_the_clocks_of_ranks_that_share_a_gpu(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, this machine has none")
    backend = open_here(2, monkeypatch, (PROFILE,))
    raw = record(backend, CONTEXT, TOKENS)
    backend.close()
    zeros = [int(one["global_ns"][one["signalled"] != 0].min()) for one, _ in raw]  # where each rank's times begin
    predicted = simulate(backend.plan, context=CONTEXT)
    _, clocks = align([common_clock(*one) for one in raw], predicted.step)
    assert 0 < clocks.within[1] < 5.0
    assert clocks.ahead[1] == pytest.approx((zeros[0] - zeros[1]) / 1e3, abs=clocks.within[1] + 0.1)
    _, _, data, shown = report([common_clock(*one) for one in raw], predicted)
    assert len(data["ranks"]) == 2 and all(len(one["us_per_token"]) == TOKENS for one in data["ranks"])
    rows = {row["name"]: row for row in data["sums"]["rows"]}
    assert {"gate_up", "qkv", "head", "next_ids"} == rows.keys()
    assert all(0 <= row["beyond"] <= row["waited"] < 100 for row in rows.values())
    assert "the sums of a layer together, " in shown
