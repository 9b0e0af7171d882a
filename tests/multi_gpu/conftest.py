"""Two GPUs and NVSHMEM, or a reason to skip."""

from __future__ import annotations

import pytest
from one_gpu import open_here
from tiny_ranks import missing, on_transport, open_tiny, skip_without_gpu, tiny_checkpoint

from mpk_spec.runtime.transport import DEFINES, VARIABLE


@pytest.fixture(scope="session")
def two_gpus():
    reason = missing()
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def checkpoint():
    return tiny_checkpoint()


@pytest.fixture(params=DEFINES)
def transport(request, monkeypatch):
    """For processes that a test starts."""
    monkeypatch.setenv(VARIABLE, request.param)


@pytest.fixture(scope="session")
def joined(two_gpus):
    """Two ranks on two GPUs; once for all tests, since a process joins NVSHMEM once."""
    made = open_tiny(2)
    yield made
    made.close()
    assert all(process.poll() is not None for process in made.ranks.processes)


@pytest.fixture(scope="module", params=DEFINES)
def backend(joined, request):
    """Two ranks on two GPUs, once for each transport."""
    return on_transport(joined, request.param)


PLACES = [
    *(pytest.param((None, t, False), id=f"two GPUs, {t}", marks=pytest.mark.multi_gpu) for t in DEFINES),
    *(
        pytest.param((n, t, False), id=f"{n} ranks on one GPU, {t}", marks=pytest.mark.gpu)
        for t in DEFINES
        for n in (2, 4)
    ),
    *(pytest.param((n, "peer", True), id=f"{n} ranks on one GPU, two shots", marks=pytest.mark.gpu) for n in (2, 4)),
]


@pytest.fixture(scope="module", params=PLACES)
def ranks(request):
    """Two ranks on two GPUs, or as many as wanted that share one."""
    ranks, transport, two_shots = request.param
    if ranks is None:
        yield on_transport(request.getfixturevalue("joined"), transport)
        return
    skip_without_gpu(transport)
    with pytest.MonkeyPatch.context() as patches:
        made = open_here(ranks, patches, transport=transport, two_shots=two_shots)
        yield made
        made.close()
