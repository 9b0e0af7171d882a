"""From the command line to a model that computes: tiny ones with random weights, and the real one of the README."""

from __future__ import annotations

import os

import pytest

from mpk_spec import errors
from mpk_spec.cli.main import main
from mpk_spec.runtime.random_model import random_checkpoint
from mpk_spec.schema import load_spec

QUESTION = "What is the capital of France? Answer in one sentence."
PEOPLES_CACHE = os.environ.get("MPK_SPEC_CACHE")


def restore_cache(monkeypatch) -> None:
    if PEOPLES_CACHE is None:
        monkeypatch.delenv("MPK_SPEC_CACHE")
    else:
        monkeypatch.setenv("MPK_SPEC_CACHE", PEOPLES_CACHE)


def answer(capsys, *arguments: str) -> tuple[str, str]:
    assert main(["chat", *arguments]) == errors.EXIT_OK
    shown = capsys.readouterr()
    return shown.out, shown.err


def test_the_plan_and_hugging_face_give_the_same_text(capsys):
    arguments = ["qwen3", "--size", "tiny", "--weights", "random:3", "-p", "hello", "-n", "12"]
    ours, notes = answer(capsys, *arguments)
    theirs, _ = answer(capsys, *arguments, "--backend", "torch")
    assert ours == theirs
    assert len(ours) > 12
    assert "backend: cpu, chosen since" in notes
    assert "random weights have no tokenizer" in notes


def test_random_weights_without_a_seed_are_refused(capsys):
    assert main(["chat", "qwen3", "--weights", "random:", "-p", "hello"]) == errors.EXIT_BAD_INPUT
    assert capsys.readouterr().err == (
        "error: 'random:' has no seed: random weights are written random:SEED, for example random:0\n"
    )


def test_random_weights_are_those_that_a_published_checkpoint_would_have():
    import transformers

    made = random_checkpoint(load_spec("qwen3"), "tiny", 0)
    config = transformers.Qwen3Config(**{k: v for k, v in made.config.items() if k != "architectures"})
    names = dict(transformers.Qwen3ForCausalLM(config).named_parameters())  # a tied head appears once
    assert {name: tuple(made.shape(name)) for name in made.names()} == {n: tuple(p.shape) for n, p in names.items()}


@pytest.mark.slow
def test_the_readme_s_first_command(capsys, monkeypatch):
    restore_cache(monkeypatch)  # the model is downloaded and converted once per machine
    text, _ = answer(capsys, "smollm2", "-p", QUESTION)
    assert text == "The capital of France is Paris.\n"
