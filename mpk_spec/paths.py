"""Every path this project reads or writes outside its arguments, in one place."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def _data(name: str) -> Path:
    """`specs` and `cuda_templates` lie beside the package in a source tree, inside it in a wheel."""
    packaged = PACKAGE / "_data" / name
    return packaged if packaged.is_dir() else PACKAGE.parent / name


def specs_dir() -> Path:
    return _data("specs")


def templates_dir() -> Path:
    return _data("cuda_templates")


def cache_dir() -> Path:
    """`$MPK_SPEC_CACHE`, or the platform's user cache folder."""
    chosen = os.environ.get("MPK_SPEC_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("mpk-spec")


def log_dir() -> Path:
    return cache_dir() / "logs"
