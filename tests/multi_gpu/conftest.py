"""Two GPUs and NVSHMEM, or a reason to skip."""

from __future__ import annotations

import pytest
from one_gpu import open_here
from tiny_ranks import CONTEXT, SEED, SIZE, SPEC, missing, open_on


@pytest.fixture(scope="session")
def two_gpus():
    reason = missing()
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def checkpoint():
    from mpk_spec.runtime.random_model import random_checkpoint
    from mpk_spec.schema import load_spec

    return random_checkpoint(load_spec(SPEC), SIZE, SEED)


@pytest.fixture(scope="module")
def backend(two_gpus, checkpoint):
    made = open_on(2, checkpoint)
    yield made
    made.close()
    assert all(process.poll() is not None for process in made.ranks.processes)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("two GPUs", marks=pytest.mark.multi_gpu),
        *(pytest.param(f"{ranks} ranks on one GPU", marks=pytest.mark.gpu) for ranks in (2, 4)),
    ],
)
def ranks(request, checkpoint):
    """Two ranks on two GPUs, or as many as wanted that share one."""
    if request.param == "two GPUs":
        yield request.getfixturevalue("backend")
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, this machine has none")
    with pytest.MonkeyPatch.context() as patches:
        made = open_here(SPEC, SIZE, int(request.param[0]), CONTEXT, checkpoint, patches)
        yield made
        made.close()
