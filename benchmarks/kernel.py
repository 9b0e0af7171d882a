"""Checks and times the CUDA kernel on random weights: one size after another, on one GPU or several, in one go.

python benchmarks/kernel.py check qwen3:tiny smollm2:135m     # the same bits each way, and the distance from float32
python benchmarks/kernel.py check qwen3:tiny --tp 2           # on two GPUs; the last line says which step failed
python benchmarks/kernel.py time qwen3:0.6b qwen3:8b          # ms per token; --ceiling measures what 100 % is
python benchmarks/kernel.py time qwen3:8b --tp 1 2            # and what the second GPU is worth
python benchmarks/kernel.py trace qwen3:8b --tp 2             # where a token's time goes, what its sums cost
python benchmarks/kernel.py trace qwen3:8b --tp 2 --layer 15 --output layer.json.gz   # one layer of one token
python benchmarks/kernel.py compile qwen3:8b --tp 1 2         # ahead of the others, without a GPU

With several GPUs every rank draws its weights for itself. benchmarks/nccl_graph.py is the rival then.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from random_kernel import compiled, described, open_random, planned, say, spec_of, target_here

from mpk_spec.errors import MpkSpecError

if TYPE_CHECKING:
    from mpk_spec.perf.clock import Times
    from mpk_spec.planner.plan import Plan

RANKS_LIMIT_S = 120.0  # where ranks may wait for one another for ever
RECORDED = 4  # tokens of a trace
ASKED, ANSWER = 37, 100  # tokens of an answer that is checked
ALONE = 40  # positions that are also computed token by token
SMALL = 5_000_000  # parameters of what the CPU runs in no time


def main() -> int:
    options = arguments()
    limit = options.limit or (RANKS_LIMIT_S if max(options.tp) > 1 and options.what != "compile" else None)
    if limit:
        faulthandler.dump_traceback_later(limit, exit=True)  # also of libraries that wait when the program ends
    try:
        return run(options)
    except MpkSpecError as error:
        sys.exit(f"error: {error}")


def arguments() -> argparse.Namespace:
    from mpk_spec.planner import DEGREES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "time", "trace", "compile"])
    parser.add_argument("models", nargs="+", metavar="SPEC:SIZE")
    parser.add_argument("--tp", type=int, nargs="+", choices=DEGREES, default=[1], metavar="N", help="GPUs; default: 1")
    parser.add_argument("--target", help="default: this machine's GPU; to compile without one, h100")
    parser.add_argument("--context", type=int, default=512, help="positions that the cache has room for, at least")
    parser.add_argument(
        "--prompt", type=int, default=128, help="positions in the cache, on average; tokens that are checked"
    )
    parser.add_argument("--new", type=int, default=64, help="tokens of a timed launch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--rule", action="append", metavar="KEY=VALUE", default=[], help="of the schedule, for all groups"
    )
    parser.add_argument(
        "--without", action="append", metavar="FUSION[=OPERATOR,...]", default=[], help="leave it out, but for these"
    )
    parser.add_argument("--ceiling", action="store_true", help="time: measure the ceiling of the first GPU's memory")
    parser.add_argument("--output", type=Path, metavar="FILE", help="trace: for ui.perfetto.dev; .gz compresses it")
    parser.add_argument("--layer", type=int, help="trace: only this layer of one token goes into the file")
    parser.add_argument(
        "--limit", type=float, metavar="S",
        help=f"seconds after which all stacks are shown and all ends; default with several GPUs: {RANKS_LIMIT_S:.0f}",
    )  # fmt: skip
    options = parser.parse_args()
    options.tp = sorted(set(options.tp))
    if options.output and (options.what != "trace" or len(options.models) * len(options.tp) > 1):
        parser.error("--output is for one trace: of one model, with one --tp")
    if options.layer is not None and not options.output:
        parser.error("--layer says what the --output of a trace is to hold")
    if options.ceiling and options.what != "time":
        parser.error("--ceiling is what a time is a part of")
    return options


def run(options) -> int:
    """What was asked for, for every model and degree; 1 where a check fails."""
    from mpk_spec.files import check_place

    for model in options.models:
        spec_of(model)
    if options.output:
        check_place(options.output)
    if options.what != "compile":
        need_gpus(max(options.tp))
    options.target = options.target or target_here(needed=options.what != "compile")
    if options.what == "time":
        say(about(options))
    every = list(plans(options))
    gbps = measured_ceiling(options.target) if options.ceiling else None
    rows, failed = [], 0
    for model, plan in every:
        say(f"{model}, tp {plan.tp}: {options.what}")
        if options.what == "compile":
            say(described(compiled(plan)))
        elif options.what == "check":
            failed += not check(plan, options)
        elif options.what == "time":
            rows.append(Row(model, plan.tp, *measure(plan, options)))
            print(lines(rows, gbps)[-1], flush=True)
        else:
            trace(plan, options)
    if len(rows) > 1:
        print("", about(options), *lines(rows, gbps), sep="\n")
    return 1 if failed else 0


def need_gpus(count: int) -> None:
    """Raises NoGpu where there are fewer."""
    from mpk_spec.runtime.cuda_device import find_device, gpu_alone
    from mpk_spec.runtime.parallel_backend import check_gpus

    with gpu_alone():
        find_device()
        check_gpus(count)


def measured_ceiling(target: str) -> float:
    from mpk_spec.perf.ceiling import measure_ceiling
    from mpk_spec.planner.targets import find_target
    from mpk_spec.runtime.cuda_device import free_gpu

    say("measuring the ceiling of memory")
    ceiling = measure_ceiling(find_target(target))
    free_gpu()
    best = ceiling.best
    say(f"ceiling {ceiling.gbps:.0f} GB/s, chunks of {best.chunk_kib} KiB, {best.flight_kib} KiB in flight for each SM")
    return ceiling.gbps


def plans(options) -> Iterator[tuple[str, Plan]]:
    """(model, its plan) for every model and degree."""
    context = max(options.context, options.prompt + options.new)
    for model in options.models:
        for tp in options.tp:
            say(f"{model}, tp {tp}, {options.target}: planning")
            yield (
                model,
                planned(
                    model, target=options.target, tp=tp, context=context, rules=options.rule, without=options.without
                ),
            )


def check(plan: Plan, options) -> bool:
    """The same bits run after run, token by token as in chunks, on all ranks, streamed as read; and whether it is as
    near the truth as `compare` asks. Each step is said before it is tried."""
    import torch

    from mpk_spec.testing.yardstick import Yardstick, count_parameters, sequences

    answers: list[bool] = []

    def tell(what: str, right: bool) -> None:
        answers.append(right)
        say(f"  {what}: {'yes' if right else 'NO'}")

    backend, checkpoint = open_random(plan, options.seed)
    (ids,) = sequences(backend.vocab_size, options.prompt, 1, options.prompt)
    if count_parameters(checkpoint) < SMALL:
        beside_reference(backend, checkpoint, ids)
    say(f"logits of {len(ids)} tokens, twice")
    ours, again = backend.logits(ids), backend.logits(ids)
    tell(f"all finite, but for {int((~ours.isfinite()).sum())}", bool(ours.isfinite().all()))
    tell("the same bits twice", torch.equal(ours, again))
    say(f"the last {min(ALONE, len(ids))} of them token by token")
    one = backend.logits(ids, alone=ALONE)
    tell(f"the same bits, at most {(ours - one).abs().max():.2e} apart", torch.equal(ours, one))
    if plan.tp > 1:
        for name in ("y.sum" if "y.sum" in plan.tensors else "y", "next_ids"):
            say(f"'{name}' of all ranks")
            here, *others = backend.ranks.call("value", name, 1)
            tell("the same bits", all(torch.equal(here, there) for there in others))
    asked = ids[:ASKED]
    say(f"an answer of {ANSWER} tokens, twice")
    made, once_more = (list(backend.stream(asked, max_new_tokens=ANSWER)) for _ in range(2))
    tell("the same tokens twice", made == once_more)
    say("logits of question and answer")
    wanted = backend.logits(asked + made)[len(asked) - 1 : -1].argmax(-1).tolist()
    tell(f"they say the same {len(made)} tokens", made == wanted)
    say("Hugging Face in float32 and in bf16")
    verdict = Yardstick(checkpoint, [ids]).judge(backend)
    for row in verdict.rows:
        say(f"  {row.name}: ours {row.ours:.3g}, Hugging Face in bf16 {row.rival:.3g}, at most {row.limit:.3g}")
    tell(f"near enough, over {verdict.ours.positions} positions", verdict.passed)
    backend.close()
    say(f"passed: {'yes' if all(answers) else 'NO'}")
    return all(answers)


def beside_reference(backend, checkpoint, ids: list[int]) -> None:
    """How far the kernel's logits are from those of its plan on the CPU: of one token, of a chunk, of several."""
    from mpk_spec.reference.backend import ReferenceBackend

    reference = ReferenceBackend(backend.plan, checkpoint)
    for count in (1, 16, 40):
        say(f"logits of {len(ids[:count])} tokens beside the plan's on the CPU")
        ours, wanted = backend.logits(ids[:count]), reference.logits(ids[:count])
        error, top = (ours - wanted).abs().max(), (ours.argmax(-1) == wanted.argmax(-1)).float().mean()
        say(f"  largest error {error:.2e}, standard deviation {wanted.std():.2f}, top-1 {top:.3f}")


@dataclass(frozen=True)
class Row:
    """What was timed. gigabytes: what a rank reads for a token."""

    model: str
    tp: int
    times: Times
    gigabytes: float


def measure(plan: Plan, options) -> tuple[Times, float]:
    """Times per token, the kernel's by rank 0's clock, and the GB that a rank reads for one."""
    from mpk_spec.perf.bench import bytes_per_token
    from mpk_spec.perf.clock import time_decode

    backend, _ = open_random(plan, options.seed)
    say(f"timing {options.repeats} launches of {options.new} tokens")
    times = time_decode(backend, options.prompt, options.new, options.repeats)
    backend.close()
    return times, bytes_per_token(plan, options.prompt)["total"] / 1e9


def about(options) -> str:
    """What all rows have in common."""
    import torch

    changes = [*options.rule, *(f"without {name}" for name in options.without)]
    gpu = f"{torch.cuda.get_device_name(0)} ({options.target})"
    return ", ".join([gpu, "batch 1", f"{options.prompt} positions in the cache", *changes])


def lines(rows: list[Row], gbps: float | None) -> list[str]:
    """gbps: the ceiling, if it was measured."""
    alone = {row.model: row.times.kernel_ms for row in rows if row.tp == 1}
    found = []
    for row in rows:
        times, ms = row.times, row.times.kernel_ms
        speed = row.gigabytes / ms * 1e3
        words = [f"{ms:.4f} ms/token ({times.kernel_ms_min:.4f} to {times.kernel_ms_max:.4f})"]
        if row.tp > 1 and row.model in alone:
            words.append(f"{alone[row.model] / ms:.2f} times tp 1")
        words.append(f"{row.gigabytes:.3f} GB, {speed:.0f} GB/s{' a rank' if row.tp > 1 else ''}")
        if gbps:
            words.append(f"{100 * speed / gbps:.1f} % of the ceiling")
        seen = f"as a user sees it {times.user_ms:.4f} ms, a launch costs {times.launch_ms:.3f} ms"
        found.append(f"{row.model}, tp {row.tp}: {', '.join(words)}; {seen}")
    return found


def trace(plan: Plan, options) -> None:
    """As `mpk-spec profile`, on random weights; the trace goes where `--output` says."""
    from mpk_spec.planner.simulate import predict
    from mpk_spec.profiler.chrome import check_layer, chrome_trace, write_trace
    from mpk_spec.profiler.clock import common_clock
    from mpk_spec.profiler.report import report
    from mpk_spec.profiler.run import record
    from mpk_spec.runtime.cuda_probe import PROFILE

    if options.layer is not None:
        check_layer(plan, options.layer)
    backend, _ = open_random(plan, options.seed, (PROFILE,))
    say(f"recording {RECORDED} tokens")
    ranks = [common_clock(*raw) for raw in record(backend, options.prompt, RECORDED)]
    backend.close()
    ranks, clocks, _, shown = report(ranks, predict(plan, context=options.prompt))
    print(shown, flush=True)
    if options.output:
        write_trace(options.output, chrome_trace(plan, backend.emitted.step, ranks, clocks, options.layer))


if __name__ == "__main__":
    sys.exit(main())
