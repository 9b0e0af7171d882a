"""The kernel's matrix products, computed by its own code on the host: addresses in packed weights, the ways of one
token and of several, and that their results have the same bits."""

from __future__ import annotations

import subprocess
from itertools import pairwise

import pytest
import torch
from host_build import ON_HOST, built

from mpk_spec.emit.layout import Packed
from mpk_spec.planner.tile import chunk_columns
from mpk_spec.runtime.cuda_weights import pack

MAX_TOKENS = 16


@pytest.mark.parametrize(
    ("k", "cuts"),
    [
        (1024, (0, 1, 3)),  # tasks of one or two tiles
        (2048, (0, 1, 6)),
        (576, (0, 9, 11)),  # more than a block of tiles; some warps have no columns of a chunk
        (2080, (0, 3, 5)),  # the last chunk is shorter
        (96, (0, 1, 2)),
    ],
)
def test_products_are_those_of_the_weight(k, cuts, tmp_path):
    torch.manual_seed(k)
    rows, tile_k = cuts[-1] * 8, chunk_columns(k)
    part = Packed("g", ("w",), "concat", 1, rows, rows, k, 8, tile_k, 0, 0)
    weight, x = torch.randn(rows, k).bfloat16(), torch.randn(MAX_TOKENS, k).bfloat16()
    packed = torch.full((rows * k,), float("nan"), dtype=torch.bfloat16)
    pack(part, weight, packed)
    assert not packed.isnan().any()
    most = max(hi - lo for lo, hi in pairwise(cuts))
    options = ("-pthread", f"-DCOLUMNS={k}", f"-DROWS={rows}", f"-DCHUNK_COLUMNS={tile_k}", f"-DMOST_TILES={most}")
    program = built("linear.cc", tmp_path, ON_HOST / "warps", options=options)
    given = b"".join(t.view(torch.uint8).numpy().tobytes() for t in (packed, x))
    ran = subprocess.run([program, *map(str, cuts)], input=given, capture_output=True, timeout=120, check=True)
    found = torch.frombuffer(bytearray(ran.stdout), dtype=torch.float32).view(4, MAX_TOKENS, rows)
    wanted = x.double() @ weight.double().T
    for one, tokens in zip(found, (1, 2, 5, 16), strict=True):
        assert one[tokens:].isnan().all()
        assert (one[:tokens] - wanted[:tokens]).abs().max() < 1e-5 * k**0.5 * 4
        assert torch.equal(one[0], found[0][0])
