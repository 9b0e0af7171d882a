"""Files that a person names: each is whole or not there, and one that cannot be is said before the work for it."""

from __future__ import annotations

import errno
import os
import threading
from contextlib import suppress
from pathlib import Path

from mpk_spec.errors import UserError


def write_aside(path: Path, data: str | bytes) -> None:
    """Writes beside `path`, then renames. Raises UserError where that cannot be."""
    aside = path.parent / f".{path.name}.{os.getpid()}-{threading.get_ident()}"
    try:
        if path.is_dir():
            raise _error(errno.EISDIR)
        aside.write_bytes(data if isinstance(data, bytes) else data.encode())
        aside.replace(path)
    except OSError as trouble:
        with suppress(OSError):
            aside.unlink()
        raise _cannot(path, trouble) from None


def check_place(path: Path) -> None:
    """Raises UserError where `path` surely cannot be written, for use before minutes of work."""
    if path.is_dir():
        raise _cannot(path, _error(errno.EISDIR))
    if not path.parent.exists():
        raise _cannot(path, _error(errno.ENOENT))
    if not path.parent.is_dir():
        raise _cannot(path, _error(errno.ENOTDIR))
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise _cannot(path, _error(errno.EACCES))


def make_folder(folder: Path) -> None:
    """With those above it. Raises UserError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as trouble:
        raise _cannot(folder, trouble) from None


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def _cannot(path: Path, trouble: OSError) -> UserError:
    return UserError(f"cannot write {path}: {trouble.strerror or trouble}")
