"""The kernel with NVSHMEM's device API compiles without a spill, and only it knows of NVSHMEM.

Needs NVRTC and NVSHMEM's package, but no GPU.
"""

from __future__ import annotations

import pytest

from mpk_spec.emit import compiler
from mpk_spec.emit.source import emit
from mpk_spec.errors import UserError
from mpk_spec.planner import plan
from mpk_spec.planner.targets import find_target
from mpk_spec.runtime.cuda_probe import DEFECTS, DELAYS, PROFILE
from mpk_spec.runtime.nvshmem import find_headers, find_library
from mpk_spec.runtime.transport import DEFINES
from mpk_spec.schema import load_spec

pytest.importorskip("cuda.core", reason="needs cuda-core and NVRTC: pip install mpk-spec[cuda]")

KNOWN_TO_THE_HOST = (b"nvshmemi_device_state_d\0", b"nvshmemi_device_lib_version_d\0")


@pytest.fixture(scope="module")
def headers():
    try:
        return find_headers(find_library())
    except UserError as error:
        pytest.skip(error.message)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MPK_SPEC_CACHE", str(tmp_path))


def compiled(headers, size: str = "tiny", tp: int = 2, target: str = "h100", defines=()) -> compiler.Compiled:
    made = plan(load_spec("qwen3"), size=size, target=target, context=256, tp=tp, verified=False)
    source, arch = emit(made).source, find_target(target).arch
    return compiler.compile_kernel(made.name, source, arch, (*defines, *DEFINES["nvshmem"]), headers)


def check(found: compiler.Compiled) -> None:
    assert found.report.spill_bytes == 0
    assert found.report.registers <= 168
    assert all(name in found.cubin for name in KNOWN_TO_THE_HOST)


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "target"), [(2, "h100"), (8, "h100"), (2, "a100")])
def test_the_tiny_model_compiles_without_spills(headers, tp, target):
    check(compiled(headers, tp=tp, target=target))


@pytest.mark.exhaustive
@pytest.mark.parametrize("defines", [(), (PROFILE,), (DELAYS, DEFECTS)], ids="+".join)
def test_a_real_size_and_builds_for_testing_compile_without_spills(headers, defines):
    check(compiled(headers, "8b", defines=defines))


def test_its_cubins_depend_on_nvshmems_version(tmp_path):
    version = tmp_path / compiler.NVSHMEM_VERSION
    version.parent.mkdir(parents=True)
    keys = {compiler._key("source", "sm_90a", ())}
    for text in ("3.4.5", "3.5.0"):
        version.write_text(text)
        keys.add(compiler._key("source", "sm_90a", (), tmp_path))
    assert len(keys) == 3


def test_other_kernels_know_nothing_of_nvshmem():
    made = plan(load_spec("qwen3"), size="tiny", target="h100", context=256, tp=2, verified=False)
    found = compiler.compile_kernel(made.name, emit(made).source, find_target("h100").arch)
    assert not any(name in found.cubin for name in KNOWN_TO_THE_HOST)
