"""`mpk-spec compare`: a table, a verdict, an exit code."""

from __future__ import annotations

import json

import pytest

from mpk_spec import errors
from mpk_spec.cli.main import main

FEW = ["--size", "tiny", "--positions", "96", "-c", "48", "--seeds", "2"]


def test_a_true_model_passes(capsys):
    assert main(["compare", "qwen3", "--size", "tiny", "--positions", "1024"]) == errors.EXIT_OK
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0].startswith("qwen3 tiny, weights random:0, cpu reference, ")
    assert lines[1] == "truth: Hugging Face in float32, 1024 positions in 4 sequences of random ids"
    assert [line.split("  ")[0] for line in lines[4:8]] == [
        "KL mean", "KL 99th percentile", "max logit error", "top-1 flips",
    ]  # fmt: skip
    assert lines[-1] == "verdict: passed"
    assert "weights: random:0, since size 'tiny' has none of its own (--weights chooses)" in shown.err
    assert "say little" not in shown.err


def test_a_planted_defect_fails(capsys):
    assert main(["compare", "qwen3", *FEW, "--plant", "no-rope"]) == errors.EXIT_VERDICT
    shown = capsys.readouterr()
    assert "planted: queries and keys are not turned by their positions" in shown.out
    assert "too far" in shown.out and "verdict: FAILED, further from the truth" in shown.out
    assert "error: further from the truth than Hugging Face in bf16 by more than 10 %: KL mean" in shown.err
    assert "note: 96 positions say little; the rule is made for 2000" in shown.err


def test_json_is_data(capsys):
    assert main(["compare", "qwen3", *FEW, "--plant", "no-rope", "--json", "--tp", "2"]) == errors.EXIT_VERDICT
    data = json.loads(capsys.readouterr().out)
    assert (data["passed"], data["planted"], data["context"], data["positions"]) == (False, "no-rope", 48, 96)
    assert data["kl_ratio"] > 10
    assert [row["passed"] for row in data["rows"]] == [False] * 4


def test_hugging_face_itself_is_as_far_as_itself(capsys):
    assert main(["compare", "qwen3", *FEW, "--backend", "torch", "--json"]) == errors.EXIT_OK
    assert json.loads(capsys.readouterr().out)["kl_ratio"] == pytest.approx(1)


@pytest.mark.parametrize("more", [[], ["--stop-after", "all"], ["--tp", "2"]])
def test_without_a_gpu_no_truth_is_worked_out_first(more, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("mpk_spec.weights.load_hf_model", lambda *_, **__: pytest.fail("it was asked for the truth"))
    assert main(["compare", "qwen3", *FEW, "--backend", "cuda", *more]) == errors.EXIT_BAD_INPUT
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("error: ") == 1
    assert "--backend cpu" in shown.err and "running" not in shown.err


def test_stop_after_names_the_operator(capsys):
    arguments = ["compare", "qwen3", "--size", "tiny", "--stop-after", "attention.a", "--plant", "late-position"]
    assert main(arguments) == errors.EXIT_VERDICT
    shown = capsys.readouterr()
    assert "first: 'attention.qr@0' (rope) has a relative error of 0." in shown.out
    assert main(arguments[:-2]) == errors.EXIT_OK
    assert capsys.readouterr().out.splitlines()[-1] == "first: no operator adds an error of its own"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plant", "no-ropes"], "there is no defect 'no-ropes'\n  hint: did you mean 'no-rope'?"),
        (["-c", "513"], "a context of 513 is more than the 512 positions that this model was made for"),
        (["--stop-after", "x", "--backend", "torch"], "--stop-after looks into plans; the backend 'torch' runs none"),
        (
            ["--plant", "no-rope", "--backend", "torch", "--positions", "8"],
            "defects are planted into plans; the backend 'torch' runs none",
        ),
        (["--tp", "2", "--backend", "torch", "--positions", "8"], "the backend 'torch' runs on one rank"),
    ],
)
def test_what_cannot_be_done_is_refused(capsys, arguments, message):
    assert main(["compare", "qwen3", "--size", "tiny", *arguments]) == errors.EXIT_BAD_INPUT
    assert f"error: {message}" in capsys.readouterr().err


def test_a_defect_that_a_spec_cannot_have(capsys):
    assert main(["compare", "llama3", "--size", "tiny", "--plant", "no-qk-norm"]) == errors.EXIT_BAD_INPUT
    assert "'llama3' has nothing in which 'no-qk-norm' could go wrong" in capsys.readouterr().err
