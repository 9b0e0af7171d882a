"""One cache for the run, never the user's."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(shared_cache, monkeypatch):
    """No test reads or writes the cache of the person who runs it."""
    monkeypatch.setenv("MPK_SPEC_CACHE", str(shared_cache))
    return shared_cache
