"""What an examination finds."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True)
class Finding:
    """`status`: ok; absent (only the GPU path wants it); warning (works, but look); broken (no chat on the CPU)."""

    name: str
    status: str
    says: str
    hint: str | None = None
    data: dict = field(default_factory=dict)


def installed(package: str) -> str | None:
    """The version of an installed distribution, None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
