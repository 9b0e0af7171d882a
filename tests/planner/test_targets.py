from __future__ import annotations

import pytest

from mpk_spec.errors import UserError
from mpk_spec.planner.targets import find_target, target_of


@pytest.mark.parametrize(
    ("name", "arch", "sms", "target"),
    [
        ("NVIDIA H100 80GB HBM3", "sm_90", 132, "h100"),
        ("NVIDIA H200", "sm_90", 132, "h200"),
        ("NVIDIA A100-SXM4-80GB", "sm_80", 108, "a100"),
        ("NVIDIA GeForce RTX 4090", "sm_89", 128, "rtx4090"),
    ],
)
def test_a_gpu_is_found_among_the_targets(name, arch, sms, target):
    assert target_of(name, arch, sms) is find_target(target)


def test_a_gpu_of_another_size_is_no_target():
    with pytest.raises(UserError) as error:
        target_of("NVIDIA H100 PCIe", "sm_90", 114)
    assert error.value.message == "no target is like this GPU: NVIDIA H100 PCIe, sm_90, 114 SMs"
    assert "NVIDIA H100 80GB SXM (sm_90a, 132 SMs)" in error.value.hint


def test_a_part_of_a_gpu_is_a_target():
    part = find_target("H100:4")
    assert (part.name, part.num_sms, part.arch) == ("h100:4", 4, "sm_90a")
    assert find_target(part.name) == part


@pytest.mark.parametrize("name", ["h100:0", "h100:133", "h100:", "h100:x"])
def test_a_part_that_the_gpu_does_not_have(name):
    with pytest.raises(UserError) as error:
        find_target(name)
    assert str(error.value) == f"'{name}' names no part of NVIDIA H100 80GB SXM\n  hint: it has 1 to 132 SMs: h100:4"
