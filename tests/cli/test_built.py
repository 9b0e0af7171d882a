"""A folder that `build` made, run elsewhere: no compiler, every mismatch one message."""

from __future__ import annotations

import json
import shutil

import pytest

from mpk_spec import errors
from mpk_spec.cli.main import main
from mpk_spec.runtime import built


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The tiny Qwen3, built once for all tests of this file."""
    pytest.importorskip("cuda.core", reason="needs cuda-core and NVRTC: pip install mpk-spec[cuda]")
    folder = tmp_path_factory.mktemp("built") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPK_SPEC_CACHE", str(folder.parent / "cache"))
        assert main(["build", "qwen3", "--size", "tiny", "-c", "256", "-o", str(folder)]) == errors.EXIT_OK
    return folder


@pytest.fixture
def folder(original, tmp_path, monkeypatch):
    """A copy elsewhere, where nothing can compile."""

    def refuse(*asked, **how):
        raise AssertionError("a build must not be compiled again")

    monkeypatch.setattr("mpk_spec.emit.compiler.compile_kernel", refuse)
    monkeypatch.setattr("mpk_spec.emit.compiler.nvrtc_version", refuse)
    return shutil.copytree(original, tmp_path / "elsewhere")


def chat(folder, *more):
    return main(["chat", str(folder), "-p", "Hello", "--weights", "random:0", *more])


def test_a_build_answers_without_a_compiler(folder, fake_gpu, capsys):
    assert chat(folder) == errors.EXIT_OK
    assert capsys.readouterr().out == "Hi!\n"
    (launcher,) = fake_gpu.launchers
    assert fake_gpu.driver.loaded == [(folder / built.CUBIN).read_bytes()]
    (prompt, position, _) = launcher.started[0]
    assert (prompt, position) == (list(b"Hello"), 0)
    assert launcher.weights.numel() == launcher.emitted.layout.weight_bytes


def test_its_weights_are_what_they_are_without_a_build(folder, fake_gpu):
    import torch

    from mpk_spec.runtime.cuda_weights import load_weights
    from mpk_spec.runtime.random_model import random_checkpoint
    from mpk_spec.schema import load_spec

    assert chat(folder) == errors.EXIT_OK
    (launcher,) = fake_gpu.launchers
    checkpoint = random_checkpoint(load_spec("qwen3"), "tiny", 0)
    same = load_weights(launcher.emitted.plan, launcher.emitted.layout, checkpoint, torch.device("cpu"))
    assert torch.equal(launcher.weights, same)


def test_the_cpu_runs_the_same_plan(folder, capsys):
    assert chat(folder, "--backend", "cpu", "-n", "3") == errors.EXIT_OK
    assert capsys.readouterr().out.strip()


def change(folder, **values):
    path = folder / built.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def damage_cubin(folder):
    (folder / built.CUBIN).write_bytes((folder / built.CUBIN).read_bytes()[:-1])


def damage_plan(folder):
    path = folder / built.PLAN
    path.write_text(path.read_text().replace('"context":256', '"context":255', 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_cubin, "megakernel.cubin is not the kernel that the manifest names, or is cut short"),
        (damage_plan, "plan.json is not the plan that the manifest names"),
        (lambda f: (f / built.CUBIN).unlink(), "megakernel.cubin: No such file or directory"),
        (lambda f: (f / built.MANIFEST).write_text("{"), "manifest.json is no manifest: "),
        (lambda f: change(f, format=0), "is a build of format 0, this mpk-spec reads format 1"),
        (lambda f: change(f, source="0", mpk_spec="0.0.1"), "was built by mpk-spec 0.0.1 from other sources than"),
        (lambda f: (f / built.MANIFEST).write_text('{"format": 1}'), "does not say: config, cubin, mpk_spec, plan"),
    ],
)
def test_a_build_that_does_not_fit_is_refused(folder, damage, message, fake_gpu, capsys):
    damage(folder)
    assert chat(folder) == errors.EXIT_BAD_INPUT
    shown = capsys.readouterr()
    assert message in shown.err and "build it again" in shown.err
    assert shown.out == "" and not fake_gpu.launchers


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["-c", "128"], "was built for a context of 256, 128 was asked for"),
        (["--size", "8b"], "is a build: its plan says what it is"),
        (["--weights", "random:x"], "'random:x' has no seed"),
    ],
)
def test_what_has_no_place_beside_a_build(folder, more, message, fake_gpu, capsys):
    assert chat(folder, *more) == errors.EXIT_BAD_INPUT
    assert message in capsys.readouterr().err


def test_a_build_without_sources_asks_for_weights(folder, capsys):
    assert main(["chat", str(folder), "-p", "Hello"]) == errors.EXIT_BAD_INPUT
    assert "does not say where its weights are" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [("rms_norm_eps", 1e-5, "rms_norm_eps = 1e-06"), ("rope_parameters", {"rope_theta": 1e4}, "rope_parameters = ")],
)
def test_another_model_is_refused_though_its_shapes_fit(folder, key, value, said, fake_gpu, monkeypatch, capsys):
    from mpk_spec.runtime import random_model

    original = random_model.checkpoint_of_plan

    def other(*asked):
        checkpoint = original(*asked)
        checkpoint.config = {**checkpoint.config, key: value}
        return checkpoint

    monkeypatch.setattr(random_model, "checkpoint_of_plan", other)
    assert chat(folder) == errors.EXIT_BAD_INPUT
    assert f"was built for qwen3 tiny with {said}" in capsys.readouterr().err


def test_bench_takes_a_build(folder, capsys):
    ask = ["bench", str(folder), "--weights", "random:0", "--backend", "cpu", "-n", "2", "--repeats", "1", "--json"]
    assert main([*ask, "--prompt-tokens", "4"]) == errors.EXIT_OK
    assert json.loads(capsys.readouterr().out)["model"] == {"spec": "qwen3", "size": "tiny", "weights": "random:0"}
