from __future__ import annotations

import signal

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test of the command line reads or writes the cache of the person who runs it."""
    monkeypatch.setenv("MPK_SPEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def ctrl_c_interrupts():
    """Also where the tests were started in the background, which makes a shell ignore Ctrl-C for all it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
