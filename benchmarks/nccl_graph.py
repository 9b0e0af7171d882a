"""The rival of tensor parallelism: a decode step written out in torch with NCCL's all-reduces, in one CUDA graph.

torchrun --nproc-per-node 2 benchmarks/nccl_graph.py qwen3:8b

Weights are random; products, attention over `--position` cached positions, norms and both all-reduces of a layer are
those of a dense model with grouped heads. Left out, in the rival's favour: head norms, RoPE, the argmax across ranks.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="SPEC:SIZE")
    parser.add_argument("--position", type=int, default=128)
    options = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    step = Step(config_of(options.model), dist.get_world_size(), options.position)
    ms = captured_ms(step)
    if dist.get_rank() == 0:
        print(f"{options.model}, CUDA graph with NCCL, tp {dist.get_world_size()}: {ms:.4f} ms/token")
    dist.destroy_process_group()


def config_of(model: str):
    """The model's config, complete."""
    from mpk_spec.runtime.random_model import random_checkpoint
    from mpk_spec.schema import load_spec
    from mpk_spec.weights import text_config

    name, _, size = model.partition(":")
    return text_config(random_checkpoint(load_spec(name), size, 0).config)


class Step:
    """One token's step on one rank; weights, cache and result stay where they are, as a graph needs it."""

    def __init__(self, config: dict, ranks: int, position: int):
        hidden, inter, self.dim = config["hidden_size"], config["intermediate_size"] // ranks, config["head_dim"]
        self.heads = config["num_attention_heads"] // ranks
        self.kv_heads = max(1, config["num_key_value_heads"] // ranks)

        def weight(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * columns**-0.5

        q, kv = self.heads * self.dim, self.kv_heads * self.dim
        self.layers = [
            (weight(q + 2 * kv, hidden), weight(hidden, q), weight(2 * inter, hidden), weight(hidden, inter),
             weight(2 * self.kv_heads * position, self.dim).view(2, 1, self.kv_heads, position, self.dim))
            for _ in range(config["num_hidden_layers"])
        ]  # fmt: skip
        self.embed = weight(config["vocab_size"], hidden)
        self.head = weight(config["vocab_size"] // ranks, hidden)
        self.gain = torch.ones(hidden, device="cuda", dtype=torch.bfloat16)
        self.token = torch.zeros(1, device="cuda", dtype=torch.long)

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.gain, 1e-6)

    def __call__(self) -> None:
        x = self.embed[self.token]
        for qkv, out, gate_up, down, cache in self.layers:
            made = F.linear(self.norm(x), qkv).view(1, -1, 1, self.dim)
            q, k, v = made.split([self.heads, self.kv_heads, self.kv_heads], 1)
            cache[0, :, :, -1:], cache[1, :, :, -1:] = k, v
            attended = F.scaled_dot_product_attention(q, cache[0], cache[1], enable_gqa=True)
            part = F.linear(attended.reshape(1, -1), out)
            dist.all_reduce(part)
            x = x + part
            gate, up = F.linear(self.norm(x), gate_up).chunk(2, -1)
            part = F.linear(F.silu(gate) * up, down)
            dist.all_reduce(part)
            x = x + part
        self.token.copy_(F.linear(self.norm(x), self.head).argmax(-1))


def captured_ms(step: Step) -> float:
    """Milliseconds of one step, from 50 replays."""
    with torch.inference_mode():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL has a thread that looks at events
            step()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(5):
            graph.replay()
        dist.barrier()
        begin.record()
        for _ in range(50):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 50


if __name__ == "__main__":
    main()
