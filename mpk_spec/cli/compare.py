"""`mpk-spec compare`: are a backend's numbers as good as Hugging Face's own, and if not, which operator's are wrong."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from mpk_spec.cli.options import Model, ReadWith, Size, Weights
from mpk_spec.errors import UserError, VerdictFailed

if TYPE_CHECKING:
    from mpk_spec.cli.target import Target
    from mpk_spec.testing.defects import Defect
    from mpk_spec.testing.metrics import Verdict

SEQUENCE = 512  # tokens of one sequence, unless --context says otherwise
LONG = 8192  # tokens of all sequences, where one alone is long


def command(
    model: Model,
    size: Size = None,
    weights: Weights = None,
    spec: ReadWith = None,
    backend: Annotated[str, typer.Option(metavar="NAME", help="auto, cuda, cpu or torch.")] = "auto",
    tp: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Ranks: GPUs, or all in this process on the CPU; default: 1, or as torchrun says."
        ),
    ] = None,
    positions: Annotated[int, typer.Option(min=1, metavar="N", help="Teacher-forced positions, at least.")] = 2000,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Sequences, each from its own seed, at least; default: 4, of long ones 1."
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "-c", "--context", min=2, metavar="N", help="Length of each sequence, its end is judged; default: to 512."
        ),
    ] = None,
    alone: Annotated[
        int | None,
        typer.Option(
            "--decode",
            min=0,
            metavar="N",
            help="Last positions of each sequence to compute token by token; default: an eighth with cuda, else none.",
        ),
    ] = None,
    stop_after: Annotated[
        str | None,
        typer.Option(
            metavar="OP", help="Compare every operator's values up to OP (as in attention.qr, or 'all') instead."
        ),
    ] = None,
    plant: Annotated[
        str | None, typer.Option(metavar="DEFECT", help="Plant a known defect, which must then be found.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compare a backend's logits with Hugging Face in float32; the verdict is how Hugging Face's own bf16 run does.

    Ours may be at most 10 % further from the truth than that run is, on the mean and the 99th percentile of the KL
    divergence, the largest error and the most probable token. Exit code 4 if it is further.
    """
    from mpk_spec.cli.progress import progress
    from mpk_spec.runtime.select import choose_degree
    from mpk_spec.testing.defects import find_defect

    defect = find_defect(plant) if plant else None
    if backend == "auto":
        backend = "cpu"
        print("backend: cpu, where all that a plan computes can be looked at (--backend chooses)", file=sys.stderr)
    with progress() as report:
        target = _target(model, size, weights, spec, report)
        _check_applies(defect, target)
        tp = choose_degree(tp, target.build)
        length = _length(target, context)
        if backend == "cuda":
            _check_runs(target, tp, length)
        if stop_after is not None:
            result = _bisect(target, stop_after, tp, length, defect, backend, report)
        else:
            asked = Asked(target, backend, tp, positions, seeds, length, context is not None, alone, defect)
            result = _verdict(asked, report)
    print(json.dumps(result.data(), indent=2) if as_json else "\n".join(result.page()))
    if not result.passed:
        raise VerdictFailed(result.reason)


def _target(model: str, size: str | None, weights: str | None, spec: str | None, report) -> Target:
    """As `chat` finds it, except that a size without weights of its own gets random ones."""
    from mpk_spec.cli.target import is_checkpoint, open_target
    from mpk_spec.schema import load_spec

    if weights is None and size is not None and not is_checkpoint(model):
        loaded = load_spec(model)
        if size in loaded.sizes and not loaded.sizes[size].weights:
            weights = "random:0"
            print(f"weights: {weights}, since size '{size}' has none of its own (--weights chooses)", file=sys.stderr)
    return open_target(model, report, size=size, weights=weights, spec=spec)


def _check_applies(defect: Defect | None, target: Target) -> None:
    from mpk_spec.testing.defects import defects_of

    if defect is not None and target.build is not None:
        raise UserError("a build runs as it was built: no defect can be planted in it", "compare SPEC --size NAME")
    if defect is not None and not defect.applies(target.spec):
        known = ", ".join(d.name for d in defects_of(target.spec))
        raise UserError(f"'{target.spec.name}' has nothing in which '{defect.name}' could go wrong", f"it has: {known}")


def _length(target: Target, context: int | None) -> int:
    """The longest sequence to run. A build's cache has one length."""
    from mpk_spec.weights import text_config

    if target.build is not None:
        held = target.build.plan.context
        if context is not None and context > held:
            raise UserError(f"a context of {context} is more than the {held} positions that the kernel was built for")
        return context or min(SEQUENCE, held)
    most = text_config(target.checkpoint.config).get("max_position_embeddings") or context or SEQUENCE
    if context is not None and context > most:
        raise UserError(f"a context of {context} is more than the {most} positions that this model was made for")
    return context or min(SEQUENCE, most)


def _check_runs(target: Target, tp: int, length: int) -> None:
    """What the kernel cannot run is said before the truth is worked out, which may take minutes."""
    from mpk_spec.emit.source import emit
    from mpk_spec.runtime import cuda_device
    from mpk_spec.runtime.select import plan_for_gpu

    if target.build is not None:
        cuda_device.find_device()
    else:
        emit(plan_for_gpu(target.spec, target.size, target.checkpoint, length, tp))


class Result:
    """A verdict with what it is about."""

    def __init__(self, title: str, verdict: Verdict, sequences: list[list[int]], defect: Defect | None):
        self.title, self.verdict, self.sequences, self.defect = title, verdict, sequences, defect
        self.passed = verdict.passed

    @property
    def reason(self) -> str:
        ours = self.verdict.ours
        if ours.broken:
            return f"{ours.broken} of {ours.positions} positions are not numbers (NaN or infinite)"
        wrong = [row.name for row in self.verdict.rows if not row.passed]
        if self.verdict.alone is not None:
            wrong += [f"{row.name} token by token" for row in self.verdict.alone.rows if not row.passed]
        wrong = ", ".join(wrong)
        return f"further from the truth than Hugging Face in bf16 by more than 10 %: {wrong}"

    def page(self) -> list[str]:
        verdict, count = self.verdict, len(self.sequences)
        lines = [
            self.title,
            f"truth: Hugging Face in float32, {verdict.ours.positions} positions in {count} sequences of random ids"
            + self._where(),
            *_table("distance from the truth", verdict),
        ]
        if verdict.alone is not None:
            lines += _table(f"the {verdict.alone.ours.positions} token by token", verdict.alone)
        return [*lines, "", f"verdict: {'passed' if self.passed else 'FAILED, ' + self.reason}"]

    def _where(self) -> str:
        length, judged = len(self.sequences[0]), self.verdict.ours.positions // len(self.sequences)
        return f", the last {judged} of {length} each" if judged < length else ""

    def data(self) -> dict:
        about = {"model": self.title, "sequences": len(self.sequences), "context": len(self.sequences[0])}
        return {**about, "planted": self.defect.name if self.defect else None, **self.verdict.data()}


def _table(title: str, verdict: Verdict) -> list[str]:
    lines = ["", f"{title:<24}{'theirs in bf16':>15}{'ours':>12}{'at most':>12}"]
    for row in verdict.rows:
        mark = "" if row.passed else "  too far"
        lines.append(f"{row.name:<24}{row.rival:>15.4g}{row.ours:>12.4g}{row.limit:>12.4g}{mark}")
    return lines


@dataclass(frozen=True)
class Asked:
    """What a verdict is asked about. whole: sequences have exactly `length` tokens, judged at their end."""

    target: Target
    backend: str
    tp: int
    positions: int
    seeds: int | None
    length: int
    whole: bool
    alone: int | None
    defect: Defect | None


def _verdict(asked: Asked, report) -> Result:
    from mpk_spec.testing.ours import open_ours
    from mpk_spec.testing.yardstick import Yardstick, sequences, wanted
    from mpk_spec.weights import text_config

    target, length = asked.target, asked.length
    vocab = text_config(target.checkpoint.config)["vocab_size"]
    seeds = asked.seeds or max(1, min(4, LONG // length))
    ids = sequences(vocab, asked.positions, seeds, length, asked.whole)
    last = wanted(asked.positions, len(ids), length)
    if len(ids) * last < 1000:
        print(f"note: {len(ids) * last} positions say little; the rule is made for 2000", file=sys.stderr)
    yardstick = Yardstick(target.checkpoint, ids, report, last)
    alone = asked.alone if asked.alone is not None else last // 8 if asked.backend == "cuda" else 0
    with yardstick.threads():
        ours = open_ours(
            target.spec, target.size, target.checkpoint, asked.backend, length, asked.tp, asked.defect, target.build
        )
        verdict = yardstick.judge(ours, report, min(alone, last))
        ours.close()
    planted = f", planted: {asked.defect.says}" if asked.defect else ""
    name = f"{target.name} {target.size or 'checkpoint'}, weights {target.checkpoint.source}"
    return Result(f"{name}, {ours.description}{planted}", verdict, ids, asked.defect)


def _bisect(target, stop_after, tp, length, defect, backend, report):
    if target.build is not None:
        raise UserError("a build cannot stop after an operator", "compare SPEC --size NAME --stop-after OP")
    if backend == "cuda":
        from mpk_spec.testing.bisect_gpu import bisect_gpu

        where = (target.spec, target.size, target.checkpoint)
        return bisect_gpu(*where, stop_after, min(length, 64), defect, report, tp)
    from mpk_spec.testing.bisect import bisect

    if backend != "cpu":
        raise UserError(f"--stop-after looks into plans; the backend '{backend}' runs none", "--backend cpu or cuda")
    return bisect(target.spec, target.size, target.checkpoint, stop_after, tp, min(length, 64), defect)
