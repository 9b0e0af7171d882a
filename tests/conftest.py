"""Fixtures that several folders of tests use."""

from __future__ import annotations

from fake_gpu import fake_gpu

__all__ = ["fake_gpu"]
