"""How many workers share a KV head's cache (FlashDecoding), and who adds up what they find.

A worker takes every n-th block of positions. Its partial results are added up by every reader of the attention
(`fused`: each SM reads all of them), or once by tasks that each do a head (`apart`: one hop more, and readers get 2
bytes for a feature). Both are decided for the mean over the planned context, from what was measured on an H200 with one
to four splits: Qwen3-0.6B and 8B, Llama-1B and SmolLM2-135M at 128 positions, the first and the third also at 440.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from mpk_spec.planner.targets import Target

BLOCK_US = 0.45  # measured: a block of 64 positions more in one worker, with 16 or 32 KB of keys and values
PAIR_US = 0.7  # of two, which it takes at once; measured
AHEAD_BYTES = 128 * 1024  # of keys and values that a worker's ring has before there are queries
RING_BYTES = 176 * 1024  # of weights that an SM has before it needs them
READER_SHARE = 1.2  # times an SM's even part of the bandwidth, that it gets for keys and values that come later
FUSED_US = 0.3  # what readers do for a merge, besides what they read
MERGE_BYTES_PER_US = 60e3  # each SM reads the same partial results from L2,
STREAMED_BYTES_PER_US = 15e3  # in place of weights, as far as a layer's are not in the rings by then
HOP_US = 2.0  # measured: the kernel's hops of tasks that stream nothing, from stored values to stored values
FUSED_SPLITS = 4  # the fused merge loads so many at once; more are trips to L2, one after the other: 3 us a layer
MERGE_SMEM = 45 * 1024  # for one head's partial results, in a task that merges it: the kernel's scratch is a bit more


@dataclass(frozen=True)
class Attended:
    """One attention on one rank. context: positions that the cache has room for. layer_bytes: of a layer's weights."""

    heads: int
    kv_heads: int
    head_dim: int
    kv_block: int
    context: int
    layer_bytes: int

    @property
    def blocks(self) -> int:
        return max(1, -(-self.context // self.kv_block))

    @property
    def row_bytes(self) -> int:
        """One head's partial result of one split: its sum, maximum and sum of weights."""
        return (self.head_dim + 2) * 4

    @property
    def most_apart(self) -> int:
        """Splits whose partial results of a head fit into the memory of the task that merges them."""
        return MERGE_SMEM // self.row_bytes


def cheapest_splits(shape: Attended, target: Target, merge: str | None) -> int:
    """The fewest of those that cost least; at most as many as there are blocks, or SMs for every head.

    merge: `fused` or `apart` where that is said, else whichever costs less.
    """
    most = min(shape.blocks, max(1, target.num_sms // shape.kv_heads), shape.most_apart)
    if merge == "fused":
        most = min(most, FUSED_SPLITS)

    def cost(splits: int) -> float:
        return attention_us(shape, target, splits, merge or cheapest_merge(shape, target, splits))

    return min(range(1, most + 1), key=cost)


def cheapest_merge(shape: Attended, target: Target, splits: int) -> str:
    """`fused` or `apart`. More than FUSED_SPLITS are merged apart if they fit."""
    if splits > shape.most_apart:
        return "fused"
    if splits > FUSED_SPLITS:
        return "apart"
    return min(("fused", "apart"), key=lambda merge: attention_us(shape, target, splits, merge))


def attention_us(shape: Attended, target: Target, splits: int, merge: str) -> float:
    """From queries to what the readers' tensor cores take, in microseconds, on average while the cache fills up."""
    blocks = range(1, shape.blocks + 1)
    rate = READER_SHARE * target.stream_gbps / target.num_sms * 1e3  # bytes a microsecond

    def attended(block_count: int) -> float:
        late = block_count * shape.kv_block * shape.head_dim * 4 - AHEAD_BYTES
        return max(block_count // 2 * PAIR_US + block_count % 2 * BLOCK_US, late / rate + BLOCK_US)

    attend = fmean(attended(-(-n // splits)) for n in blocks)
    live, result = fmean(min(splits, n) for n in blocks), shape.heads * shape.head_dim * 2
    streams = max(0.0, 1 - RING_BYTES * target.num_sms / max(1, shape.layer_bytes))
    byte_us = 1 / MERGE_BYTES_PER_US + streams / STREAMED_BYTES_PER_US  # of what all SMs read
    if splits == 1:
        return attend + result * byte_us
    if merge == "fused":
        return attend + FUSED_US + live * shape.heads * shape.row_bytes * byte_us
    return attend + HOP_US + live * shape.row_bytes / MERGE_BYTES_PER_US + result * byte_us
