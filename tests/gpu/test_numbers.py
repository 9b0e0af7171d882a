"""The kernel's numbers against Hugging Face in float32, and that a wrong kernel does not get past them."""

from __future__ import annotations

import pytest
from gpu.models import SPECS

from mpk_spec.errors import UserError
from mpk_spec.runtime.cuda_probe import KERNEL_DEFECTS, find_place

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("spec", "size"), [*((spec, "tiny") for spec in SPECS), ("qwen3", "0.6b")])
def test_compare_passes(models, spec, size):
    verdict = models.yardstick(spec, size).judge(models.backend(spec, size))
    assert verdict.passed, verdict.rows


def _is_caught(yardstick, backend) -> bool:
    """By the numbers, or since others wait for values that were cleared too early."""
    try:
        return not yardstick.judge(backend).passed
    except UserError as error:
        return "aborted" in error.message


@pytest.mark.parametrize("size", ["tiny", "0.6b"])
@pytest.mark.parametrize("defect", KERNEL_DEFECTS[1:])  # a dropped signal gives no numbers
def test_compare_fails_with_a_planted_defect(models, probe, size, defect):
    backend = models.backend("qwen3", size, probed=True)
    wrong = probe(backend)
    wrong.defect = defect
    if defect == "early-event":  # whoever waits for too little sees it when others are late
        wrong.at, wrong.delay_seed = find_place(backend.emitted, "down_add"), 7
    yardstick = models.yardstick("qwen3", size)
    if defect == "early-event":
        assert _is_caught(yardstick, backend)
    else:
        assert not yardstick.judge(backend).passed
    wrong.defect = None


def test_the_probed_build_computes_the_same(models):
    import torch

    ids = list(range(3, 60))
    plain = models.backend("qwen3", "tiny").logits(ids)
    assert torch.equal(models.backend("qwen3", "tiny", probed=True).logits(ids), plain)
