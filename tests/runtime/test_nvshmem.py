"""The binding of NVSHMEM: what it tells the library, what it makes of the answers, which package it takes."""

from __future__ import annotations

import ctypes
import os

import pytest

from mpk_spec.doctor.finding import Finding
from mpk_spec.errors import UserError
from mpk_spec.runtime import nvshmem
from mpk_spec.runtime.nvshmem import Nvshmem
from mpk_spec.runtime.symmetric import Symmetric


class Function:
    """A function of the library: gives `answer`, or what `answer` makes of the arguments."""

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, *arguments):
        return self.answer(*arguments) if callable(self.answer) else self.answer


class Library:
    """A library that works, unless told otherwise."""

    def __init__(self, **answers):
        self.seen = {}
        works = {
            "nvshmemx_get_uniqueid": 0, "nvshmemx_set_attr_uniqueid_args": self._take, "nvshmemx_hostlib_init_attr": 0,
            "nvshmemx_init_status": 2, "nvshmem_my_pe": 1, "nvshmem_n_pes": 2, "nvshmem_malloc": 0x1000,
            "nvshmem_ptr": 0x2000, "nvshmem_free": None, "nvshmemx_hostlib_finalize": None,
            "nvshmemx_cumodule_init": 0, "nvshmemx_cumodule_finalize": self._forget,
        }  # fmt: skip
        for name, answer in {**works, **answers}.items():
            setattr(self, name, Function(answer))

    def _forget(self, module):
        self.seen["forgotten"] = module
        return 0

    def _take(self, rank, ranks, identity, attributes):
        self.seen = {"rank": rank, "ranks": ranks, "id": identity.raw, "versions": versions(attributes._obj)}
        return 0


def versions(attributes) -> tuple[int, ...]:
    """Each structure is marked 1 << 16 plus its size."""
    marks = attributes.version, attributes.args.version, attributes.args.unique_id.version
    return tuple(mark - (1 << 16) for mark in marks)


@pytest.fixture
def loaded(monkeypatch):
    """Makes a binding of a library with the given answers."""

    def load(**answers):
        library = Library(**answers)
        monkeypatch.setattr(ctypes, "CDLL", lambda path: library)
        return Nvshmem("libnvshmem_host.so.3"), library

    monkeypatch.setenv("NVSHMEM_DISABLE_NVLS", "taken away below")
    monkeypatch.delenv("NVSHMEM_DISABLE_NVLS")
    monkeypatch.setattr(Nvshmem, "in_use", False)
    return load


def test_it_joins_with_the_unique_id_and_structures_of_the_right_size(loaded):
    binding, library = loaded()
    binding.join(1, 2, b"x" * 128)
    assert library.seen == {"rank": 1, "ranks": 2, "id": b"x" * 128, "versions": (144, 128, 24)}
    assert len(binding.unique_id()) == 128


def test_multicast_is_off_unless_asked_for(loaded, monkeypatch):
    loaded()
    assert os.environ["NVSHMEM_DISABLE_NVLS"] == "1"
    monkeypatch.setenv("NVSHMEM_DISABLE_NVLS", "0")
    loaded()
    assert os.environ["NVSHMEM_DISABLE_NVLS"] == "0"


def test_a_process_joins_one_group_at_a_time(loaded):
    first, _ = loaded()
    first.join(1, 2, b"x" * 128)
    second, _ = loaded()
    with pytest.raises(UserError, match="this process belongs to a group of ranks already"):
        second.join(1, 2, b"x" * 128)
    first.leave(0x1000)
    second.join(1, 2, b"x" * 128)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"nvshmemx_init_status": 1}, "NVSHMEM did not start: its status is 1, and it calls this rank 1 of 2"),
        ({"nvshmemx_init_status": 0x7FFFFFFF}, "NVSHMEM did not start: its status is 2147483647"),
        ({"nvshmem_my_pe": 0}, "it calls this rank 0 of 2 instead of 1 of 2"),
        ({"nvshmemx_hostlib_init_attr": 7}, "NVSHMEM could not join the ranks: error 7"),
    ],
)
def test_a_return_code_of_0_is_not_believed(loaded, answers, message):
    binding, _ = loaded(**answers)
    with pytest.raises(UserError, match=message):
        binding.join(1, 2, b"x" * 128)
    assert not binding.joined


def test_what_is_not_mapped_has_no_address_and_what_is_not_there_is_refused(loaded):
    binding, _ = loaded(nvshmem_ptr=None, nvshmem_malloc=None)
    assert binding.peer(0x1000, 1) is None
    assert Symmetric.distances_of([0x1000, None, 0x9000], 0x1000) == ([0, 0, 0x8000], (1,))
    with pytest.raises(UserError, match=r"NVSHMEM has no 3\.0 MiB of symmetric memory"):
        binding.malloc(3 << 20)


def test_a_module_is_made_known_and_forgotten_before_the_end(loaded):
    binding, library = loaded()
    binding.join(1, 2, b"x" * 128)
    binding.adopt(0x77)
    binding.leave(0x1000)
    assert library.seen["forgotten"] == 0x77
    unknown, _ = loaded(nvshmemx_cumodule_init=7)
    with pytest.raises(UserError, match="NVSHMEM could not get to know the kernel: error 7"):
        unknown.adopt(0x77)


def test_headers_lie_beside_the_library(tmp_path):
    library = tmp_path / "lib" / "libnvshmem_host.so.3"
    with pytest.raises(UserError, match="NVSHMEM's headers are not in"):
        nvshmem.find_headers(library)
    (tmp_path / "include" / nvshmem.HEADER).parent.mkdir(parents=True)
    (tmp_path / "include" / nvshmem.HEADER).touch()
    assert nvshmem.find_headers(library) == tmp_path / "include"


@pytest.mark.parametrize(
    ("finding", "message", "hint"),
    [
        (
            Finding("nvshmem", "absent", "not installed", data={"torch_cuda": "12.8"}),
            "several GPUs need NVSHMEM, which is not installed",
            "pip install 'mpk-spec[nvshmem-cu12]'",
        ),
        (Finding("nvshmem", "warning", "a mix", "start anew"), "NVSHMEM: a mix", "start anew"),
    ],
)
def test_a_missing_package_and_a_mix_are_said(monkeypatch, finding, message, hint):
    monkeypatch.setattr("mpk_spec.doctor.gpu.find_nvshmem", lambda: finding)
    with pytest.raises(UserError) as error:
        nvshmem.find_library()
    assert (error.value.message, error.value.hint) == (message, hint)
