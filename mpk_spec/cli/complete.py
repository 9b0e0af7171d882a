"""What the shell offers after Tab: names of specs, targets and backends. File names stay the shell's own business."""

from __future__ import annotations


def specs(incomplete: str) -> list[str]:
    from mpk_spec.schema import spec_names

    return [name for name in spec_names() if name.startswith(incomplete)]


def targets(incomplete: str) -> list[str]:
    from mpk_spec.planner.targets import TARGETS

    return [name for name in TARGETS if name.startswith(incomplete)]


def backends(incomplete: str) -> list[str]:
    from mpk_spec.runtime.select import BACKENDS

    return [name for name in BACKENDS if name.startswith(incomplete)]
