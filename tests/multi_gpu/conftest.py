"""Two GPUs and NVSHMEM, or a reason to skip."""

from __future__ import annotations

import pytest
from one_gpu import open_here
from tiny_ranks import missing, open_tiny, tiny_checkpoint


@pytest.fixture(scope="session")
def two_gpus():
    reason = missing()
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def checkpoint():
    return tiny_checkpoint()


@pytest.fixture(scope="session")
def backend(two_gpus):
    """Two ranks on two GPUs; once for all tests, since a process joins NVSHMEM once."""
    made = open_tiny(2)
    yield made
    made.close()
    assert all(process.poll() is not None for process in made.ranks.processes)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("two GPUs", marks=pytest.mark.multi_gpu),
        *(pytest.param(f"{ranks} ranks on one GPU", marks=pytest.mark.gpu) for ranks in (2, 4)),
        *(pytest.param(f"{ranks} ranks on one GPU, two shots", marks=pytest.mark.gpu) for ranks in (2, 4)),
    ],
)
def ranks(request):
    """Two ranks on two GPUs, or as many as wanted that share one."""
    if request.param == "two GPUs":
        yield request.getfixturevalue("backend")
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, this machine has none")
    with pytest.MonkeyPatch.context() as patches:
        made = open_here(int(request.param[0]), patches, two_shots="two shots" in request.param)
        yield made
        made.close()
