"""Tiny checkpoints, and a cache of their own for the tests."""

from __future__ import annotations

import pytest
from tiny_models import tiny_model


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cache(shared_cache, monkeypatch):
    """One cache folder for the whole run (configs are asked of transformers once), never the user's."""
    monkeypatch.setenv("MPK_SPEC_CACHE", str(shared_cache))
    return shared_cache


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache, for tests that look into it."""
    monkeypatch.setenv("MPK_SPEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    """A saved Llama with two shards or more."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("LlamaForCausalLM").save_pretrained(folder, max_shard_size="200KB")
    return folder


@pytest.fixture
def llama_copy(llama_folder, tmp_path):
    import shutil

    return shutil.copytree(llama_folder, tmp_path / "llama")
