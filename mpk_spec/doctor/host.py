"""What `doctor` can say of everything but the GPU: Python, torch, packages, cache, disk."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib import import_module
from pathlib import Path

from mpk_spec.doctor.finding import Finding, installed

OLDEST_PYTHON = (3, 10)
CPU_PACKAGES = ("tokenizers", "safetensors", "numpy", "pydantic", "jinja2", "yaml", "gguf", "filelock")


def find_python() -> Finding:
    says = f"{platform.python_version()} ({sys.executable}), {platform.system()} {platform.machine()}"
    if sys.version_info < OLDEST_PYTHON:
        return Finding("python", "broken", says, "mpk-spec needs Python 3.10 or later")
    return Finding("python", "ok", says, data={"version": platform.python_version()})


def find_torch() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of torch that cannot be loaded
        return Finding("torch", "broken", f"cannot be imported: {error}", "pip install torch")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    threads = torch.get_num_threads()
    data = {"version": torch.__version__, "cuda": torch.version.cuda, "threads": threads}
    return Finding("torch", "ok", f"{torch.__version__}, {build} build, {threads} threads", data=data)


def find_transformers() -> Finding:
    found = installed("transformers")
    if found is None:
        return Finding("transformers", "broken", "not installed", "pip install 'transformers>=5.0'")
    if int(found.split(".")[0]) < 5:
        return Finding("transformers", "broken", f"{found} is too old", "pip install 'transformers>=5.0'")
    return Finding("transformers", "ok", found, data={"version": found})


def find_packages() -> Finding:
    troubles = []
    for name in CPU_PACKAGES:
        try:
            import_module(name)
        except (ImportError, OSError) as error:
            troubles.append(f"{name}: {error}")
    if troubles:
        return Finding("packages", "broken", "; ".join(troubles), "install mpk-spec again with pip")
    return Finding("packages", "ok", ", ".join(CPU_PACKAGES))


def find_cache() -> Finding:
    from mpk_spec.paths import cache_dir
    from mpk_spec.weights import cache_entries

    folder = cache_dir()
    if not _writable(folder):
        return Finding(
            "cache", "broken", f"{folder} cannot be written", "set MPK_SPEC_CACHE to a folder that you may write"
        )
    entries = cache_entries()
    size = sum(entry.bytes for entry in entries)
    data = {"folder": str(folder), "entries": len(entries), "bytes": size}
    return Finding("cache", "ok", f"{folder}, {len(entries)} entries, {size / 1e6:.0f} MB", data=data)


def find_disk() -> Finding:
    from mpk_spec.paths import cache_dir

    place = _existing(cache_dir())
    free = shutil.disk_usage(place).free
    data = {"free_bytes": free}
    if free < 1e9:
        hint = "SmolLM2-135M needs 0.4 GB here; 'mpk-spec cache clear' frees what is stored"
        return Finding("disk", "warning", f"{free / 1e9:.1f} GB free for the cache", hint, data)
    return Finding("disk", "ok", f"{free / 1e9:.0f} GB free for the cache", data=data)


def _existing(folder: Path) -> Path:
    """The folder or the nearest one above it that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def _writable(folder: Path) -> bool:
    place = _existing(folder)
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)
