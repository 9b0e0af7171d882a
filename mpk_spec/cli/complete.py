"""What the shell offers after Tab: names of specs, targets and backends. File names stay the shell's own business."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args, get_type_hints


def _specs(incomplete: str) -> list[str]:
    from mpk_spec.schema import spec_names

    return [name for name in spec_names() if name.startswith(incomplete)]


def _targets(incomplete: str) -> list[str]:
    from mpk_spec.planner.targets import TARGETS

    return [name for name in TARGETS if name.startswith(incomplete)]


def _backends(incomplete: str) -> list[str]:
    from mpk_spec.runtime.select import BACKENDS

    return [name for name in BACKENDS if name.startswith(incomplete)]


# by the name of a command's parameter, which means the same in every command
OFFERS = {
    "model": _specs,
    "spec": _specs,
    "specs": _specs,
    "target": _targets,
    "backend": _backends,
    "backends": _backends,
}


def with_completion(command: Callable) -> Callable:
    """The command function, its parameters completed as `OFFERS` has it."""
    hints = get_type_hints(command, include_extras=True)
    for name in hints.keys() & OFFERS.keys():
        # Python 3.10 makes `Optional[Annotated[...]]` of one whose default is None
        for hint in (hints[name], *get_args(hints[name])):
            for parameter in getattr(hint, "__metadata__", ()):
                parameter.autocompletion = OFFERS[name]
    command.__annotations__ = hints
    return command
