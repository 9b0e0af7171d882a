"""Checks and times the CUDA kernel on random weights, one size after another, in one go.

python benchmarks/kernel.py check qwen3:tiny smollm2:135m     # logits against Hugging Face in float32 and bf16
python benchmarks/kernel.py time qwen3:0.6b qwen3:8b          # ms per token, of the kernel alone
python benchmarks/kernel.py trace qwen3:8b                    # where the time of a token goes
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "time", "trace"])
    parser.add_argument("models", nargs="+", metavar="SPEC:SIZE")
    parser.add_argument("--target", default="h100")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for model in options.models:
        {"check": check, "time": measure, "trace": trace}[options.what](model, options)


def open_random(model: str, options, defines: tuple[str, ...] = ()):
    """(backend, checkpoint) with weights drawn on the GPU."""
    from mpk_spec.planner import plan
    from mpk_spec.runtime.cuda_backend import CudaBackend
    from mpk_spec.runtime.random_model import checkpoint_of_plan
    from mpk_spec.schema import load_spec

    name, _, size = model.partition(":")
    made = plan(load_spec(name), size=size, target=options.target, context=options.context)
    checkpoint = checkpoint_of_plan(made, options.seed)
    checkpoint._device = "cuda"
    started = time.perf_counter()
    backend = CudaBackend(made, checkpoint, defines=defines)
    backend.launcher.timeout_s = 3.0
    report = backend.compiled.report
    print(
        f"{model}: {report.registers} registers, {report.spill_bytes} spilled, compiled in {report.seconds} s, "
        f"shared {backend.launcher.module.sizes['shared_bytes']}, ready after {time.perf_counter() - started:.1f} s"
    )
    return backend, checkpoint


def prompt_of(backend, count: int, salt: int = 0) -> list[int]:
    return [(17 + 31 * n + 7 * salt + n * n * 13) % backend.vocab_size for n in range(count)]


def check(model: str, options) -> None:
    import torch

    from mpk_spec.weights import load_hf_model

    torch.backends.cuda.matmul.allow_tf32 = False
    backend, checkpoint = open_random(model, options)
    ids = prompt_of(backend, options.prompt)
    ours = backend.logits(ids).cuda()
    again = backend.logits(ids).cuda()
    print(f"  same bits twice: {torch.equal(ours, again)}; not finite: {int((~ours.isfinite()).sum())}")
    one = [i for n, i in enumerate(ids[:40])]
    backend.reset()
    parts = []
    for n, token in enumerate(one):  # one token a step: the same bits as in chunks
        backend.launcher.start([token], n, 0)
        backend.launcher.finish()
        parts.append(backend.value("logits", 1)[:, : backend.vocab_size])
    alone = torch.cat(parts)
    print(
        f"  same bits token by token: {torch.equal(ours[:40], alone)} "
        f"(max difference {(ours[:40] - alone).abs().max():.2e})"
    )
    results = {}
    for dtype in ("float32", "bfloat16"):
        hf = load_hf_model(checkpoint, dtype=dtype, device="cuda")
        with torch.inference_mode():
            results[dtype] = hf(torch.tensor([ids], device="cuda")).logits[0].float()
        del hf
    truth = results["float32"]
    for name, logits in (("ours", ours), ("HF bf16", results["bfloat16"])):
        error = (logits - truth).norm() / truth.norm()
        kl = (truth.softmax(-1) * (truth.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)
        top = (logits.argmax(-1) == truth.argmax(-1)).float().mean()
        print(f"  {name}: relative error {error:.2e}, KL mean {kl.mean():.2e} max {kl.max():.2e}, top-1 {top:.4f}")
    made = list(backend.stream(ids[:37], max_new_tokens=40))
    replay = backend.logits(ids[:37] + made)
    want = replay[36:-1].argmax(-1).tolist()
    print(f"  stream agrees with its own logits: {made == want} ({len(made)} tokens)")
    backend.close()


def kernel_ms(backend, prompt: list[int], new: int) -> float:
    """One launch, by the GPU's clock."""
    import torch

    launcher = backend.launcher
    backend.reset()
    launch = launcher.module.launch
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def timed(params, stream):
        begin.record(launcher.stream)
        launch(params, stream)
        end.record(launcher.stream)

    launcher.module.launch = timed
    try:
        launcher.start(prompt, 0, new)
        launcher.finish()
    finally:
        launcher.module.launch = launch
    return begin.elapsed_time(end)


def measure(model: str, options) -> None:
    backend, _ = open_random(model, options)
    prompt = prompt_of(backend, options.prompt)
    runs = []
    for _ in range(6):
        short, long = kernel_ms(backend, prompt, 1), kernel_ms(backend, prompt, options.new + 1)
        runs.append((long - short) / options.new)
    layout = backend.emitted.layout
    size = sum(p.rows * p.k * 2 * (layout.layers if p.layer_stride else 1) for p in layout.packed.values())
    ms = statistics.median(runs[1:])
    started = time.perf_counter()
    made = list(backend.stream(prompt, max_new_tokens=options.new))
    total = time.perf_counter() - started
    print(
        f"  {ms:.4f} ms/token ({min(runs):.4f} to {max(runs[1:]):.4f}), {size / 1e9:.3f} GB, "
        f"{size / ms / 1e6:.0f} GB/s; "
        f"prompt of {len(prompt)}: {short:.2f} ms; {len(made)} tokens seen by the host in {total * 1e3:.1f} ms"
    )
    backend.close()


def trace(model: str, options) -> None:
    from mpk_spec.planner.simulate import simulate
    from mpk_spec.profiler.clock import common_clock
    from mpk_spec.profiler.report import page, profile_of
    from mpk_spec.profiler.run import record
    from mpk_spec.runtime.cuda_probe import PROFILE

    backend, _ = open_random(model, options, (PROFILE,))
    times = common_clock(record(backend, options.prompt, 4))
    print(page(profile_of(times, simulate(backend.plan, context=options.prompt))))
    backend.close()


if __name__ == "__main__":
    sys.exit(main())
