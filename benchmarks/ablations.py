"""What each lever of the kernel is worth: the same model with and without it, one run after the other on one GPU.

python benchmarks/ablations.py smollm2:135m qwen3:8b           # needs a GPU; a table for benchmarks/decode.md
python benchmarks/ablations.py smollm2:135m --compile          # kernels into the cache ahead, without a GPU

Every variant is a rule of the schedule, as a spec has it. Logits of all variants must have the same bits: none of these
levers changes the order of a sum. The kernel has no tasks for a norm, an activation or a residual on their own, so that
a fusion left out is refused by name; claim pools it has none.
"""

from __future__ import annotations

import argparse
import sys
from types import SimpleNamespace

import kernel

VARIANTS = (
    ("as planned", {}),
    ("values by event: one warp of an SM looks, at a counter", {"crossing": "event"}),
    ("no prefetch into L2 while the ring is full", {"prefetch": 0}),
    ("32 KiB of copies in flight for each SM", {"in_flight": 32768}),
    ("48 KiB, also while workers look for values", {"in_flight": 49152, "in_flight_looking": 49152}),
    ("a ring of 3 chunks: weights run ahead no further", {"stages": 3}),
)
IDS, ALONE = 96, 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="SPEC:SIZE")
    parser.add_argument("--target", default="h100")
    parser.add_argument("--prompt", type=int, default=128, help="positions in the cache, on average")
    parser.add_argument("--compile", action="store_true", help="only compile")
    options = parser.parse_args()
    rows, wrong = [], 0
    for model in options.models:
        first = None
        for name, rules in VARIANTS:
            asked = SimpleNamespace(
                rule=[f"{k}={v}" for k, v in rules.items()], target=options.target, context=512, prompt=options.prompt,
                new=64, repeats=5, seed=0, gbps=None,
            )  # fmt: skip
            if options.compile:
                kernel.compiled(model, asked)
                continue
            ms, logits = measured(model, asked)
            first = first or (ms, logits)
            same = logits.equal(first[1])
            wrong += not same
            rows.append(f"| {model} | {name} | {ms:.4f} | {ms / first[0] - 1:+.1%} | {'same' if same else 'OTHER'} |")
            print(rows[-1], flush=True)
    if rows:
        print("\n| model | variant | ms/token | | bits |\n|---|---|---:|---:|---|", *rows, sep="\n")
    return 1 if wrong else 0


def measured(model: str, asked):
    """(ms per token, logits of some ids, the last of them token by token)."""
    from mpk_spec.perf.clock import time_decode
    from mpk_spec.testing.yardstick import sequences

    backend, _ = kernel.open_random(model, asked)
    (ids,) = sequences(backend.vocab_size, IDS, 1, IDS)
    logits = backend.logits(ids, alone=ALONE)
    times = time_decode(backend, asked.prompt, asked.new, asked.repeats)
    backend.close()
    return times.kernel_ms, logits


if __name__ == "__main__":
    sys.exit(main())
