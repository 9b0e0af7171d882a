"""The kernel's matrix products, computed by its own code on the host: addresses in packed weights, tiles of less than
eight rows, both ways of one token, the order of sums."""

from __future__ import annotations

import subprocess
from itertools import pairwise

import pytest
import torch
from host_build import ON_HOST, built

from mpk_spec.emit.layout import Packed
from mpk_spec.planner.schedule import CHUNK_BYTES
from mpk_spec.planner.tile import chunk_columns
from mpk_spec.runtime.cuda_weights import pack

MAX_TOKENS = 16


def computed(k: int, cuts: tuple[int, ...], epilogue: int, wanted, tmp_path, most: int = CHUNK_BYTES) -> None:
    """Holds what the program makes of random numbers against `wanted(products [tokens, rows], residual)`."""
    torch.manual_seed(k)
    rows, tile_k = cuts[-1], chunk_columns(k, most)
    part = Packed("g", ("w",), "concat", 1, rows, cuts, k, 8, tile_k, 0, 0)
    weight, x = torch.randn(rows, k).bfloat16(), torch.randn(MAX_TOKENS, k).bfloat16()
    residual = torch.randn(MAX_TOKENS, rows)
    packed = torch.full((rows * k,), float("nan"), dtype=torch.bfloat16)
    pack(part, weight, packed)
    assert not packed.isnan().any()
    sizes = {
        "COLUMNS": k, "ROWS": rows, "CHUNK_COLUMNS": tile_k, "EPILOGUE": epilogue,
        "MOST_TILES": max(-(-(hi - lo) // 8) for lo, hi in pairwise(cuts)),
    }  # fmt: skip
    options = ("-pthread", *(f"-D{name}={size}" for name, size in sizes.items()))
    program = built("linear.cc", tmp_path, ON_HOST / "warps", options=options)
    given = b"".join(t.view(torch.uint8).numpy().tobytes() for t in (packed, x, residual))
    ran = subprocess.run([program, *map(str, cuts)], input=given, capture_output=True, timeout=120, check=True)
    right = wanted(x.double() @ weight.double().T, residual.double())
    found = torch.frombuffer(bytearray(ran.stdout), dtype=torch.float32).view(4, *right.shape)
    for one, tokens in zip(found, (1, 2, 5, 16), strict=True):
        assert one[tokens:].isnan().all()
        assert ((one[:tokens] - right[:tokens]) / (1 + right[:tokens].abs())).abs().max() < 1e-5 * k**0.5
        assert torch.equal(one[0], found[0][0])


@pytest.mark.parametrize(
    ("k", "cuts"),
    [
        (1024, (0, 3, 19, 24)),  # tasks of one or two tiles
        (2048, (0, 5, 44)),
        (576, (0, 70, 83)),  # more than a block of tiles; some warps have no columns of a chunk
        (2080, (0, 21, 38)),  # the last chunk is shorter, and rows are no multiple of 128 bytes
        (96, (0, 8, 15)),
    ],
)
def test_products_are_those_of_the_weight(k, cuts, tmp_path):
    computed(k, cuts, 0, lambda products, residual: products, tmp_path)


@pytest.mark.parametrize(("k", "most", "columns"), [(2048, 8192, 512), (2048, 12288, 704), (256, 1024, 64)])
def test_of_smaller_copies_too(k, most, columns, tmp_path):
    assert chunk_columns(k, most) == columns
    computed(k, (0, 5, 44), 0, lambda products, residual: products, tmp_path, most)


def test_a_residual_is_added_to_the_rows_of_a_task(tmp_path):
    computed(1024, (0, 5, 76, 81), 1, lambda products, residual: residual + products, tmp_path)


def test_every_other_two_rows_are_gated(tmp_path):
    def gated(products, residual):
        gate, up = products.unflatten(1, (-1, 2, 2)).unbind(2)
        return (torch.nn.functional.silu(gate) * up).flatten(1)

    computed(1024, (0, 12, 84, 88), 2, gated, tmp_path)
