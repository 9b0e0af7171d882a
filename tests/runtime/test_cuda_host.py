"""Bad luck on the way to a launch: each is one message that says what would work."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fake_gpu import FakeDriver

from mpk_spec.emit.source import emit
from mpk_spec.errors import UserError
from mpk_spec.planner import plan
from mpk_spec.runtime import cuda_device
from mpk_spec.runtime.cuda_device import HINTS, NoGpu, admit, gpu_alone, memory_runs_out, why_not
from mpk_spec.runtime.cuda_launch import KernelModule
from mpk_spec.schema import load_spec

pytest.importorskip("cuda.bindings", reason="needs cuda-bindings: pip install mpk-spec[cuda]")


@pytest.fixture(scope="module")
def emitted():
    return emit(plan(load_spec("qwen3"), size="tiny", target="h100", context=256))


def refused(call) -> UserError:
    with pytest.raises(UserError) as error:
        call()
    return error.value


def test_a_module_that_fits_is_loaded(emitted, monkeypatch):
    FakeDriver(monkeypatch)
    module = KernelModule(emitted, b"cubin")
    assert module.sizes["block_threads"] == 384 and module.num_sms == 132


@pytest.mark.parametrize(
    ("attributes", "message", "hint"),
    [
        (
            {"COMPUTE_CAPABILITY_MAJOR": 8},
            "the plan is for NVIDIA H100 80GB SXM (sm_90a), this GPU is sm_80",
            "build it for this GPU: mpk-spec build SPEC --target NAME",
        ),
        (
            {"MULTIPROCESSOR_COUNT": 114},
            "the plan is for 132 SMs, this GPU has 114",
            "one block per SM: plan for this GPU",
        ),
    ],
)
def test_another_gpu_than_planned(emitted, monkeypatch, attributes, message, hint):
    driver = FakeDriver(monkeypatch, attributes)
    error = refused(lambda: KernelModule(emitted, b"cubin"))
    assert (error.message, error.hint) == (message, hint)
    assert not driver.loaded  # it is refused before the kernel is loaded


@pytest.mark.parametrize(
    ("function", "name"),
    [
        ("cuInit", "NO_DEVICE"),
        ("cuInit", "SYSTEM_DRIVER_MISMATCH"),
        ("cuModuleLoadData", "INVALID_IMAGE"),
        ("cuModuleLoadData", "NO_BINARY_FOR_GPU"),
        ("cuModuleLoadData", "UNSUPPORTED_PTX_VERSION"),
        ("cuModuleLoadData", "OUT_OF_MEMORY"),
    ],
)
def test_the_drivers_errors_come_with_a_remedy(emitted, monkeypatch, function, name):
    FakeDriver(monkeypatch, errors={function: name})
    error = refused(lambda: KernelModule(emitted, b"cubin"))
    assert error.message == f"the CUDA driver says: words for CUDA_ERROR_{name}"
    assert error.hint == HINTS[name]


def test_every_remedy_is_for_an_error_that_exists():
    from cuda.bindings import driver

    assert {f"CUDA_ERROR_{name}" for name in HINTS} <= {code.name for code in driver.CUresult}


def test_a_kernel_with_other_structures_is_refused(emitted, monkeypatch):
    from mpk_spec.runtime.cuda_launch import CONTROL, PARAMS, REPORT, STEP

    sizes = (100_000, 384, PARAMS.itemsize, CONTROL.itemsize + 128, REPORT.itemsize, STEP.itemsize)
    FakeDriver(monkeypatch, sizes=sizes)
    error = refused(lambda: KernelModule(emitted, b"cubin"))
    assert error.message == f"the kernel's 'control' has {CONTROL.itemsize + 128} bytes, the host's {CONTROL.itemsize}"


@pytest.mark.parametrize("steps", [0, 5, 2**31 - 1, 2**31, 2**32 - 1])
def test_the_first_steps_descriptor_and_no_other_is_there(steps):
    """Each word with its step's number, which wraps; what stands elsewhere is of no step to come."""
    from mpk_spec.runtime.cuda_launch import STEP, control_of, described

    first = np.zeros((), STEP)
    first["tokens"], first["position"], first["ids"][:2] = 2, 7, (11, 12)
    control = control_of(first, steps)
    place = steps % 4
    assert control["steps"]["word"][place].tolist()[:6] == [2, 7, 0, 0, 11, 12]
    for n, slot in enumerate(control["steps"]["number"].tolist()):
        (number,) = set(slot)
        ahead = [(number - (steps + 1 + later)) % 2**32 < 2**31 for later in range(4)]  # as the kernel compares
        assert ahead == [n == place, False, False, False]
    assert described(control, steps) == 0
    for ran in range(1, 6):  # the kernel describes the steps that follow
        control["steps"]["number"][(steps + ran) % 4] = (steps + ran + 1) % 2**32
        assert described(control, steps) == ran


@pytest.mark.parametrize(
    ("built", "driver", "message", "hint"),
    [
        (None, None, "this torch is built without CUDA", "install a CUDA build of torch"),
        ("13.0", None, "there is no usable NVIDIA GPU here", None),
        (
            "13.0",
            (12, 4),
            "the NVIDIA driver is too old: it supports CUDA 12.4, this torch is built for 13.0",
            "update the driver",
        ),
        ("13.0", (13, 0), "there is no usable NVIDIA GPU here", "CUDA_VISIBLE_DEVICES may hide it"),
    ],
)
def test_why_torch_sees_no_gpu(built, driver, message, hint):
    said, remedy = why_not(built, driver)
    assert (said, remedy) == (message, hint)


def test_the_cpu_is_offered_unless_the_kernel_alone_is_meant():
    assert NoGpu("none").hint == "--backend cpu runs the same plan on the CPU"
    assert NoGpu("none", "mend it").hint == "mend it; --backend cpu runs the same plan on the CPU"
    with pytest.raises(NoGpu) as error, gpu_alone():
        raise NoGpu("none", "mend it")
    assert (error.value.message, error.value.hint) == ("none", "mend it; this measures the kernel: it needs a GPU")


def test_a_gpu_that_another_process_holds_alone(monkeypatch):
    def busy():
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCUDA kernel errors might be")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", busy)
    error = refused(cuda_device.find_device)
    assert error.message == "the GPU cannot be used: CUDA error: CUDA-capable device(s) is/are busy or unavailable"
    assert error.hint == HINTS["DEVICE_UNAVAILABLE"]


@pytest.mark.parametrize(
    ("free_mib", "reserved_mib", "said", "hint"),
    [
        (515, 0, "the GPU has 0.5 of 80.0 GiB free, other processes hold 79.5", "a context of 192 fits: -c 192"),
        (512, 0, "the GPU has 0.5 of 80.0 GiB free, other processes hold 79.5", "end what else uses the GPU"),
        (512, 81920 - 512, "the GPU has 0.5 of 80.0 GiB free", "a smaller model would fit"),
    ],
)
def test_too_little_memory(emitted, fake_gpu, free_mib, reserved_mib, said, hint):
    fake_gpu.total = 80 << 30
    spare = emitted.layout.weight_bytes + sum(emitted.plan.arena_bytes.values())
    fake_gpu.reserved = reserved_mib << 20
    per_position = emitted.layout.cache_bytes / emitted.plan.context
    fake_gpu.free = (512 << 20) + spare + int(per_position * 200) if free_mib == 515 else free_mib << 20
    error = refused(lambda: admit(emitted, torch.device("cpu")))
    assert error.message.startswith("the model needs 0.5 GiB and its cache 0.0 GiB at context 256, ")
    assert error.message.endswith(said)
    assert error.hint == hint


def test_memory_that_another_process_takes_meanwhile():
    def load():
        with memory_runs_out():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 15.20 GiB. GPU 0 has a total of 79 GiB")

    error = refused(load)
    assert error.message == "the GPU's memory ran out: CUDA out of memory. Tried to allocate 15.20 GiB"
    assert error.hint == HINTS["OUT_OF_MEMORY"]


def test_what_lies_in_inboxes_is_found():
    """Of addends a slot of each rank, of a sum in two shots one row, behind one another in symmetric memory."""
    from types import SimpleNamespace

    from tiny_specs import child

    from mpk_spec.runtime.cuda_backend import value_of

    spec = child("qwen3", schedule=[{"set": {"o_add": {"all_reduce": "two_shot"}}}])
    made = plan(spec, size="tiny", target="h100", context=256, tp=2)
    words = torch.arange(made.arena_bytes["nvshmem"] // 4, dtype=torch.float32)
    memory = SimpleNamespace(symmetric={"inbox": words.view(torch.uint8)})
    tokens = max(step.tokens for step in made.steps.values())
    for name, shares in (("mlp.down", "all"), ("attention.o", "scattered"), ("attention.out", "gathered")):
        tensor = made.tensors[name]
        assert tensor.shares == shares
        found = value_of(made, memory, name, 3)
        assert found.shape == ((3, 96) if shares == "gathered" else (2, 3, 96))
        assert (
            found.flatten()[0] == tensor.offset // 4 and found.reshape(-1, 3, 96)[0, 2, 5] == tensor.offset // 4 + 197
        )
        if shares != "gathered":
            assert found[1, 0, 0] == tensor.offset // 4 + tokens * 96
