"""Fixtures of the GPU tests. `pytest -m gpu tests/gpu -n 0` runs all of them on one GPU."""

from __future__ import annotations

import pytest
from gpu.models import Models

from mpk_spec.errors import UserError


@pytest.fixture(scope="session")
def gpu():
    """The plans' target; skips where the kernel cannot run."""
    import torch

    from mpk_spec.planner.targets import target_of

    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU that torch can use")
    found = torch.cuda.get_device_properties(0)
    if found.major != 9:
        pytest.skip(f"the kernel runs on Hopper GPUs, this is {found.name}")
    try:
        return target_of(found.name, f"sm_{found.major}{found.minor}", found.multi_processor_count).name
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def models(gpu) -> Models:
    return Models(gpu)


@pytest.fixture
def probe(models):
    """Makes a `Probe` for the launcher of a probed backend, and takes it away after the test."""
    from mpk_spec.runtime.cuda_probe import Probe

    launchers = []

    def attach(backend, **room) -> Probe:
        made = Probe(backend.emitted, backend.memory.arena.device, **room)
        backend.launcher.probe = made
        launchers.append(backend.launcher)
        return made

    yield attach
    for launcher in launchers:
        launcher.probe = None
