from __future__ import annotations

from types import SimpleNamespace

import pytest

from mpk_spec.errors import UserError
from mpk_spec.runtime import select

CHECKPOINT = SimpleNamespace(config={"max_position_embeddings": 8192})


@pytest.fixture
def opened(monkeypatch):
    """Records which backend is opened with which context, and opens none."""
    calls = []
    for name in select.OPENERS:
        monkeypatch.setitem(
            select.OPENERS,
            name,
            lambda spec, size, checkpoint, context, progress, tp, n=name: calls.append((n, context)),
        )
    return calls


def test_an_automatic_choice_is_said_in_one_line(opened, capsys, monkeypatch):
    monkeypatch.setattr(select, "choose_backend", lambda *asked: ("cpu", "it rains"))
    select.open_backend(None, None, CHECKPOINT)
    shown = capsys.readouterr()
    assert opened == [("cpu", 4096)]
    assert shown.out == ""
    assert shown.err == "backend: cpu, chosen since it rains (--backend chooses)\n"


def test_without_a_gpu_the_choice_is_the_cpu_and_says_why(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    name, why = select.choose_backend(None, None, CHECKPOINT, 512)
    assert name == "cpu"
    assert why in ("there is no usable NVIDIA GPU here", "this torch is built without CUDA")


def on_gpu(monkeypatch, spec: str, **properties) -> tuple[str, str]:
    """What is chosen for a spec's tiny size where torch shows such a GPU."""
    from mpk_spec.planner import size_config
    from mpk_spec.schema import load_spec

    loaded = load_spec(spec)
    checkpoint = SimpleNamespace(config=size_config(loaded, "tiny"), architecture=loaded.model.architectures[0])
    gpu = SimpleNamespace(**properties)
    monkeypatch.setattr("mpk_spec.runtime.cuda_device.find_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: gpu)
    monkeypatch.setattr("mpk_spec.emit.compiler.nvrtc_version", lambda: "13.0")
    return select.choose_backend(loaded, "tiny", checkpoint, 256)


H100 = {"name": "NVIDIA H100 80GB HBM3", "major": 9, "minor": 0, "multi_processor_count": 132}
A100 = {"name": "NVIDIA A100-SXM4-80GB", "major": 8, "minor": 0, "multi_processor_count": 108}


@pytest.mark.parametrize(("spec", "choice"), [("qwen3", "cuda"), ("gemma3", "cpu")])
def test_with_a_gpu_the_choice_is_the_kernel_if_it_can_run_the_model(monkeypatch, spec, choice):
    name, why = on_gpu(monkeypatch, spec, **H100)
    assert name == choice, why
    assert choice == "cuda" or "the CUDA kernel cannot" in why


def test_nobody_gets_a_kernel_that_was_never_run_on_such_a_gpu_without_asking(monkeypatch):
    assert on_gpu(monkeypatch, "qwen3", **A100) == (
        "cpu", "the kernel was never run on sm_80; '--backend cuda' tries it, 'compare' judges it"
    )  # fmt: skip


def test_a_choice_of_the_person_is_not_repeated(opened, capsys):
    select.open_backend(None, None, CHECKPOINT, "torch", 100)
    assert opened == [("torch", 100)]
    assert capsys.readouterr().err == ""


def test_the_default_context_is_never_more_than_the_model_was_made_for(opened):
    small = SimpleNamespace(config={"max_position_embeddings": 512})
    select.open_backend(None, None, small, "cpu")
    assert opened == [("cpu", 512)]


@pytest.mark.parametrize(
    ("backend", "context", "message"),
    [
        ("gpu", None, "there is no backend 'gpu'\n  hint: did you mean 'cpu'?"),
        ("cpu", 9000, "a context of 9000 is more than the 8192 positions that this model was made for"),
    ],
)
def test_wrong_choices_are_refused(backend, context, message):
    with pytest.raises(UserError) as error:
        select.open_backend(None, None, CHECKPOINT, backend, context)
    assert str(error.value) == message


def test_cuda_without_a_gpu_says_what_works_instead(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError) as error:
        select.open_backend(None, None, CHECKPOINT, "cuda")
    assert error.value.hint.endswith("--backend cpu runs the same plan on the CPU")


@pytest.mark.parametrize(
    ("span", "chunk", "alone", "cut"),
    [
        ((0, 40), 16, 0, [(0, 16), (16, 32), (32, 40)]),
        ((8, 40), 16, 3, [(8, 24), (24, 37), (37, 38), (38, 39), (39, 40)]),
        ((5, 8), 16, 9, [(5, 6), (6, 7), (7, 8)]),
        ((4, 4), 16, 0, []),
    ],
)
def test_positions_are_cut_into_chunks_and_single_steps(span, chunk, alone, cut):
    from mpk_spec.runtime.backend import pieces

    assert pieces(*span, chunk, alone) == cut


@pytest.mark.parametrize(
    ("tp", "said"), [(1, "cpu reference, 4 stages"), (2, "cpu reference, 2 ranks in one process, ")]
)
def test_the_cpu_says_how_many_ranks_it_runs(tp, said):
    from mpk_spec.runtime.random_model import random_checkpoint
    from mpk_spec.schema import load_spec

    spec = load_spec("qwen3")
    opened = select.open_backend(spec, "tiny", random_checkpoint(spec, "tiny", 0), "cpu", 64, tp=tp)
    assert opened.description.startswith(said)
