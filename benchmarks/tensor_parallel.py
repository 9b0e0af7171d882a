"""One model on one GPU and on several: ms per token on random weights, which every rank draws for itself.

python benchmarks/tensor_parallel.py smoke                          # a tiny model on two GPUs, step by step
python benchmarks/tensor_parallel.py time qwen3:8b --tp 1 2         # ms per token, of the kernel alone
python benchmarks/tensor_parallel.py trace qwen3:8b --tp 2          # where a token's time goes, what its sums cost
python benchmarks/tensor_parallel.py trace qwen3:8b --tp 2 --layer 15 --output layer.json.gz   # one layer of one token
python benchmarks/nccl_graph.py ...                                 # the rival: see there
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpk_spec.perf.clock import Times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["smoke", "time", "trace"])
    parser.add_argument("models", nargs="*", metavar="SPEC:SIZE", default=["qwen3:tiny"])
    parser.add_argument("--tp", type=int, nargs="+", default=[2])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--position", type=int, default=128, help="in the cache while it is measured")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--output", help="trace: a file for ui.perfetto.dev; .gz compresses it")
    parser.add_argument("--layer", type=int, help="trace: only this layer of one token goes into the file")
    parser.add_argument("--limit", type=float, default=120, help="seconds after which all stacks are shown")
    options = parser.parse_args()
    if options.layer is not None and not (options.what == "trace" and options.output):
        parser.error("--layer says what the --output of a trace is to hold")
    faulthandler.dump_traceback_later(options.limit, exit=True)
    for model in options.models:
        rows = {
            tp: {"smoke": smoke, "time": measure, "trace": trace}[options.what](model, tp, options) for tp in options.tp
        }
        if options.what == "time":
            show(model, rows)


def open_random(model: str, tp: int, options, defines: tuple[str, ...] = ()):
    from mpk_spec.runtime.parallel_backend import open_kernel
    from mpk_spec.runtime.random_model import random_checkpoint
    from mpk_spec.runtime.select import plan_for_gpu
    from mpk_spec.schema import load_spec

    name, _, size = model.partition(":")
    spec = load_spec(name)
    checkpoint = random_checkpoint(spec, size, 0).on("cuda")
    started = time.perf_counter()
    plan = plan_for_gpu(spec, size, checkpoint, options.context, tp)

    def progress(what: str, done: int, total: int) -> None:
        if total == 0:
            say(started, what)

    backend = open_kernel(plan, checkpoint, progress, defines=defines)
    if tp > 1:
        backend.ranks.call("configure", 3.0)
    report = backend.compiled.report
    say(started, f"{model} tp {tp} ready: {report.registers} registers, {report.spill_bytes} spilled")
    return backend


def say(started: float, what: str) -> None:
    print(f"  [{time.perf_counter() - started:6.2f} s] {what}", flush=True)


def prompt_of(backend, count: int) -> list[int]:
    return [(17 + 31 * n + n * n * 13) % backend.vocab_size for n in range(count)]


def smoke(model: str, tp: int, options) -> None:
    """Each step is said before it is tried, so that the last line says which one failed."""
    import torch

    from mpk_spec.reference.backend import ReferenceBackend
    from mpk_spec.runtime.random_model import random_checkpoint
    from mpk_spec.schema import load_spec

    started = time.perf_counter()
    backend = open_random(model, tp, options)
    name, _, size = model.partition(":")
    reference = ReferenceBackend(backend.plan, random_checkpoint(load_spec(name), size, 0))
    ids = prompt_of(backend, 40)
    for count in (1, 16, 40):
        say(started, f"logits of {count} tokens")
        ours, wanted = backend.logits(ids[:count]), reference.logits(ids[:count])
        error, top = (ours - wanted).abs().max(), (ours.argmax(-1) == wanted.argmax(-1)).float().mean()
        say(
            started,
            f"  largest error {error:.2e} of std {wanted.std():.2f}, top-1 {top:.3f}, nan {int(ours.isnan().sum())}",
        )
    for name in ("y", "next_ids"):
        parts = backend.ranks.call("value", name, 1)
        say(started, f"same '{name}' on all ranks: {all(torch.equal(parts[0], p) for p in parts)}")
    say(started, "an answer of 100 tokens")
    made = list(backend.stream(ids, max_new_tokens=100))
    say(started, f"  again the same: {made == list(backend.stream(ids, max_new_tokens=100))}, {made[:8]} ...")
    say(started, f"  kernel: {backend.launcher.elapsed_ms() / 103:.4f} ms per step")
    backend.close()
    say(started, "closed")


def measure(model: str, tp: int, options) -> tuple[Times, float]:
    """Times per token by rank 0's clock, and the GB that a rank streams for one."""
    from mpk_spec.perf.clock import time_decode

    backend = open_random(model, tp, options)
    times = time_decode(backend, options.position, options.new, repeats=5)
    layout = backend.emitted.layout
    size = sum(p.rows * p.k * 2 * (layout.layers if p.layer_stride else 1) for p in layout.packed.values())
    backend.close()
    return times, size / 1e9


def show(model: str, rows: dict[int, tuple[Times, float]]) -> None:
    import torch

    print(f"{model}, {torch.cuda.get_device_name(0)}, batch 1")
    alone = rows[1][0].kernel_ms if 1 in rows else None
    for tp, (times, size) in rows.items():
        ms, spread = times.kernel_ms, f"{times.kernel_ms_min:.4f} to {times.kernel_ms_max:.4f}"
        gain = f", {alone / ms:.2f} times tp 1" if alone and tp > 1 else ""
        print(f"  tp {tp}: {ms:.4f} ms/token ({spread}), {size / ms * 1e3:.0f} GB/s a rank{gain}", flush=True)


def trace(model: str, tp: int, options) -> None:
    """As `mpk-spec profile --tp`, on weights that every rank draws for itself; the trace where `--output` says."""
    from mpk_spec.planner.simulate import predict
    from mpk_spec.profiler.chrome import check_layer, chrome_trace, write_trace
    from mpk_spec.profiler.clock import common_clock
    from mpk_spec.profiler.report import report
    from mpk_spec.profiler.run import record
    from mpk_spec.runtime.cuda_probe import PROFILE

    backend = open_random(model, tp, options, (PROFILE,))
    if options.layer is not None:
        check_layer(backend.plan, options.layer)
    ranks = [common_clock(raw) for raw in record(backend, options.position, 4)]
    backend.close()
    ranks, clocks, _, shown = report(ranks, predict(backend.plan, context=options.position))
    print(shown)
    if options.output:
        write_trace(
            Path(options.output), chrome_trace(backend.plan, backend.emitted.step, ranks, clocks, options.layer)
        )


if __name__ == "__main__":
    sys.exit(main())
