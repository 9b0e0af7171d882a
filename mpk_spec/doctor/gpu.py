"""What `doctor` can say of the GPU side: driver, GPUs, NVRTC, NVSHMEM. Asks the driver itself, not torch."""

from __future__ import annotations

import ctypes

from mpk_spec.doctor.finding import Finding, installed

# CUdevice_attribute of cuda.h
_SM_COUNT, _CAPABILITY_MAJOR, _CAPABILITY_MINOR = 16, 75, 76


def _driver() -> ctypes.CDLL | None:
    """The initialised driver library, None on a machine without one."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return library if library.cuInit(0) == 0 else None


def find_driver() -> Finding:
    library = _driver()
    if library is None:
        return Finding("driver", "absent", "no NVIDIA driver: models run on the CPU")
    number = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(number))
    cuda = f"{number.value // 1000}.{number.value % 1000 // 10}"
    return Finding("driver", "ok", f"supports CUDA {cuda}", data={"cuda": cuda})


def find_gpus() -> Finding:
    library = _driver()
    count = ctypes.c_int()
    if library is None or library.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return Finding("gpus", "absent", "none")
    gpus = [_gpu(library, index) for index in range(count.value)]
    says = "; ".join(f"{g['name']}, {g['sms']} SMs, {g['bytes'] / 2**30:.0f} GiB, sm_{g['sm']}" for g in gpus)
    return Finding("gpus", "ok", says, data={"gpus": gpus})


def _gpu(library: ctypes.CDLL, index: int) -> dict:
    device, memory, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(128)
    library.cuDeviceGet(ctypes.byref(device), index)
    library.cuDeviceGetName(name, len(name), device)
    library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        library.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    return {
        "name": name.value.decode(),
        "sms": attribute(_SM_COUNT),
        "sm": f"{attribute(_CAPABILITY_MAJOR)}{attribute(_CAPABILITY_MINOR)}",
        "bytes": memory.value,
    }


def find_nvrtc() -> Finding:
    """Whether CUDA source can be compiled here, through cuda-bindings (which cuda-core brings)."""
    packages = {name: installed(name) for name in ("cuda-core", "cuda-bindings")}
    if packages["cuda-bindings"] is None:
        return Finding("nvrtc", "absent", "cuda-bindings is not installed; only building the CUDA kernel needs it")
    try:
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: the bindings did not find the library
        return Finding("nvrtc", "warning", f"cuda-bindings cannot load NVRTC: {error}", data=packages)
    says = f"NVRTC {major}.{minor}, cuda-bindings {packages['cuda-bindings']}, cuda-core {packages['cuda-core']}"
    return Finding("nvrtc", "ok", says, data={"nvrtc": f"{major}.{minor}", **packages})


def find_nvshmem() -> Finding:
    from mpk_spec.doctor.host import find_torch

    versions = {cuda: installed(f"nvidia-nvshmem-cu{cuda}") for cuda in ("12", "13")}
    torch_cuda = find_torch().data.get("cuda")
    return judge_nvshmem(versions, torch_cuda)


def judge_nvshmem(versions: dict[str, str | None], torch_cuda: str | None) -> Finding:
    """`versions`: of nvidia-nvshmem-cu12 and -cu13 by CUDA major; `torch_cuda`: the CUDA that torch was built with.

    Both packages put their libraries into the same folder, nvidia/nvshmem/lib, so whichever was installed last
    overwrites the other, and removing one removes files of both.
    """
    there = {cuda: found for cuda, found in versions.items() if found is not None}
    says = ", ".join(f"nvidia-nvshmem-cu{cuda} {found}" for cuda, found in there.items())
    data = {"cu12": versions["12"], "cu13": versions["13"], "torch_cuda": torch_cuda}
    wanted = torch_cuda.split(".")[0] if torch_cuda else None
    if not there:
        return Finding("nvshmem", "absent", "not installed; only several GPUs need it", data=data)
    if len(there) > 1:
        keep = wanted or "13"
        return Finding(
            "nvshmem",
            "warning",
            f"{says}: both write nvidia/nvshmem/lib, so the files there are a mix of two CUDA versions",
            f"pip uninstall nvidia-nvshmem-cu12 nvidia-nvshmem-cu13, then pip install nvidia-nvshmem-cu{keep}",
            data,
        )
    if wanted and wanted not in there:
        return Finding(
            "nvshmem",
            "warning",
            f"{says}, but torch is built for CUDA {torch_cuda}: one process would load two CUDA runtimes",
            f"pip uninstall nvidia-nvshmem-cu{next(iter(there))}, then pip install nvidia-nvshmem-cu{wanted}",
            data,
        )
    return Finding("nvshmem", "ok", says, data=data)
