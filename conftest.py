"""Lets pytest collect specs when mpk-spec runs from its source tree; installed, its entry point does."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores: one thread each, set before torch reads it
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config) -> None:
    from mpk_spec.testing import pytest_plugin

    if not config.pluginmanager.is_registered(pytest_plugin):
        config.pluginmanager.register(pytest_plugin, "mpk_spec")
