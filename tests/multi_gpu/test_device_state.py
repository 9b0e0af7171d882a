"""The state of NVSHMEM that ranks on one GPU are given is what its headers describe. Needs NVRTC, but no GPU."""

from __future__ import annotations

import pytest
from one_gpu import LOADS_AND_ATOMICS, DeviceState
from tiny_ranks import missing_library

from mpk_spec.emit.compiler import SHIMS
from mpk_spec.paths import templates_dir
from mpk_spec.runtime.nvshmem import find_headers, find_library

NAMES = {
    "rank": "mype", "ranks": "npes", "connectivity": "job_connectivity", "heap": "heap_base",
    "heap_bytes": "heap_size", "peers": "peer_heap_base_p2p",
}  # fmt: skip


def test_the_fields_lie_where_nvshmem_has_them():
    core = pytest.importorskip("cuda.core", reason="needs cuda-core and NVRTC: pip install mpk-spec[cuda]")
    reason = missing_library()
    if reason:
        pytest.skip(reason)
    lines = [
        f"static_assert(__INTADDR__(&((State*)0)->{theirs}) == {getattr(DeviceState, ours).offset});"
        for ours, theirs in NAMES.items()
    ]
    lines.append(f"static_assert(NVSHMEMI_JOB_GPU_LDST_ATOMICS == {LOADS_AND_ATOMICS});")
    source = '#include "runtime/shmem.cuh"\nusing State = nvshmemi_device_host_state_t;\n' + "\n".join(lines)
    folders = [str(templates_dir()), str(templates_dir() / SHIMS), str(find_headers(find_library()))]
    options = core.ProgramOptions(arch="sm_90a", std="c++20", include_path=folders, no_cache=True)
    assert core.Program(source, "c++", options).compile("cubin").code
