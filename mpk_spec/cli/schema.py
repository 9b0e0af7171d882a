"""`mpk-spec schema`: the JSON Schema that editors check and complete specs with."""

from __future__ import annotations


def command() -> None:
    """Print the JSON Schema of specs; a line '# yaml-language-server: $schema=PATH' points an editor to it."""
    from mpk_spec.schema import editor

    print(editor.text(), end="")
