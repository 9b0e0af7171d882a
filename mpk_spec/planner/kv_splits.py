"""How many workers share a KV head's cache (FlashDecoding), and who adds up what they find.

A worker takes every n-th block of positions. Its partial results are added up by every reader of the attention
(`fused`: each SM reads all of them), or once by tasks that each do a head (`apart`: one hop more, and readers get 2
bytes for a feature). Both are decided at half of the planned context, from what was measured on an H200: Qwen3-0.6B,
Llama-1B and SmolLM2-135M token by token at positions 32 to 300.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpk_spec.planner.targets import Target

BLOCK_US = 0.45  # measured: a block of 64 positions more in one worker, with 16 or 32 KB of keys and values
READER_SHARE = 2  # times an SM's even part of the bandwidth, that it gets while others wait: 32 KB in those 0.45 us
MERGE_BYTES_PER_US = 25e3  # measured: all SMs read the same partial results from L2, 8 KB of a live split more
HOP_US = 2.0  # measured: the kernel's hops of tasks that stream nothing, from stored values to stored values
FUSED_SPLITS = 4  # the fused merge loads so many at once; more are trips to L2, one after the other: 3 us a layer
MERGE_SMEM = 45 * 1024  # for one head's partial results, in a task that merges it: the kernel's scratch is a bit more


@dataclass(frozen=True)
class Attended:
    """One attention on one rank. context: positions that the cache has room for."""

    heads: int
    kv_heads: int
    head_dim: int
    kv_block: int
    context: int

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
    blocks = -(-shape.context // shape.kv_block)
    most = min(blocks, max(1, target.num_sms // shape.kv_heads), shape.most_apart)
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
    """From queries to what the readers' tensor cores take, in microseconds, at half of the context."""
    blocks = max(1, -(-shape.context // 2 // shape.kv_block))
    rate = READER_SHARE * target.stream_gbps / target.num_sms * 1e3
    block_us = max(BLOCK_US, shape.kv_block * shape.head_dim * 4 / rate)
    attend = -(-blocks // splits) * block_us
    live, result = min(splits, blocks), shape.heads * shape.head_dim * 2
    if splits == 1:
        return attend + result / MERGE_BYTES_PER_US
    if merge == "fused":
        return attend + live * shape.heads * shape.row_bytes / MERGE_BYTES_PER_US
    return attend + HOP_US + (live * shape.row_bytes + result) / MERGE_BYTES_PER_US
