from __future__ import annotations

import pytest

from mpk_spec.errors import UserError
from mpk_spec.paths import templates_dir
from mpk_spec.perf.ceiling import MAX_SLOTS, THREADS, TOTAL_BYTES, Ceiling, Reading, checked, points, sweep
from mpk_spec.planner.targets import find_target

H100 = find_target("h100")
PROBE = templates_dir() / "probes" / "ceiling.cu"


def test_the_ceiling_is_the_best_point_of_the_sweep():
    asked = []

    def timed(size, slots, chunks, interleaved):
        asked.append((size, slots, interleaved))
        assert TOTAL_BYTES - size * H100.num_sms < size * chunks * H100.num_sms <= TOTAL_BYTES
        return 2.75 if (size, slots, interleaved) == (16384, 4, True) else 3.0

    ceiling = sweep(H100, timed)
    assert len(set(asked)) == len(asked) == len(points(H100.smem_bytes)) > 30
    assert (ceiling.best.chunk_kib, ceiling.best.flight_kib, ceiling.best.interleaved) == (16, 64, True)
    assert ceiling.gbps == pytest.approx(TOTAL_BYTES / 2.75e6, rel=1e-3)
    assert checked(ceiling).data()["gbps_by_chunk"]["16 KiB"] == round(ceiling.gbps, 1)


def test_points_fit_the_shared_memory_and_the_probe():
    for chunk, flight, _ in points(find_target("rtx4090").smem_bytes):
        assert 2 <= flight // chunk <= MAX_SLOTS
        assert flight * 1024 < 99 * 1024
    assert f"max_slots = {MAX_SLOTS}, reader_warps = {THREADS // 32 - 1}" in PROBE.read_text()


def test_a_ceiling_far_below_the_data_sheet_is_refused():
    slow = Ceiling((Reading(16, 64, True, 2900.0),), 3352.0)
    with pytest.raises(UserError) as error:
        checked(slow)
    assert error.value.message == (
        "memory was read at 2900 GB/s at best, 87 % of the 3352 GB/s of the data sheet: "
        "no figures are reported below 90 %"
    )
    assert checked(Ceiling((Reading(16, 64, True, 3150.0),), 3352.0)).gbps == 3150.0


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
def test_the_probe_compiles_without_spills(arch, tmp_path, monkeypatch):
    pytest.importorskip("cuda.core", reason="needs cuda-core and NVRTC: pip install mpk-spec[cuda]")
    from mpk_spec.emit.compiler import compile_kernel

    monkeypatch.setenv("MPK_SPEC_CACHE", str(tmp_path))
    report = compile_kernel("ceiling", PROBE.read_text(), arch).report
    assert report.spill_bytes == 0
