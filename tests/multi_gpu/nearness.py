"""When two computations of one model agree. Judged by the truth, Hugging Face in float32: logits of the tiny model.

Two orders of the same sums differ in their last bits, and where a value lies between two bf16 numbers that decides
which of them the next operator gets. The random model's attention is peaked, so one such choice moves logits by 0.1
and more. Noise of 1e-7 to 1e-6 of what a product adds up, as much as tensor cores leave, moves them by 0.17 to 0.33
(measured on the CPU), which is a quarter to 0.4 of the way to the truth. The subtlest planted defect, a wrong eps, is
8 ways away.
"""

from __future__ import annotations

import torch

from mpk_spec.testing.metrics import Verdict, measure

IDS = [(7 + 29 * n + 5 * n * n) % 515 for n in range(75)]
SAME_ROUNDING = 0.7  # two computations that round at the same places
SAME_BUT_SUMS_OVER_RANKS = 0.3


def true_logits(checkpoint) -> torch.Tensor:
    """Hugging Face in float32 `[75, vocab]`."""
    from mpk_spec.testing.yardstick import Yardstick

    return Yardstick(checkpoint, [IDS]).truth[0]


def reference_logits(plan, checkpoint) -> torch.Tensor:
    """The plan, computed by torch on the CPU `[75, vocab]`."""
    from mpk_spec.reference.backend import ReferenceBackend

    return ReferenceBackend(plan, checkpoint).logits(IDS)


def verdict(ours: torch.Tensor, reference: torch.Tensor, truth: torch.Tensor) -> Verdict:
    """compare's rule, with the reference in the place of Hugging Face's bf16 run."""
    return Verdict(measure([(truth, reference)]), measure([(truth, ours)]))


def apart(ours: torch.Tensor, other: torch.Tensor, truth: torch.Tensor) -> float:
    """How far two logits are from one another, in distances of the other one from the truth (root mean squares)."""
    return ((ours - other).square().mean() / (other - truth).square().mean()).sqrt().item()
