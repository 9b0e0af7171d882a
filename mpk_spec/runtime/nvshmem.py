"""NVSHMEM's host library through ctypes: a symmetric heap, and the addresses of the peers' parts of it.

Where the peers' memory is mapped, the kernel reaches it with ordinary stores, and only the host side is used. Else the
kernel is built with NVSHMEM's device API, and its module is told where the symmetric heap and the peers are.
"""

from __future__ import annotations

import ctypes
import os
from importlib import metadata
from pathlib import Path

from mpk_spec.errors import UserError

LIBRARY = "nvidia/nvshmem/lib/libnvshmem_host.so.3"
HEADER = "device/nvshmem_defines.h"  # beside the library, in include
WITH_UNIQUE_ID = 1 << 3  # NVSHMEMX_INIT_WITH_UNIQUEID
INITIALISED = 2  # NVSHMEM_STATUS_IS_INITIALIZED; a larger status means that several processes share a GPU
INVALID = 0x7FFFFFFF
UNIQUE_ID_BYTES = 128


class _UniqueIdArgs(ctypes.Structure):
    _fields_ = (("version", ctypes.c_int), ("id", ctypes.c_void_p), ("rank", ctypes.c_int), ("ranks", ctypes.c_int))


class _InitArgs(ctypes.Structure):
    _fields_ = (("version", ctypes.c_int), ("unique_id", _UniqueIdArgs), ("content", ctypes.c_char * 96))


class _InitAttr(ctypes.Structure):
    _fields_ = (("version", ctypes.c_int), ("mpi_comm", ctypes.c_void_p), ("args", _InitArgs))


def _version(size: int) -> int:
    """How NVSHMEM marks the structures of its first interface: version 1 and their size."""
    return (1 << 16) + size


class Nvshmem:
    """The loaded library. `join` needs the device's CUDA context; all ranks make the calls that give or free memory."""

    in_use = False  # by this process: the library has one state

    def __init__(self, path: Path | None = None):
        self.path = Path(path or find_library())
        os.environ.setdefault("NVSHMEM_DISABLE_NVLS", "1")  # multicast over NVLink is off on many machines
        os.environ.setdefault("NVSHMEM_DEBUG_FILE", "/dev/stderr")  # standard output is for answers
        try:
            self._library = ctypes.CDLL(str(self.path))
        except OSError as error:
            raise UserError(f"NVSHMEM cannot be loaded: {error}", "install its package again") from None
        self._library.nvshmem_malloc.restype = ctypes.c_void_p
        self._library.nvshmem_malloc.argtypes = [ctypes.c_size_t]
        self._library.nvshmem_free.argtypes = [ctypes.c_void_p]
        self._library.nvshmem_ptr.restype = ctypes.c_void_p
        self._library.nvshmem_ptr.argtypes = [ctypes.c_void_p, ctypes.c_int]
        self._library.nvshmemx_cumodule_init.argtypes = [ctypes.c_void_p]
        self._library.nvshmemx_cumodule_finalize.argtypes = [ctypes.c_void_p]
        self.joined = False
        self._module: int | None = None

    def unique_id(self) -> bytes:
        """What one rank makes and all ranks join with."""
        made = ctypes.create_string_buffer(UNIQUE_ID_BYTES)
        ctypes.c_int.from_buffer(made).value = _version(UNIQUE_ID_BYTES)
        self._check(self._library.nvshmemx_get_uniqueid(made), "make a unique id")
        return made.raw

    def join(self, rank: int, ranks: int, unique_id: bytes) -> None:
        """Blocks until all ranks have joined. Raises UserError unless NVSHMEM says that it works."""
        if Nvshmem.in_use:
            raise UserError("this process belongs to a group of ranks already", "close the other engine first")
        identity = ctypes.create_string_buffer(unique_id, UNIQUE_ID_BYTES)
        attributes = _InitAttr(version=_version(ctypes.sizeof(_InitAttr)))
        attributes.args.version = _version(ctypes.sizeof(_InitArgs))
        attributes.args.unique_id.version = _version(ctypes.sizeof(_UniqueIdArgs))
        call = self._library.nvshmemx_set_attr_uniqueid_args
        self._check(call(rank, ranks, identity, ctypes.byref(attributes)), "take the unique id")
        self._check(
            self._library.nvshmemx_hostlib_init_attr(WITH_UNIQUE_ID, ctypes.byref(attributes)), "join the ranks"
        )
        status = self._library.nvshmemx_init_status()  # a return code of 0 alone proves nothing
        found, size = self._library.nvshmem_my_pe(), self._library.nvshmem_n_pes()
        if not INITIALISED <= status < INVALID or (found, size) != (rank, ranks):
            raise UserError(
                f"NVSHMEM did not start: its status is {status}, and it calls this rank {found} of {size} "
                f"instead of {rank} of {ranks}",
                "NVSHMEM_DEBUG=INFO makes it say more; GPUs that cannot reach one another's memory need a network card",
            )
        self.joined = Nvshmem.in_use = True

    def malloc(self, size: int) -> int:
        """The address of `size` bytes, which all ranks ask for at once."""
        address = self._library.nvshmem_malloc(size)
        if not address:
            raise UserError(
                f"NVSHMEM has no {size / 2**20:.1f} MiB of symmetric memory",
                "NVSHMEM_SYMMETRIC_SIZE says how much it takes",
            )
        return address

    def peer(self, address: int, rank: int) -> int | None:
        """Where this rank sees `rank`'s copy of symmetric memory. None where it is not mapped."""
        return self._library.nvshmem_ptr(address, rank) or None

    def adopt(self, module: int) -> None:
        """Makes the device API work in a loaded CUmodule, which must stay until `leave`."""
        self._forget()
        self._check(self._library.nvshmemx_cumodule_init(module), "get to know the kernel")
        self._module = module

    def _forget(self) -> None:
        if self._module is not None:
            self._library.nvshmemx_cumodule_finalize(self._module)
            self._module = None

    def leave(self, address: int | None) -> None:
        """Frees and finalises; all ranks call it."""
        if self.joined:
            self.joined = Nvshmem.in_use = False
            self._forget()
            if address:
                self._library.nvshmem_free(address)
            self._library.nvshmemx_hostlib_finalize()

    @staticmethod
    def _check(code: int, what: str) -> None:
        if code != 0:
            raise UserError(f"NVSHMEM could not {what}: error {code}", "NVSHMEM_DEBUG=INFO makes it say more")


def find_library() -> Path:
    """The wheel's library. UserError where none is installed, or one for another CUDA than torch's."""
    from mpk_spec.doctor.gpu import find_nvshmem

    finding = find_nvshmem()
    if finding.status == "absent":
        major = (finding.data["torch_cuda"] or "13").split(".")[0]
        raise UserError(
            "several GPUs need NVSHMEM, which is not installed", f"pip install 'mpk-spec[nvshmem-cu{major}]'"
        )
    if finding.status != "ok":
        raise UserError(f"NVSHMEM: {finding.says}", finding.hint)
    major = "12" if finding.data["cu12"] else "13"
    path = Path(str(metadata.distribution(f"nvidia-nvshmem-cu{major}").locate_file(LIBRARY)))
    if not path.is_file():
        raise UserError(
            f"nvidia-nvshmem-cu{major} is installed without {path.name}",
            f"pip install --force-reinstall nvidia-nvshmem-cu{major}",
        )
    return path


def find_headers(library: Path) -> Path:
    """The folder of the headers that belong to a library."""
    folder = library.parent.parent / "include"
    if not (folder / HEADER).is_file():
        raise UserError(
            f"NVSHMEM's headers are not in {folder}: a kernel that reaches peers through it needs them",
            "install its package again",
        )
    return folder
