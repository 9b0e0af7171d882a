"""The kernel's attention, computed by its own code on the host: pairs of blocks and single ones, what the cache has and
what is new, splits, positions that begin anywhere."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from host_build import ON_HOST, built

BLOCK, MAX_TOKENS = 64, 16


class Host:
    """Random queries, keys and values of `positions` positions, and the program for these shapes."""

    def __init__(self, folder: Path, heads: int, kv_heads: int, dim: int, splits: int, positions: int):
        self.heads, self.kv_heads, self.dim, self.splits = heads, kv_heads, dim, splits
        torch.manual_seed(heads * dim)
        self.q = torch.randn(positions, heads, dim).mul(3).bfloat16()
        self.k, self.v = (torch.randn(positions, kv_heads, dim).bfloat16() for _ in range(2))
        sizes = {
            "HEADS": heads, "KV_HEADS": kv_heads, "DIM": dim, "SPLITS": splits, "POSITIONS": positions,
            "SCALE": f"{dim**-0.5}f",
        }  # fmt: skip
        options = ("-pthread", *(f"-D{name}={size}" for name, size in sizes.items()))
        self.program = built("attention.cc", folder, ON_HOST / "warps", options=options)

    def run(self, *steps: tuple[int, int]) -> list[torch.Tensor]:
        """Of each step, (position, tokens), float32 [tokens, heads, dim]."""
        given = b"".join(t.view(torch.uint8).numpy().tobytes() for t in (self.q, self.k, self.v))
        words = [str(n) for step in steps for n in step]
        ran = subprocess.run([self.program, *words], input=given, capture_output=True, timeout=300, check=True)
        if self.splits == 1:
            out = torch.frombuffer(bytearray(ran.stdout), dtype=torch.bfloat16).float()
            out = out.view(len(steps), MAX_TOKENS, self.heads, self.dim)
        else:
            parts = torch.frombuffer(bytearray(ran.stdout), dtype=torch.float32)
            parts = parts.view(len(steps), MAX_TOKENS, self.splits, self.heads, self.dim + 2)
            out = torch.stack([self.merged(part, sum(step)) for part, step in zip(parts, steps, strict=True)])
        for one, (_, tokens) in zip(out, steps, strict=True):
            assert one[tokens:].isnan().all()
        return [one[:tokens] for one, (_, tokens) in zip(out, steps, strict=True)]

    def merged(self, part: torch.Tensor, end: int) -> torch.Tensor:
        """Of sums, maxima and sums of weights, [tokens, splits, heads, dim + 2], where `end` positions exist."""
        live = min(self.splits, -(-end // BLOCK))
        assert part[:, live:].isnan().all()  # splits without a block say nothing
        total, peak, weights = part[:, :live, :, :-2], part[:, :live, :, -2:-1], part[:, :live, :, -1:]
        scale = torch.exp(peak - peak.amax(1, keepdim=True))
        return (total * scale).sum(1) / (weights * scale).sum(1)

    def right(self, position: int, tokens: int) -> torch.Tensor:
        """The same in float64."""
        end = position + tokens
        q, k, v = self.q[position:end].double(), self.k[:end].double(), self.v[:end].double()
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        scores = torch.einsum("thd,phd->thp", q, k) * self.dim**-0.5
        seen = torch.arange(end) <= torch.arange(position, end)[:, None]
        return torch.einsum("thp,phd->thd", scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1), v)


def check(host: Host, *steps: tuple[int, int]) -> None:
    for step, found in zip(steps, host.run(*steps), strict=True):
        assert (found - host.right(*step)).abs().max() < (2e-2 if host.splits == 1 else 1e-3), step


@pytest.mark.parametrize("splits", [1, 2])
def test_steps_that_begin_anywhere(splits, tmp_path):
    """No block, one, a pair, a pair and one, two pairs; the last of them full, new, and partly new."""
    host = Host(tmp_path, 2, 1, 64, splits, 260)
    check(host, (0, 1), (0, 16), (63, 1), (64, 1), (100, 1), (120, 16), (128, 1), (191, 2), (200, 1), (250, 10))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "splits"),
    [(4, 1, 128, 1), (3, 1, 32, 1), (4, 2, 32, 3)],  # several heads share keys; 16 tokens x 4 heads are eight passes
)
def test_heads_of_all_sizes(heads, kv_heads, dim, splits, tmp_path):
    check(Host(tmp_path, heads, kv_heads, dim, splits, 150), (130, 1), (70, 16))


def test_a_token_has_the_same_bits_in_any_chunk(tmp_path):
    """Alone it may have a block less than the chunk: code for one where that has code for a pair."""
    host = Host(tmp_path, 2, 1, 64, 1, 150)
    chunk, *alone = host.run((115, 16), *((position, 1) for position in (115, 126, 127, 128, 130)))
    for one, token in zip(alone, (0, 11, 12, 13, 15), strict=True):
        assert torch.equal(one[0], chunk[token])
