"""`mpk-spec bench`: tokens per second of our backend and of Hugging Face, on the same weights, turn by turn."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpk_spec.cli.options import Model, ReadWith, Size, Weights
from mpk_spec.errors import UserError, VerdictFailed, did_you_mean

if TYPE_CHECKING:
    from mpk_spec.perf.bench import Settings

RIVALS = ("eager", "compile", "graph")


def command(
    model: Model,
    size: Size = None,
    weights: Weights = None,
    spec: ReadWith = None,
    backends: Annotated[
        list[str] | None,
        typer.Option("--backend", metavar="NAME", help="Repeatable; default: cuda, without a GPU cpu and torch."),
    ] = None,
    rivals: Annotated[
        list[str] | None,
        typer.Option("--rival", metavar="NAME", help="With cuda, repeatable: eager, compile, graph (Hugging Face)."),
    ] = None,
    tp: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Ranks of cuda and cpu; default: 1, or as torchrun says.")
    ] = None,
    context: Annotated[
        int, typer.Option("-c", "--context", min=1, metavar="N", help="With cuda: positions in the filled cache.")
    ] = 128,
    verdict: Annotated[
        bool, typer.Option("--verdict/--no-verdict", help="With cuda: judge the numbers beside the speed.")
    ] = True,
    prompt_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Length of the prompt, without cuda.")] = 128,
    max_new_tokens: Annotated[
        int, typer.Option("-n", "--max-new-tokens", min=2, metavar="N", help="Tokens of an answer.")
    ] = 64,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Answers that count; one before warms up.")] = 5,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FOLDER", help="Also write FOLDER/NAME.md and .json.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure speed against Hugging Face on the same weights.

    On a GPU: milliseconds per token of the kernel, beside the ceiling of memory measured in the same run, the
    simulation, the rivals asked for, and a verdict on the numbers. On the CPU the backends take turns.
    """
    from mpk_spec.files import make_folder
    from mpk_spec.perf import page, turns
    from mpk_spec.perf.bench import Settings

    names = _backends(backends)
    _check_rivals(names, rivals or [])
    if output is not None:
        make_folder(output)
    if names == ["cuda"]:
        positions = Settings.positions if verdict else 0
        settings = Settings(context, max_new_tokens, repeats, tuple(dict.fromkeys(rivals or [])), positions)
        result = on_gpu(model, size, weights, spec, settings, tp)
        shown, name = page.as_markdown(result), name_on_gpu(result)
    else:
        result = in_turns(model, size, weights, spec, names, prompt_tokens, max_new_tokens, repeats, tp)
        shown, name = (
            turns.as_markdown(result),
            f"{result['model']['spec']}-{result['model']['size'] or 'checkpoint'}",
        )
    if output is not None:
        write(output, name, shown, json.dumps(result, indent=2))
    print(json.dumps(result, indent=2) if as_json else shown, end="" if not as_json else "\n")
    if not result.get("verdict", {"passed": True})["passed"]:
        raise VerdictFailed("the kernel is further from the truth than Hugging Face in bf16: its speed says nothing")


def _backends(wanted: list[str] | None) -> list[str]:
    if wanted:
        return list(dict.fromkeys(wanted))
    import torch

    return ["cuda"] if torch.cuda.is_available() else ["cpu", "torch"]


def _check_rivals(names: list[str], rivals: list[str]) -> None:
    if "cuda" in names and len(names) > 1:
        raise UserError("'cuda' is measured alone, beside its rivals", "--backend cuda --rival eager --rival compile")
    if rivals and names != ["cuda"]:
        raise UserError("rivals are run beside the backend 'cuda'", "--backend torch measures Hugging Face alone")
    for name in rivals:
        if name not in RIVALS:
            raise UserError(f"there is no rival '{name}'", did_you_mean(name, RIVALS, "rivals"))


def on_gpu(
    model: str, size: str | None, weights: str | None, spec: str | None, settings: Settings, tp: int | None = None
) -> dict[str, Any]:
    """See `mpk_spec.perf.bench.bench`; the cache is as long as the model allows where that is less than usual."""
    from mpk_spec.cli.progress import progress
    from mpk_spec.cli.target import open_target
    from mpk_spec.perf.bench import bench
    from mpk_spec.runtime.select import choose_degree, open_backend

    with progress() as report:
        target = open_target(model, report, size=size, weights=weights, spec=spec)
        degree = choose_degree(tp, target.build)

        def opened(room: int):
            context = None if target.build else room
            where = (target.spec, target.size, target.checkpoint)
            return open_backend(*where, "cuda", context, report, target.build, degree).backend

        return bench(opened, target.checkpoint, settings, report)


def in_turns(
    model: str, size: str | None, weights: str | None, spec: str | None, names: list[str], prompt_tokens: int,
    new_tokens: int, repeats: int, tp: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Backends on the same weights, one answer each at a time."""
    from mpk_spec.cli.progress import progress
    from mpk_spec.cli.target import open_target
    from mpk_spec.perf import turns
    from mpk_spec.runtime.select import choose_degree, open_backend

    with progress() as report:
        target = open_target(model, report, size=size, weights=weights, spec=spec)
        degree = choose_degree(tp, target.build)
        if degree > 1 and names == ["torch"] and target.build is None:
            raise UserError("the backend 'torch' runs on one rank", "--backend cpu --backend torch: ours runs on more")
        context = None if target.build else prompt_tokens + new_tokens
        where = (target.spec, target.size, target.checkpoint)
        ranks = {name: 1 if name == "torch" and target.build is None else degree for name in names}
        opened = {
            name: open_backend(*where, name, context, report, target.build, count) for name, count in ranks.items()
        }
        runs = turns.take_turns(opened, prompt_tokens, new_tokens, repeats, report)
        for backend in opened.values():
            backend.close()
    return {
        "model": {"spec": target.name, "size": target.size, "weights": target.checkpoint.source},
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "machine": turns.machine(),
        "backends": {
            name: {"description": opened[name].description, **turns.summary(measured)}
            for name, measured in runs.items()
        },
    }


def name_on_gpu(result: dict[str, Any]) -> str:
    """The name of a result's files. One on several GPUs is not to be taken for one on a single GPU."""
    model, degree = result["model"], f"-tp{result['tp']}" if result["tp"] > 1 else ""
    return f"{model['spec']}-{model['size']}-{result['target']}{degree}-context{result['context']}"


def write(folder: Path, name: str, page: str, data: str) -> None:
    """NAME.md and NAME.json, each whole or as it was. Raises UserError where they cannot be written."""
    from mpk_spec.files import write_aside

    write_aside(folder / f"{name}.md", page)
    write_aside(folder / f"{name}.json", data + "\n")
    print(f"wrote {folder / name}.md and .json", file=sys.stderr)
