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
            select.OPENERS, name, lambda spec, size, checkpoint, context, progress, n=name: calls.append((n, context))
        )
    return calls


def test_an_automatic_choice_is_said_in_one_line(opened, capsys):
    select.open_backend(None, None, CHECKPOINT)
    shown = capsys.readouterr()
    assert opened == [("cpu", 4096)]
    assert shown.out == ""
    assert shown.err == "backend: cpu, chosen since this version has no CUDA kernel yet (--backend chooses)\n"


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


def test_cuda_says_what_works_instead():
    with pytest.raises(UserError, match="the CUDA kernel is not available in this version of mpk-spec"):
        select.open_backend(None, None, CHECKPOINT, "cuda")
