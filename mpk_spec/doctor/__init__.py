"""What this machine has and lacks: examinations that `mpk-spec doctor` prints and the runtime asks.

One function each. None needs a GPU; none raises for what it finds.
"""

from __future__ import annotations

from mpk_spec.doctor.finding import Finding


def all_findings() -> list[Finding]:
    from mpk_spec.doctor.gpu import find_driver, find_gpus, find_nvrtc, find_nvshmem
    from mpk_spec.doctor.host import find_cache, find_disk, find_packages, find_python, find_torch, find_transformers

    return [
        find_python(),
        find_torch(),
        find_transformers(),
        find_packages(),
        find_driver(),
        find_gpus(),
        find_nvrtc(),
        find_nvshmem(),
        find_cache(),
        find_disk(),
    ]
