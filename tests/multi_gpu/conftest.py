"""Two GPUs and NVSHMEM, or a reason to skip."""

from __future__ import annotations

import pytest
from tiny_ranks import SEED, SIZE, SPEC, missing, open_on


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
