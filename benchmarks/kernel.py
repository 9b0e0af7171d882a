"""Checks and times the CUDA kernel on random weights, one size after another, in one go.

python benchmarks/kernel.py check qwen3:tiny smollm2:135m     # the same bits each way, and the distance from float32
python benchmarks/kernel.py time qwen3:0.6b qwen3:8b          # ms per token; --ceiling measures what 100 % is
python benchmarks/kernel.py trace qwen3:8b                    # where the time of a token goes
python benchmarks/kernel.py compile qwen3:8b                  # ahead of the others, without a GPU
"""

from __future__ import annotations

import argparse
import sys
import time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "time", "trace", "compile"])
    parser.add_argument("models", nargs="+", metavar="SPEC:SIZE")
    parser.add_argument("--target", default="h100")
    parser.add_argument("--context", type=int, default=512, help="positions that the cache has room for")
    parser.add_argument("--prompt", type=int, default=128, help="positions in the cache, on average, when timed")
    parser.add_argument("--new", type=int, default=64, help="tokens of a timed launch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--rule", action="append", metavar="KEY=VALUE", default=[], help="of the schedule, for all groups"
    )
    parser.add_argument(
        "--without", action="append", metavar="FUSION[=OPERATOR,...]", default=[], help="leave it out, but for these"
    )
    parser.add_argument("--ceiling", action="store_true", help="measure the ceiling of memory first")
    options = parser.parse_args()
    options.gbps = measured_ceiling(options.target) if options.ceiling else None
    for model in options.models:
        {"check": check, "time": measure, "trace": trace, "compile": compiled}[options.what](model, options)
    return 0


def measured_ceiling(target: str) -> float:
    from mpk_spec.perf.ceiling import measure_ceiling
    from mpk_spec.planner.targets import find_target
    from mpk_spec.runtime.cuda_device import free_gpu

    ceiling = measure_ceiling(find_target(target))
    free_gpu()
    best = ceiling.best
    print(
        f"ceiling {ceiling.gbps:.0f} GB/s, chunks of {best.chunk_kib} KiB, {best.flight_kib} KiB in flight for each SM"
    )
    return ceiling.gbps


def ruled(spec, rules: list[str], without: list[str]):
    """The spec with rules for `*`, as in crossing=event or in_flight=32768, and with fusions left out, as in o_add, or
    but for some of their operators, as in attend=attention.cache,attention.a."""
    from mpk_spec.errors import UserError, did_you_mean
    from mpk_spec.tuner.space import with_rules

    words = dict(rule.split("=", 1) for rule in rules)
    settings = {"*": {k: int(v) if v.isdecimal() else v for k, v in words.items()}} if words else {}
    for name, kept in (word.partition("=")[::2] for word in without):
        if name not in spec.fusions:
            raise UserError(f"there is no fusion '{name}'", did_you_mean(name, spec.fusions, "fusions"))
        settings[name] = {"fuse": kept.split(",") if kept else False}
    return with_rules(spec, settings)


def planned(model: str, options):
    from mpk_spec.planner import plan
    from mpk_spec.schema import load_spec

    name, _, size = model.partition(":")
    context = max(options.context, options.prompt + options.new)
    spec = ruled(load_spec(name), options.rule, options.without)
    return plan(spec, size=size, target=options.target, context=context)


def compiled(model: str, options) -> None:
    """Into the cache of cubins; needs no GPU."""
    from mpk_spec.tuner.gpu import compile_plan

    compile_plan(planned(model, options))


def open_random(model: str, options, defines: tuple[str, ...] = ()):
    """(backend, checkpoint) with random weights."""
    from mpk_spec.runtime.cuda_backend import CudaBackend
    from mpk_spec.runtime.random_model import checkpoint_of_plan

    made = planned(model, options)
    checkpoint = checkpoint_of_plan(made, options.seed)
    started = time.perf_counter()
    backend = CudaBackend(made, checkpoint, defines=defines)
    backend.launcher.timeout_s = 3.0
    report = backend.compiled.report
    print(
        f"{model}: {report.registers} registers, {report.spill_bytes} spilled, compiled in {report.seconds} s, "
        f"shared {backend.launcher.module.sizes['shared_bytes']}, ready after {time.perf_counter() - started:.1f} s"
    )
    return backend, checkpoint


def check(model: str, options) -> None:
    """The same bits run after run, token by token as in chunks, streamed as read; and the verdict of `compare`."""
    import torch

    from mpk_spec.testing.yardstick import Yardstick, sequences

    backend, checkpoint = open_random(model, options)
    (ids,) = sequences(backend.vocab_size, options.prompt, 1, options.prompt)
    ours, again = backend.logits(ids), backend.logits(ids)
    print(f"  same bits twice: {torch.equal(ours, again)}; not finite: {int((~ours.isfinite()).sum())}")
    one = backend.logits(ids, alone=40)
    apart = (ours - one).abs().max()
    print(f"  same bits token by token: {torch.equal(ours, one)} (max difference {apart:.2e})")
    made = list(backend.stream(ids[:37], max_new_tokens=40))
    want = backend.logits(ids[:37] + made)[36:-1].argmax(-1).tolist()
    print(f"  stream agrees with its own logits: {made == want} ({len(made)} tokens)")
    verdict = Yardstick(checkpoint, [ids]).judge(backend)
    for row in verdict.rows:
        print(f"  {row.name}: ours {row.ours:.3g}, Hugging Face in bf16 {row.rival:.3g}, at most {row.limit:.3g}")
    print(f"  verdict over {verdict.ours.positions} positions: {'passed' if verdict.passed else 'FAILED'}")
    backend.close()


def measure(model: str, options) -> None:
    from mpk_spec.perf.bench import bytes_per_token
    from mpk_spec.perf.clock import time_decode

    backend, _ = open_random(model, options)
    times = time_decode(backend, options.prompt, options.new, options.repeats)
    ms, size = times.kernel_ms, bytes_per_token(backend.plan, options.prompt)["total"]
    gbps = size / ms / 1e6
    share = f", {100 * gbps / options.gbps:.1f} % of the ceiling" if options.gbps else ""
    print(
        f"  {ms:.4f} ms/token ({times.kernel_ms_min:.4f} to {times.kernel_ms_max:.4f}), {size / 1e9:.3f} GB, "
        f"{gbps:.0f} GB/s{share}; as a user sees it {times.user_ms:.4f} ms, a launch costs {times.launch_ms:.3f} ms"
    )
    backend.close()


def trace(model: str, options) -> None:
    from mpk_spec.planner.simulate import predict
    from mpk_spec.profiler.clock import common_clock
    from mpk_spec.profiler.report import report
    from mpk_spec.profiler.run import record
    from mpk_spec.runtime.cuda_probe import PROFILE

    backend, _ = open_random(model, options, (PROFILE,))
    times = common_clock(*record(backend, options.prompt, 4))
    *_, shown = report([times], predict(backend.plan, context=options.prompt))
    print(shown)
    backend.close()


if __name__ == "__main__":
    sys.exit(main())
