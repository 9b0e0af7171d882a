from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test of the command line reads or writes the cache of the person who runs it."""
    monkeypatch.setenv("MPK_SPEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
