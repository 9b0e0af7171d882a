"""The cache folder: built once under a lock, aside, then renamed, so that what is there is complete.

cache_dir()/checkpoints/<readable name>-<hash>/   converted checkpoints (Hugging Face folders)
cache_dir()/configs/<architecture>-<hash>.json    configs as transformers normalises them
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mpk_spec.errors import UserError, did_you_mean
from mpk_spec.paths import cache_dir

NOTE = "mpk_spec.json"  # in every converted folder: what it was made from
_CACHE_HINT = "set MPK_SPEC_CACHE to a folder with space that you may write"


class CacheFolderError(UserError):
    """What hinders writing the cache folder: no space, no permission. Any other source would meet the same."""


@contextmanager
def surroundings(doing: str) -> Iterator[None]:
    """Turn an operating system error into a CacheFolderError of one sentence: `cannot <doing>: no space left ...`."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "no space left on the disk",
            errno.EDQUOT: "your disk quota is used up",
            errno.EACCES: "permission denied",
            errno.EPERM: "permission denied",
            errno.EROFS: "the file system is read-only",
        }
        reason = reasons.get(error.errno or 0, error.strerror or str(error))
        hint = _CACHE_HINT if error.errno in reasons else None
        where = f" ({error.filename})" if error.filename else ""
        raise CacheFolderError(f"cannot {doing}: {reason}{where}", hint) from error


def cache_key(name: str, *identity: object) -> str:
    """A readable name with the hash of all that the content depends on (JSON data)."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}-{digest}"


def build_once(key: str, build: Callable[[Path], None], progress: Callable[[str, int, int], None]) -> Path:
    """`checkpoints/<key>`, made by `build(empty folder)` if it is not there yet.

    Processes that want the same folder wait for one another (`progress` hears of it). Whatever ends `build` early
    (an error, Ctrl-C) leaves no folder behind; one left by a killed process is swept by the next with the same key.
    """
    from filelock import FileLock, Timeout

    home = cache_dir() / "checkpoints"
    ready = home / key
    if ready.is_dir():
        return ready
    with surroundings(f"prepare the cache folder {home}"):
        home.mkdir(parents=True, exist_ok=True)
        lock = FileLock(home / f".{key}.lock")
        try:
            lock.acquire(timeout=0.2)
        except Timeout:
            progress("waiting for another mpk-spec", 0, 0)
            lock.acquire()
    aside = home / f".{key}.tmp"
    try:
        if not ready.is_dir():
            with surroundings(f"write {ready}"):
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir()
                build(aside)
                aside.rename(ready)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        lock.release()
    return ready


def write_atomically(path: Path, text: str) -> None:
    with surroundings(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
        try:
            aside.write_text(text, encoding="utf-8")
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


def need_space(folder: Path, needed: int) -> None:
    """Refuse early: a conversion that cannot fit should not run for minutes first."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        said = f"{folder} needs {needed / 1e6:.0f} MB and its disk has {free / 1e6:.0f} MB free"
        raise CacheFolderError(said, _CACHE_HINT)


@dataclass(frozen=True)
class CacheEntry:
    kind: str  # "checkpoint" | "config"
    name: str  # what `remove_cache_entry` takes
    source: str  # what it was made from, as the user wrote it
    bytes: int
    path: Path


def cache_entries() -> list[CacheEntry]:
    """Everything complete in the cache, checkpoints first, by name."""
    entries = []
    for path in _visible(cache_dir() / "checkpoints"):
        note = path / NOTE
        source = json.loads(note.read_text(encoding="utf-8"))["source"] if note.is_file() else "?"
        size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        entries.append(CacheEntry("checkpoint", path.name, source, size, path))
    for path in _visible(cache_dir() / "configs"):
        entries.append(CacheEntry("config", path.name, path.name.rpartition("-")[0], path.stat().st_size, path))
    return entries


def remove_cache_entry(name: str) -> CacheEntry:
    """Delete one entry by its name; returns what it was. UserError if there is none."""
    entries = {entry.name: entry for entry in cache_entries()}
    if name not in entries:
        raise UserError(f"the cache holds no '{name}'", did_you_mean(name, entries, "cache entries"))
    entry = entries[name]
    with surroundings(f"remove {entry.path}"):
        if entry.kind == "config":
            entry.path.unlink()
        else:
            # out of sight first: an interrupted removal must not leave a folder that looks complete
            aside = entry.path.with_name(f".{name}.removed")
            shutil.rmtree(aside, ignore_errors=True)
            entry.path.rename(aside)
            shutil.rmtree(aside)
    return entry


def _visible(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []
