"""Which transport the ranks take, and that every rank hears of it."""

from __future__ import annotations

import fake_rank
import pytest

from mpk_spec.errors import UserError
from mpk_spec.planner import plan
from mpk_spec.runtime.parallel_backend import ParallelBackend
from mpk_spec.runtime.transport import VARIABLE, Reach, check_device_api, choose, wanted_transport
from mpk_spec.schema import load_spec

ALL = [Reach(0), Reach(1)]
CUT_OFF = [Reach(0), Reach(1, unmapped=(0,), without_atomics=(0,))]
NO_ATOMICS = [Reach(0, without_atomics=(1,)), Reach(1, without_atomics=(0,))]
WHY = "peer 0 is not directly addressable from GPU 1"


@pytest.mark.parametrize(
    ("wanted", "found", "chosen"),
    [
        ("auto", ALL, ("peer", None)),
        ("peer", ALL, ("peer", None)),
        ("nvshmem", ALL, ("nvshmem", None)),
        ("auto", CUT_OFF, ("nvshmem", WHY)),
        ("nvshmem", CUT_OFF, ("nvshmem", WHY)),
        ("nvshmem", NO_ATOMICS, ("nvshmem", "GPU 0 has no atomic operations in the memory of peer 1")),
    ],
)
def test_peer_pointers_unless_a_rank_cannot_reach_another(wanted, found, chosen):
    assert choose(wanted, found) == chosen


@pytest.mark.parametrize(
    ("wanted", "found", "message", "hint"),
    [
        ("peer", CUT_OFF, f"{WHY}: peer pointers need NVLink", "MPK_SPEC_TRANSPORT=auto takes NVSHMEM's device API"),
        ("peer", NO_ATOMICS, "GPU 0 has no atomic operations in the memory of peer 1", "nvidia-smi topo"),
        ("auto", NO_ATOMICS, "GPU 0 has no atomic operations in the memory of peer 1", "MPK_SPEC_TRANSPORT=nvshmem"),
    ],
)
def test_what_cannot_be_had_is_refused(wanted, found, message, hint):
    with pytest.raises(UserError) as error:
        choose(wanted, found)
    assert error.value.message.startswith(message)
    assert hint in error.value.hint


def test_the_environment_says_what_is_wanted(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert wanted_transport() == "auto"
    monkeypatch.setenv(VARIABLE, "nvshmem")
    assert wanted_transport() == "nvshmem"
    monkeypatch.setenv(VARIABLE, "nvshmen")
    with pytest.raises(UserError, match="there is no transport 'nvshmen'") as error:
        wanted_transport()
    assert "nvshmem" in error.value.hint


def test_a_transport_of_nvshmem_that_the_kernel_lacks_is_refused(monkeypatch):
    monkeypatch.setenv("NVSHMEM_IB_ENABLE_IBGDA", "0")
    check_device_api()
    monkeypatch.setenv("NVSHMEM_IB_ENABLE_IBGDA", "true")
    with pytest.raises(UserError, match="NVSHMEM_IB_ENABLE_IBGDA asks for a transport that it lacks"):
        check_device_api()


@pytest.fixture(scope="module")
def tiny():
    return plan(load_spec("qwen3"), size="tiny", target="h200", context=256, tp=2)


@pytest.mark.parametrize(
    ("make", "wanted", "built"),
    [
        (fake_rank.Cuda, None, ["peer"]),
        (fake_rank.Cuda, "nvshmem", ["nvshmem"]),
        (fake_rank.CutOff, None, ["peer", "nvshmem"]),
    ],
)
def test_the_ranks_agree(tiny, make, wanted, built, monkeypatch, capsys):
    monkeypatch.delenv(VARIABLE, raising=False)
    backend = ParallelBackend(tiny, None, transport=wanted, make=make)
    assert backend.ranks.call("kernels") == [built, built]
    assert f"transport {built[-1]}" in backend.description
    said = f"transport: nvshmem, chosen since {WHY} (MPK_SPEC_TRANSPORT chooses)"
    assert (said in capsys.readouterr().err) == (len(built) == 2)
    backend.close()
