"""The kernel of several ranks is compiled while their processes start; what goes wrong is said as if it was not."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
from ranks_here import RanksHere

from mpk_spec.errors import UserError
from mpk_spec.planner import plan
from mpk_spec.runtime import nvshmem, parallel_backend, ranks
from mpk_spec.runtime.cuda_rank import CudaRank
from mpk_spec.runtime.parallel_backend import ParallelBackend
from mpk_spec.runtime.random_model import random_checkpoint
from mpk_spec.schema import load_spec

SOON_S = 20.0


@pytest.fixture(scope="module")
def tiny():
    return plan(load_spec("qwen3"), size="tiny", target="h100", context=256, tp=2)


@pytest.fixture
def compiler(monkeypatch):
    """In the place of NVRTC. It waits for `go`, and raises `error` if there is one."""
    seen = SimpleNamespace(begun=threading.Event(), go=threading.Event(), error=None, asked=[])
    seen.go.set()

    def compile_kernel(name, source, arch, defines, headers):
        seen.asked.append((threading.current_thread().name, arch, defines, headers))
        seen.begun.set()
        assert seen.go.wait(SOON_S)
        if seen.error is not None:
            raise seen.error
        return SimpleNamespace(cubin=f"cubin {len(seen.asked)}".encode())

    monkeypatch.setattr("mpk_spec.emit.compiler.compile_kernel", compile_kernel)
    yield seen
    seen.go.set()


def opened(tiny) -> ParallelBackend:
    return ParallelBackend(tiny, random_checkpoint(load_spec("qwen3"), "tiny", 0), defines=("GIVEN",))


def test_rank_0_compiles_while_the_ranks_start(tiny, two_fake_gpus, compiler, monkeypatch):
    compiler.go.clear()

    class Starting(RanksHere):
        def __init__(self, count: int):
            assert compiler.begun.wait(SOON_S)  # before there is any rank, and it goes on
            super().__init__(count)
            compiler.go.set()

    monkeypatch.setattr(parallel_backend, "Ranks", Starting)
    backend = opened(tiny)
    assert [asked[1:] for asked in compiler.asked] == [("sm_90a", ("GIVEN",), None)] * 2  # and rank 1, from the cache
    assert [asked[0].startswith("compiler") for asked in compiler.asked] == [True, False]
    assert two_fake_gpus.driver.loaded == [b"cubin 1", b"cubin 2"]
    assert backend.compiled.cubin == b"cubin 1"
    backend.close()


@pytest.mark.parametrize(
    "error", [UserError("the kernel needs more registers", "smaller tiles"), RuntimeError("a bug")]
)
def test_what_the_compiler_says_ends_all_ranks_before_they_join(tiny, two_fake_gpus, compiler, monkeypatch, error):
    compiler.error, made, joined = error, [], []

    class Kept(RanksHere):
        def open(self, *given) -> None:
            super().open(*given)
            made.append(self)

    monkeypatch.setattr(parallel_backend, "Ranks", Kept)
    monkeypatch.setattr(CudaRank, "join", lambda self, unique_id: joined.append(self.rank))
    with pytest.raises(type(error)) as said:
        opened(tiny)
    assert said.value is error
    assert [kept.objects for kept in made] == [[]] and not joined  # killed


def test_a_rank_that_does_not_start_is_named_while_it_compiles(tiny, two_fake_gpus, compiler, monkeypatch):
    class Starting(ranks.Ranks):
        def __init__(self, count: int):
            assert compiler.begun.wait(SOON_S)
            super().__init__(count)

    compiler.go.clear()
    monkeypatch.setattr(parallel_backend, "Ranks", Starting)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="rank 1 ended with exit code 1 before it was ready"):
        opened(tiny)
    assert not compiler.go.is_set()


def test_another_transport_than_expected_is_compiled_for(tiny, compiler, monkeypatch):
    monkeypatch.setattr(nvshmem, "find_library", lambda: Path("lib/library.so"))
    monkeypatch.setattr(nvshmem, "find_headers", lambda library: Path("include"))
    rank = CudaRank(0, 2, tiny, None)
    rank.emitted, rank.ahead = SimpleNamespace(plan=tiny, source=""), Future()
    rank.ahead.set_result(SimpleNamespace(cubin=b"ahead"))
    assert [rank._compile("peer"), rank._compile("nvshmem")] == [b"ahead", b"cubin 1"]
    assert [asked[1:] for asked in compiler.asked] == [("sm_90a", ("MPK_NVSHMEM",), Path("include"))]
