"""Source -> cubin with NVRTC, cached. Needs no GPU and no CUDA installation, only the wheels of cuda-core and NVRTC."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from mpk_spec.errors import UserError
from mpk_spec.paths import cache_dir, templates_dir

SHIMS = "nvshmem"  # of the templates: what NVSHMEM's headers include
NVSHMEM_VERSION = "non_abi/nvshmem_version.h"
CUBIN, SOURCE, REPORT = "megakernel.cubin", "megakernel.cu", "report.json"
_FUNCTION = re.compile(r"Used (\d+) registers")
_IMPORTING = threading.Lock()
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class Report:
    """What the compiler said of the kernel. `seconds`: how long it took, 0 from the cache."""

    arch: str
    compiler: str
    registers: int
    spill_bytes: int
    seconds: float


@dataclass(frozen=True)
class Compiled:
    cubin: bytes
    report: Report
    folder: Path
    cached: bool


def compile_kernel(
    name: str, source: str, arch: str, defines: tuple[str, ...] = (), nvshmem: Path | None = None
) -> Compiled:
    """The cubin of generated `source` for `arch` ("sm_90a"); `name` begins the cache entry's name.

    nvshmem: the folder of NVSHMEM's headers, for a kernel that includes them (`MPK_NVSHMEM`).

    Raises UserError where NVRTC is missing, does not know the architecture or needs registers to spill; a source that
    does not compile is a bug and comes with the compiler's log.
    """
    from filelock import FileLock

    key = _key(source, arch, defines, nvshmem)
    folder = cache_dir() / "cubins" / f"{name}-{arch}-{key}"
    found = _read(folder)
    if found is not None:
        return found
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        found = _read(folder)  # another process may have built it meanwhile
        if found is not None:
            return found
        cubin, report = _compile(source, arch, defines, nvshmem)
        _check_spills(name, report)
        _write(folder, cubin, source, report)
    return Compiled(cubin, report, folder, False)


def nvrtc_version() -> str:
    """As "13.0". Raises UserError where NVRTC cannot be loaded."""
    try:
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"the CUDA compiler NVRTC cannot be loaded: {error}", "pip install cuda-core 'cuda-toolkit[nvrtc]==13.0.*'"
        ) from None
    return f"{major}.{minor}"


def _key(source: str, arch: str, defines: tuple[str, ...], nvshmem: Path | None = None) -> str:
    """A hash of everything that goes into the cubin. The source begins with the plan's own key."""
    digest = hashlib.sha256()
    used = sorted(templates_dir().rglob("*.cuh"))
    if nvshmem is not None:
        used += [*sorted(p for p in (templates_dir() / SHIMS).rglob("*") if p.is_file()), nvshmem / NVSHMEM_VERSION]
    for path in used:
        digest.update(path.name.encode() + path.read_bytes())
    for text in (source, arch, *defines, nvrtc_version()):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]


def _compile(source: str, arch: str, defines: tuple[str, ...], nvshmem: Path | None) -> tuple[bytes, Report]:
    """Without the cache on disk that NVRTC has where there is a driver: cubins from it come without ptxas's log."""
    with _IMPORTING:  # cuda.core is half there for a second thread while a first one imports it
        from cuda.core import Program, ProgramOptions

    log, started = io.StringIO(), time.perf_counter()
    folders = [templates_dir()] + ([templates_dir() / SHIMS, nvshmem] if nvshmem is not None else [])
    options = ProgramOptions(
        name=SOURCE, arch=arch, std="c++20", lineinfo=True, include_path=[str(f) for f in folders],
        ptxas_options=["-v"], define_macro=list(defines) or None, no_cache=True,
    )  # fmt: skip
    cubin = bytes(Program(source, "c++", options).compile("cubin", logs=log).code)
    text = log.getvalue()
    registers = [int(n) for n in _FUNCTION.findall(text)]
    spills = [int(a) + int(b) for a, b in _SPILLS.findall(text)]
    if not registers:
        raise RuntimeError(f"the compiler did not report its registers:\n{text}")
    if "'setmaxnreg' ignored" in text:
        raise RuntimeError(f"the compiler does not move registers between warps:\n{text}")
    seconds = time.perf_counter() - started
    return cubin, Report(arch, f"NVRTC {nvrtc_version()}", max(registers), sum(spills), round(seconds, 2))


def _check_spills(name: str, report: Report) -> None:
    if report.spill_bytes:
        raise UserError(
            f"{name}: the kernel for {report.arch} needs more registers than there are: "
            f"{report.spill_bytes} bytes spill",
            "smaller tiles need fewer registers",
        )


def _read(folder: Path) -> Compiled | None:
    try:
        cubin = (folder / CUBIN).read_bytes()
        report = Report(**json.loads((folder / REPORT).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return Compiled(cubin, report, folder, True)


def _write(folder: Path, cubin: bytes, source: str, report: Report) -> None:
    """All or nothing: written aside, then renamed."""
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name + "."))
    (aside / CUBIN).write_bytes(cubin)
    (aside / SOURCE).write_text(source, encoding="utf-8")
    (aside / REPORT).write_text(json.dumps(asdict(report), indent=2), encoding="utf-8")
    if folder.exists():  # an unreadable entry
        shutil.rmtree(folder)
    os.rename(aside, folder)
