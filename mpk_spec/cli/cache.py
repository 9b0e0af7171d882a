"""`mpk-spec cache`: what is stored on this machine, and how to be rid of it."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    help="List or clear what mpk-spec has stored on this machine.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


@app.command("list")
def list_entries(as_json: Annotated[bool, typer.Option("--json", help="Print the entries as JSON.")] = False) -> None:
    """List what is stored, with its size and what it was made from."""
    from mpk_spec.paths import cache_dir
    from mpk_spec.weights import cache_entries

    entries = cache_entries()
    if as_json:
        import json

        print(json.dumps([_as_data(entry) for entry in entries], indent=2))
        return
    for entry in entries:
        print(f"{entry.bytes / 1e6:9.1f} MB  {entry.kind:<10}  {entry.name}  (from {entry.source})")
    total = sum(entry.bytes for entry in entries)
    print(f"{total / 1e6:9.1f} MB  in {len(entries)} entries of {cache_dir()}")


@app.command()
def clear(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Entries to remove, by their names in the list.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all entries.")] = False,
) -> None:
    """Remove entries, by name or all; they are made again when needed."""
    from mpk_spec.weights import cache_entries, remove_cache_entry

    if bool(names) == everything:
        raise typer.BadParameter("name the entries to remove, or say --all")
    freed = 0
    for name in [entry.name for entry in cache_entries()] if everything else names:
        entry = remove_cache_entry(name)
        freed += entry.bytes
        print(f"removed {entry.name}")
    print(f"{freed / 1e6:.1f} MB freed")


def _as_data(entry) -> dict:
    return {
        "kind": entry.kind,
        "name": entry.name,
        "source": entry.source,
        "bytes": entry.bytes,
        "path": str(entry.path),
    }
