"""Fixtures that several folders of tests use."""

from __future__ import annotations

from fake_gpu import fake_gpu, two_fake_gpus

__all__ = ["fake_gpu", "two_fake_gpus"]
