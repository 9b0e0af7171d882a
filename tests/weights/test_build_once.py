"""Conversions meet bad luck: whatever happens, what is in the cache is complete, and one clear sentence is said."""

from __future__ import annotations

import errno
import multiprocessing

import pytest
from gguf_writer import write_gguf
from tiny_models import tiny_model

from mpk_spec.errors import UserError
from mpk_spec.weights import cache_entries, load_hf_model, open_checkpoint, remove_cache_entry
from mpk_spec.weights.cache import build_once, need_space


@pytest.fixture
def small_gguf(tmp_path, own_cache):
    return write_gguf(tiny_model("LlamaForCausalLM"), tmp_path / "small.gguf")


def left_over(cache):
    """Everything but lock files."""
    return [p.name for p in (cache / "checkpoints").iterdir() if p.suffix != ".lock"]


def test_converted_once_and_reported(small_gguf, monkeypatch):
    heard = []
    first = open_checkpoint(small_gguf, progress=lambda *said: heard.append(said))
    assert heard[0] == ("reading", 0, 1) and heard[-1] == ("tokenizer", 1, 1)
    assert [said for said in heard if said[0] == "converting"] == [("converting", i + 1, 21) for i in range(21)]

    monkeypatch.setattr("mpk_spec.weights.gguf_file.convert_gguf", lambda *a: pytest.fail("converted again"))
    again = open_checkpoint(str(small_gguf))
    assert again.directory == first.directory and again.source == str(small_gguf)


def test_another_file_under_the_same_name_is_converted_anew(small_gguf):
    first = open_checkpoint(small_gguf)
    write_gguf(tiny_model("LlamaForCausalLM", vocab_size=310), small_gguf)
    assert open_checkpoint(small_gguf).directory != first.directory


def test_interrupted(small_gguf, own_cache):
    def ctrl_c(stage, done, total):
        if (stage, done) == ("tokenizer", 0):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_checkpoint(small_gguf, progress=ctrl_c)
    assert left_over(own_cache) == []
    load_hf_model(open_checkpoint(small_gguf))


def test_killed_leftovers_are_swept(small_gguf, own_cache):
    ready = open_checkpoint(small_gguf).directory
    aside = ready.with_name(f".{ready.name}.tmp")
    ready.rename(aside)  # as if the process had been killed just before it was done
    (aside / "model.safetensors").write_bytes(b"half")
    load_hf_model(open_checkpoint(small_gguf))
    assert left_over(own_cache) == [ready.name]


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "no space left on the disk"),
        (errno.EACCES, "permission denied"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_the_disk_fails(small_gguf, own_cache, monkeypatch, number, reason):
    import os

    def fail(tensors, path, **options):
        path.write_bytes(b"half")
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(UserError) as caught:
        open_checkpoint(small_gguf)
    assert caught.value.message.startswith(f"cannot write {own_cache / 'checkpoints'}")
    assert caught.value.message.endswith(f": {reason}")
    assert (caught.value.hint is None) == (number == errno.EIO)
    assert left_over(own_cache) == []


def test_the_writer_says_the_disk_is_full(small_gguf, own_cache, monkeypatch):
    from safetensors import SafetensorError

    def fail(tensors, path, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
        open_checkpoint(small_gguf)
    assert left_over(own_cache) == []


def test_too_little_space_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 5_000_000}))
    need_space(tmp_path, 5_000_000)
    with pytest.raises(UserError, match="needs 6 MB and its disk has 5 MB free"):
        need_space(tmp_path, 6_000_000)


def test_the_cache_folder_is_a_file(tmp_path, monkeypatch, small_gguf):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MPK_SPEC_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"^cannot prepare the cache folder .*: (Not a directory|File exists)"):
        open_checkpoint(small_gguf)


def _build_slowly(cache, started, results):
    import os
    import time

    os.environ["MPK_SPEC_CACHE"] = cache

    started.wait()  # both processes are under way

    def build(folder):
        time.sleep(1.0)
        (folder / "made").write_text(str(os.getpid()))
        results.put(os.getpid())

    path = build_once("one", build, lambda stage, done, total: results.put(["said", stage, done, total]))
    results.put((path / "made").read_text())


def test_two_processes_build_one_folder(own_cache):
    context = multiprocessing.get_context("spawn")
    started, results = context.Event(), context.Queue()
    processes = [context.Process(target=_build_slowly, args=(str(own_cache), started, results)) for _ in range(2)]
    for process in processes:
        process.start()
    started.set()
    got = [results.get(timeout=60) for _ in range(4)]
    for process in processes:
        process.join(timeout=60)
    builders = [g for g in got if isinstance(g, int)]
    assert len(builders) == 1 and [g for g in got if isinstance(g, str)] == [str(builders[0])] * 2
    assert ["said", "waiting for another mpk-spec", 0, 0] in got
    assert left_over(own_cache) == ["one"]


def test_listing_and_removing(small_gguf, own_cache):
    assert cache_entries() == []
    checkpoint = open_checkpoint(small_gguf)
    made, config = cache_entries()
    assert (made.kind, made.name, made.source) == ("checkpoint", checkpoint.directory.name, str(small_gguf))
    assert made.bytes == sum(f.stat().st_size for f in checkpoint.directory.iterdir())
    assert (config.kind, config.source) == ("config", "LlamaForCausalLM") and config.bytes > 500
    with pytest.raises(UserError, match="the cache holds no 'smal'"):
        remove_cache_entry("smal")
    assert remove_cache_entry(made.name) == made and remove_cache_entry(config.name) == config
    assert cache_entries() == [] and left_over(own_cache) == []
