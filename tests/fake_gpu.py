"""A GPU that is not there: a driver that answers, memory on the host, and a kernel that gives tokens without computing.

Everything between the command line and the launch runs as it would: checks, the packing of weights, the stream.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from ranks_here import RanksHere

from mpk_spec.runtime import cuda_backend, cuda_device, cuda_launch

ATTRIBUTES = {"MULTIPROCESSOR_COUNT": 132, "COMPUTE_CAPABILITY_MAJOR": 9, "COMPUTE_CAPABILITY_MINOR": 0}


class FakeDriver:
    """Answers as the driver of an H100. `errors`: by function, the name of the error that it returns instead."""

    def __init__(self, monkeypatch, attributes=None, errors=None, sizes=None):
        from cuda.bindings import driver

        self.attributes, self.errors = {**ATTRIBUTES, **(attributes or {})}, errors or {}
        self.sizes = sizes or (100_000, 384, cuda_launch.PARAMS.itemsize, cuda_launch.CONTROL.itemsize,
                               cuda_launch.REPORT.itemsize, cuda_launch.STEP.itemsize)  # fmt: skip
        self.loaded, self.codes = [], driver.CUresult
        answers = {
            "cuInit": lambda flags: (), "cuDeviceGet": lambda index: (index,), "cuDeviceGetAttribute": self._attribute,
            "cuModuleLoadData": lambda image: (self.loaded.append(image) or "module",),
            "cuModuleGetFunction": lambda module, name: ("function",), "cuFuncSetAttribute": lambda *given: (),
            "cuModuleGetGlobal": lambda module, name: (self.sizes, 4 * len(self.sizes)), "cuMemcpyDtoH": self._read,
        }  # fmt: skip
        for name, answer in answers.items():
            monkeypatch.setattr(driver, name, self._function(name, answer))
        monkeypatch.setattr(driver, "cuGetErrorString", lambda error: (0, f"words for {error.name}".encode()))

    def _function(self, name, answer):
        def call(*arguments):
            if name in self.errors:
                return (self.codes[f"CUDA_ERROR_{self.errors[name]}"], None)
            return (self.codes.CUDA_SUCCESS, *answer(*arguments))

        return call

    def _attribute(self, kind, device):
        return (self.attributes[kind.name.removeprefix("CU_DEVICE_ATTRIBUTE_")],)

    def _read(self, to, values, size):
        import ctypes

        words = np.array(values, np.uint32)
        ctypes.memmove(to, words.ctypes.data, size)
        return ()


class FakeLauncher:
    """Publishes `answer` after whatever prompt; keeps what it was started with."""

    answer: tuple[int, ...] = (72, 105, 33)  # "Hi!"

    def __init__(self, emitted, module, memory, weights):
        self.emitted, self.module, self.memory, self.weights = emitted, module, memory, weights
        self.started: list[tuple[list[int], int, int]] = []

    def start(self, prompt, position, max_new, stop=frozenset()):
        self.started.append((prompt, position, max_new))
        self.memory.ring[:] = 0

    def tokens(self):
        for token in self.answer[: self.started[-1][2]]:
            self.memory.ring[32 + self.memory.ring[0]] = token
            self.memory.ring[0] += 1
            yield token

    def stop(self):
        pass

    def finish(self):
        return 1


@pytest.fixture
def fake_gpu(monkeypatch):
    """An idle H100 with 80 GB. Its attributes may be changed before a backend is opened."""
    import torch

    pytest.importorskip("cuda.bindings", reason="needs cuda-bindings: pip install mpk-spec[cuda]")
    gpu = SimpleNamespace(driver=FakeDriver(monkeypatch), free=84 << 30, total=85 << 30, reserved=0, launchers=[])

    def launcher(*parts):
        gpu.launchers.append(FakeLauncher(*parts))
        return gpu.launchers[-1]

    def memory(emitted, device, symmetric=None):
        return SimpleNamespace(ring=np.zeros(32 + emitted.plan.context + 1, np.int32))

    monkeypatch.setattr(cuda_device, "find_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gpu.free, gpu.total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: gpu.reserved)
    monkeypatch.setattr(cuda_launch, "Launcher", launcher)
    monkeypatch.setattr(cuda_launch, "Memory", memory)
    assert cuda_backend  # what is patched above is what it imports
    return gpu


@pytest.fixture
def two_fake_gpus(fake_gpu, monkeypatch):
    """Two such H100s, their ranks in this process. `fake_gpu` has what both did."""
    import torch

    from mpk_spec.runtime import cuda_rank, parallel_backend, symmetric

    fake_gpu.driver.sizes = (
        *fake_gpu.driver.sizes[:2],
        cuda_launch.params_dtype(2).itemsize,
        *fake_gpu.driver.sizes[3:],
    )
    library = SimpleNamespace(unique_id=lambda: b"id", join=lambda *place: None)
    shared = SimpleNamespace(leave=lambda: None, unmapped=())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(parallel_backend, "Ranks", RanksHere)
    monkeypatch.setattr(cuda_rank.CudaRank, "_take_gpu", lambda self: self.rank)
    monkeypatch.setattr(cuda_rank.CudaRank, "_library", lambda self: library)
    monkeypatch.setattr(cuda_rank, "_without_atomics", lambda rank, ranks: ())
    monkeypatch.setattr(symmetric, "Symmetric", lambda *given: shared)
    return fake_gpu
