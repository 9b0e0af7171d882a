"""A folder that `build` made, run elsewhere: no compiler, every mismatch one message."""

from __future__ import annotations

import json
import shutil

import pytest

from mpk_spec import errors
from mpk_spec.cli.main import main
from mpk_spec.runtime import built


def build(folder, *more):
    """The tiny Qwen3."""
    pytest.importorskip("cuda.core", reason="needs cuda-core and NVRTC: pip install mpk-spec[cuda]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPK_SPEC_CACHE", str(folder.parent / "cache"))
        assert main(["build", "qwen3", "--size", "tiny", "-c", "256", "-o", str(folder), *more]) == errors.EXIT_OK
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Built once for all tests of this file."""
    return build(tmp_path_factory.mktemp("built") / "tiny")


@pytest.fixture(scope="module")
def original_for_two(tmp_path_factory):
    return build(tmp_path_factory.mktemp("built") / "tiny-tp2", "--tp", "2")


@pytest.fixture
def folder(original, tmp_path, no_compiler):
    """A copy elsewhere, where nothing can compile."""
    return shutil.copytree(original, tmp_path / "elsewhere")


@pytest.fixture
def folder_for_two(original_for_two, tmp_path, no_compiler):
    return shutil.copytree(original_for_two, tmp_path / "elsewhere")


@pytest.fixture
def no_compiler(monkeypatch):
    def refuse(*asked, **how):
        raise AssertionError("a build must not be compiled again")

    monkeypatch.setattr("mpk_spec.emit.compiler.compile_kernel", refuse)
    monkeypatch.setattr("mpk_spec.emit.compiler.nvrtc_version", refuse)


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


def test_two_ranks_run_one_kernel_each_on_its_share(folder_for_two, two_fake_gpus, capsys):
    import torch

    from mpk_spec.runtime.cuda_weights import load_weights
    from mpk_spec.runtime.random_model import random_checkpoint
    from mpk_spec.schema import load_spec

    assert json.loads((folder_for_two / built.MANIFEST).read_text())["tp"] == 2
    assert chat(folder_for_two) == errors.EXIT_OK
    assert capsys.readouterr().out == "Hi!\n"
    assert two_fake_gpus.driver.loaded == [(folder_for_two / built.CUBIN).read_bytes()] * 2
    checkpoint, launchers = random_checkpoint(load_spec("qwen3"), "tiny", 0), two_fake_gpus.launchers
    assert len(launchers) == 2 and launchers[0].started[0] == launchers[1].started[0]
    for rank, launcher in enumerate(launchers):
        plan, layout = launcher.emitted.plan, launcher.emitted.layout
        same = load_weights(plan, layout, checkpoint, torch.device("cpu"), rank=rank)
        assert torch.equal(launcher.weights, same)
    assert not torch.equal(launchers[0].weights, launchers[1].weights)


@pytest.mark.parametrize(
    ("built_for", "more", "message"),
    [
        ("two", ["--tp", "1"], "was built for 2 ranks, 1 asked for\n  hint: build it again with --tp 1"),
        ("one", ["--tp", "2"], "was built for one rank, 2 asked for\n  hint: build it again with --tp 2"),
    ],
)
def test_another_degree_than_built_for(built_for, more, message, request, fake_gpu, capsys):
    folder = request.getfixturevalue("folder_for_two" if built_for == "two" else "folder")
    assert chat(folder, *more) == errors.EXIT_BAD_INPUT
    assert message in capsys.readouterr().err


def test_too_few_gpus_for_a_build(folder_for_two, two_fake_gpus, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert chat(folder_for_two) == errors.EXIT_BAD_INPUT
    assert "2 ranks need 2 GPUs, this machine has 1" in capsys.readouterr().err


def test_compare_and_bench_take_a_build_of_two_ranks(folder_for_two, capsys):
    ask = ["compare", str(folder_for_two), "--weights", "random:0", "--backend", "cpu", "--positions", "32"]
    assert main([*ask, "--seeds", "1", "-c", "32", "--json"]) == errors.EXIT_OK
    assert json.loads(capsys.readouterr().out)["passed"]
    ask = ["bench", str(folder_for_two), "--weights", "random:0", "--backend", "cpu", "--backend", "torch"]
    assert main([*ask, "-n", "2", "--repeats", "1", "--json", "--prompt-tokens", "4"]) == errors.EXIT_OK
    assert set(json.loads(capsys.readouterr().out)["backends"]) == {"cpu", "torch"}


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
        (lambda f: (f / built.PLAN).unlink(), "plan.json: No such file or directory"),
        (lambda f: (f / built.PLAN).write_text((f / built.PLAN).read_text()[:1000]), "plan.json is no plan: it is not"),
        (lambda f: (f / built.PLAN).write_text('{"version": 0}'), "plan.json is a plan of version 0, this is mpk-spec"),
        (lambda f: (f / built.PLAN).write_text("[]"), "plan.json is no plan: it has no version"),
        (lambda f: (f / built.MANIFEST).unlink(), "manifest.json: No such file or directory"),
        (lambda f: (f / built.MANIFEST).write_bytes(b"\xff\xfe"), "manifest.json is no manifest: "),
        (lambda f: (f / built.MANIFEST).write_text("{"), "manifest.json is no manifest: "),
        (lambda f: change(f, weights=3, config=[]), "manifest.json is damaged: config, weights"),
        (lambda f: change(f, weights=[3]), "manifest.json is damaged: weights"),
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


def test_compare_judges_a_build(folder, capsys):
    ask = ["compare", str(folder), "--weights", "random:0", "--backend", "cpu", "--positions", "32", "--seeds", "1"]
    assert main([*ask, "-c", "32", "--json"]) == errors.EXIT_OK
    data = json.loads(capsys.readouterr().out)
    assert data["model"].startswith("qwen3 tiny, weights random:0, cpu reference") and data["passed"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--plant", "no-rope"], "a build runs as it was built: no defect can be planted in it"),
        (["--stop-after", "all"], "a build cannot stop after an operator"),
        (["-c", "300"], "a context of 300 is more than the 256 positions that the kernel was built for"),
    ],
)
def test_what_compare_cannot_do_with_a_build(folder, more, message, capsys):
    assert main(["compare", str(folder), "--weights", "random:0", *more]) == errors.EXIT_BAD_INPUT
    assert message in capsys.readouterr().err


def no_gpu(gpu, patch):
    patch.undo()
    patch.setattr("torch.cuda.is_available", lambda: False)
    patch.setattr("torch.version.cuda", "13.0")
    patch.setattr("mpk_spec.runtime.cuda_device.driver_cuda", lambda: None)


def old_driver(gpu, patch):
    no_gpu(gpu, patch)
    patch.setattr("mpk_spec.runtime.cuda_device.driver_cuda", lambda: (12, 2))


def another_process(gpu, patch):
    gpu.free, gpu.reserved = 100 << 20, 0


def small_memory(gpu, patch):
    gpu.free = gpu.total = 256 << 20


def held_alone(gpu, patch):
    def busy():
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nmore lines")

    patch.undo()
    patch.setattr("torch.cuda.is_available", lambda: True)
    patch.setattr("torch.cuda.synchronize", busy)


@pytest.mark.parametrize(
    ("luck", "message"),
    [
        (no_gpu, "there is no usable NVIDIA GPU here\n  hint: --backend cpu"),
        (
            old_driver,
            "the NVIDIA driver is too old: it supports CUDA 12.2, this torch is built for 13.0\n  hint: update",
        ),
        (small_memory, "the GPU has 0.2 of 0.2 GiB free\n  hint: a smaller model would fit"),
        (held_alone, "the GPU cannot be used: CUDA error: CUDA-capable device(s) is/are busy or unavailable\n  hint: "),
        (another_process, "of 85.0 GiB free, other processes hold 84.9\n  hint: end what else uses the GPU"),
        (
            lambda gpu, patch: gpu.driver.attributes.update(COMPUTE_CAPABILITY_MAJOR=10),
            "the plan is for NVIDIA H100 80GB SXM (sm_90a), this GPU is sm_100\n  hint: build it for this GPU",
        ),
        (
            lambda gpu, patch: gpu.driver.attributes.update(MULTIPROCESSOR_COUNT=78),
            "the plan is for 132 SMs, this GPU has 78\n  hint: one block per SM",
        ),
        (
            lambda gpu, patch: gpu.driver.errors.update(cuModuleLoadData="UNSUPPORTED_PTX_VERSION"),
            "the CUDA driver says: words for CUDA_ERROR_UNSUPPORTED_PTX_VERSION\n  hint: the driver is older",
        ),
        (
            lambda gpu, patch: gpu.driver.errors.update(cuInit="NO_DEVICE"),
            "the CUDA driver says: words for CUDA_ERROR_NO_DEVICE\n  hint: no GPU is visible",
        ),
    ],
)
def test_bad_luck_is_one_message_and_exit_code_1(folder, fake_gpu, monkeypatch, capsys, luck, message):
    luck(fake_gpu, monkeypatch)
    assert chat(folder, "--backend", "cuda") == errors.EXIT_BAD_INPUT
    shown = capsys.readouterr()
    assert shown.out == "" and sum(line.startswith("error: ") for line in shown.err.splitlines()) == 1
    assert message in shown.err
    assert not fake_gpu.launchers
