"""One model on one GPU and on several: ms per token on random weights, which every rank draws for itself.

python benchmarks/tensor_parallel.py smoke                          # a tiny model on two GPUs, step by step
python benchmarks/tensor_parallel.py time qwen3:8b --tp 1 2         # ms per token, of the kernel alone
python benchmarks/tensor_parallel.py trace qwen3:8b --tp 2          # where the time of one layer goes, on rank 0
python benchmarks/nccl_graph.py ...                                 # the rival: see there
"""

from __future__ import annotations

import argparse
import faulthandler
import statistics
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["smoke", "time", "trace"])
    parser.add_argument("models", nargs="*", metavar="SPEC:SIZE", default=["qwen3:tiny"])
    parser.add_argument("--tp", type=int, nargs="+", default=[2])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--limit", type=float, default=120, help="seconds after which all stacks are shown")
    options = parser.parse_args()
    faulthandler.dump_traceback_later(options.limit, exit=True)
    for model in options.models:
        rows = {
            tp: {"smoke": smoke, "time": measure, "trace": trace}[options.what](model, tp, options) for tp in options.tp
        }
        if options.what == "time":
            show(model, rows)


def open_random(model: str, tp: int, options):
    from mpk_spec.runtime.engine import Engine
    from mpk_spec.runtime.random_model import random_checkpoint
    from mpk_spec.runtime.select import plan_for_gpu
    from mpk_spec.schema import load_spec

    name, _, size = model.partition(":")
    spec = load_spec(name)
    checkpoint = random_checkpoint(spec, size, 0)
    checkpoint._device = "cuda"
    started = time.perf_counter()
    plan = plan_for_gpu(spec, size, checkpoint, options.context, tp)

    def progress(what: str, done: int, total: int) -> None:
        if total == 0:
            say(started, what)

    backend = Engine(plan, checkpoint, progress=progress).backend
    if tp > 1:
        backend.ranks.call("configure", 3.0)
    report = backend.compiled.report
    say(started, f"{model} tp {tp} ready: {report.registers} registers, {report.spill_bytes} spilled")
    return backend


def say(started: float, what: str) -> None:
    print(f"  [{time.perf_counter() - started:6.2f} s] {what}", flush=True)


def prompt_of(backend, count: int) -> list[int]:
    return [(17 + 31 * n + n * n * 13) % backend.vocab_size for n in range(count)]


def local_launcher(backend):
    ranks = getattr(backend, "ranks", None)
    return backend.launcher if ranks is None else ranks.local.launcher


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
    say(started, f"  kernel: {kernel_ms(backend, ids, 100) / 103:.4f} ms per step")
    backend.close()
    say(started, "closed")


def kernel_ms(backend, prompt: list[int], new: int) -> float:
    """One launch, by rank 0's clock."""
    import torch

    launcher = local_launcher(backend)
    backend.reset()
    launch = launcher.module.launch
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def timed(params, stream):
        begin.record(launcher.stream)
        launch(params, stream)
        end.record(launcher.stream)

    launcher.module.launch = timed
    try:
        backend.launcher.start(prompt, 0, new)
        backend.launcher.finish()
    finally:
        del launcher.module.launch
    return begin.elapsed_time(end)


def measure(model: str, tp: int, options) -> tuple[float, float, float, float]:
    """(median ms per token, fastest, slowest, GB that a rank streams per token)."""
    backend = open_random(model, tp, options)
    prompt, runs = prompt_of(backend, options.prompt), []
    for _ in range(6):
        short, long = kernel_ms(backend, prompt, 1), kernel_ms(backend, prompt, options.new + 1)
        runs.append((long - short) / options.new)
    layout = backend.emitted.layout
    size = sum(p.rows * p.k * 2 * (layout.layers if p.layer_stride else 1) for p in layout.packed.values())
    backend.close()
    return statistics.median(runs[1:]), min(runs[1:]), max(runs[1:]), size / 1e9


def show(model: str, rows: dict[int, tuple[float, float, float, float]]) -> None:
    import torch

    print(f"{model}, {torch.cuda.get_device_name(0)}, batch 1")
    first = rows.get(1)
    for tp, (ms, low, high, size) in rows.items():
        gain = f", {first[0] / ms:.2f} times tp 1" if first and tp > 1 else ""
        print(
            f"  tp {tp}: {ms:.4f} ms/token ({low:.4f} to {high:.4f}), {size / ms * 1e3:.0f} GB/s a rank{gain}",
            flush=True,
        )


def trace(model: str, tp: int, options) -> None:
    """Times of two layers and the head, each from the first task asked for in the layer."""
    import torch

    backend = open_random(model, tp, options)
    launcher, emitted = local_launcher(backend), backend.emitted
    step, prompt = emitted.step, prompt_of(backend, options.prompt)
    shape = (backend.plan.num_sms, len(step.stages), emitted.programs.max_queue, 4)
    launcher.trace = torch.zeros(shape, dtype=torch.int64, device="cuda")
    launcher.trace_step = launcher.steps + -(-len(prompt) // 16) + 8
    list(backend.stream(prompt, max_new_tokens=12))
    times, layer = launcher.trace.cpu(), len(step.stages) // 2
    for stage in (layer, layer + 1, len(step.stages) - 1):
        template = step.templates[step.stages[stage].template]
        zero = int(times[:, stage][times[:, stage] > 0].min())
        print(f"stage {stage}: {'':20s} asked          ready          computed       signalled      us")
        for number, group in enumerate(template.groups):
            places = [
                (sm, n) for sm, queue in enumerate(template.queues) for n, (g, _) in enumerate(queue) if g == number
            ]
            t = (torch.stack([times[sm, stage, n] for sm, n in places]) - zero).double() / 1e3
            spread = "".join(f" {lo:6.2f}-{hi:<7.2f}" for lo, hi in zip(t.amin(0), t.amax(0), strict=True))
            print(f"  {group.name:26s}{spread}  {len(places)} tasks")
    backend.close()


if __name__ == "__main__":
    sys.exit(main())
