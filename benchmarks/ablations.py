"""What each lever of the kernel is worth: the same model with and without it, one run after the other on one GPU.

python benchmarks/ablations.py smollm2:135m qwen3:8b           # needs a GPU; a table for benchmarks/decode.md
python benchmarks/ablations.py qwen3:0.6b --fusions            # each fusion against none: small models will do
python benchmarks/ablations.py qwen3:8b --pools                # queues against claim pools
python benchmarks/ablations.py smollm2:135m --compile          # kernels into the cache ahead, without a GPU
python benchmarks/ablations.py qwen3:8b --variant "narrow:in_flight=32768,prefetch=0" --variant "mine:MPK_MINE=1"

A variant of one's own has rules, and macros for code that is being tried.

Levers are rules of the schedule, as a spec has them, and logits must have the same bits with and without them: none
changes the order of a sum. Without a fusion, values that never left an SM are rounded on the way: then it is said
how far logits move, in parts of the largest. What the kernel refuses to run is said too. With claim pools values
cross by event, so they compare to queues with values by event.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import random_kernel

from mpk_spec.errors import MpkSpecError, SpecError

IDS, ALONE = 96, 16
NEW, REPEATS, CONTEXT = 64, 5, 512  # of what is timed
FAR = 0.1  # of the largest logit: further than roundings go


@dataclass(frozen=True)
class Variant:
    """`rules`, `without`: as kernel.py takes them. `defines`: macros of the kernel's build."""

    name: str
    rules: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    defines: tuple[str, ...] = ()


PLANNED, BY_EVENT = Variant("as planned"), ("crossing=event",)
LEVERS = (
    PLANNED,
    Variant("values by event: one warp of an SM looks, at a counter", BY_EVENT),
    Variant("no prefetch into L2 while the ring is full", ("prefetch=0",)),
    Variant("32 KiB of copies in flight for each SM", ("in_flight=32768",)),
    Variant("48 KiB, also while workers look for values", ("in_flight=49152", "in_flight_looking=49152")),
    Variant("a ring of 3 chunks: weights run ahead no further", ("stages=3",)),
)


def fusions(model: str) -> list[Variant]:
    """Without each of the spec's fusions (and what is fused into it), and without all that the kernel can do without.

    A step that does not begin with its layers, as without `embed`, has all its values cross by event.
    """
    from mpk_spec.planner.unfuse import inseparable
    from mpk_spec.schema import load_spec

    spec = load_spec(model.partition(":")[0])
    named = spec.fusions
    found, least = [PLANNED, Variant("as planned, but values by event", BY_EVENT)], []
    for name in named:
        left = (name, *(n for n, f in named.items() if f.into == name))
        found.append(Variant(f"without {' and '.join(left)}", without=left))
        kept = inseparable(spec, name)
        least.append(f"{name}={','.join(kept)}" if kept else name)
        if kept:
            found.append(Variant(f"without {name}, but for {' and '.join(kept)}", without=(least[-1],)))
    return [*found, Variant("without all, but for the cache", without=tuple(least))]


def pools(model: str, target: str) -> list[Variant]:
    """The MLP's first linear, and all of a layer's, claimed at run time instead of in queues: as many tasks as planned,
    and twice as many as SMs, as far as there are tiles, so that who is early takes more."""
    from mpk_spec.emit.layout import lay_out

    plan = random_kernel.planned(model, target=target)
    packed = lay_out(plan).packed
    template = next(s.template for s in plan.steps["decode"].stages if s.layer is not None)
    linears = [g.name for g in plan.steps["decode"].templates[template].groups if g.task == "linear"]
    found = [PLANNED, Variant("as planned, but values by event", BY_EVENT)]
    for what, names in (("gate_up", ["gate_up"]), ("all of a layer's linears", linears)):
        claimed = tuple(f"{name}.launch=dynamic" for name in names)
        many = {n: min(2 * plan.num_sms, packed[n].rows // packed[n].tile_rows) for n in names}
        finer = tuple(rule for n, tasks in many.items() for rule in (f"{n}.grid={tasks}", f"{n}.partition=balanced"))
        found += [
            Variant(f"{what} claimed", claimed),
            Variant(f"{what} in up to {2 * plan.num_sms} tasks, by event", (*BY_EVENT, *finer)),
            Variant(f"{what} in up to {2 * plan.num_sms} tasks, claimed", (*claimed, *finer)),
        ]
    return found


def own(text: str) -> Variant:
    """NAME:KEY=VALUE,..., whose keys are macros where they are in capitals."""
    name, colon, words = text.partition(":")
    if not (name and colon and words):
        raise argparse.ArgumentTypeError(f"'{text}' is no NAME:KEY=VALUE,...")
    found = words.split(",")
    macros = tuple(word for word in found if word.partition("=")[0].isupper())
    return Variant(name, tuple(word for word in found if word not in macros), defines=macros)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="SPEC:SIZE")
    parser.add_argument("--target", help="default: this machine's GPU; to compile without one, h100")
    parser.add_argument("--prompt", type=int, default=128, help="positions in the cache, on average")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--fusions", action="store_true", help="each fusion against none, instead of the levers")
    what.add_argument("--pools", action="store_true", help="queues against claim pools, instead of the levers")
    what.add_argument(
        "--variant", type=own, action="append", default=[], metavar="NAME:KEY=VALUE,...",
        help="with these rules and macros, instead of the levers; as often as there are some",
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="only compile")
    options = parser.parse_args()
    options.target = options.target or random_kernel.target_here(needed=not options.compile)
    rows, wrong = [], 0
    for model in options.models:
        first = None
        for variant in variants(model, options):
            try:
                found = measured(model, variant, options)
            except MpkSpecError as error:
                if variant is PLANNED:
                    raise
                why = error.problems[0].message if isinstance(error, SpecError) else str(error).splitlines()[0]
                rows.append(f"| {model} | {variant.name} | refused | | {why} |")
            else:
                if found is None:
                    continue
                first = first or found
                said, bad = compared(variant, found[1], first[1])
                wrong += bad
                rows.append(f"| {model} | {variant.name} | {found[0]:.4f} | {found[0] / first[0] - 1:+.1%} | {said} |")
            print(rows[-1], flush=True)
    if not options.compile:
        print("\n| model | variant | ms/token | | bits |\n|---|---|---:|---:|---|", *rows, sep="\n")
    return 1 if wrong else 0


def variants(model: str, options) -> list[Variant]:
    if options.fusions:
        return fusions(model)
    if options.pools:
        return pools(model, options.target)
    return [PLANNED, *options.variant] if options.variant else list(LEVERS)


def compared(variant: Variant, logits, planned) -> tuple[str, bool]:
    """What is said of a variant's logits, and whether they are wrong."""
    if logits.equal(planned):
        return "same", False
    apart = ((logits - planned).abs().max() / planned.abs().max()).item()
    return f"OTHER, by {apart:.1e}" if not variant.without else f"by {apart:.1e}", not (variant.without and apart < FAR)


def measured(model: str, variant: Variant, options):
    """(ms per token, logits of some ids, the last of them token by token); None where it is only compiled."""
    context = max(CONTEXT, options.prompt + NEW)
    plan = random_kernel.planned(
        model, target=options.target, context=context, rules=variant.rules, without=variant.without
    )
    if options.compile:
        done = random_kernel.compiled(plan, variant.defines)
        random_kernel.say(f"{model}, {variant.name}: {random_kernel.described(done)}")
        return None
    from mpk_spec.perf.clock import time_decode
    from mpk_spec.testing.yardstick import sequences

    backend, _ = random_kernel.open_random(plan, defines=variant.defines)
    (ids,) = sequences(backend.vocab_size, IDS, 1, IDS)
    logits = backend.logits(ids, alone=ALONE)
    times = time_decode(backend, options.prompt, NEW, REPEATS)
    backend.close()
    return times.kernel_ms, logits


if __name__ == "__main__":
    sys.exit(main())
