from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest

from mpk_spec import errors
from mpk_spec.cli import measure
from mpk_spec.cli.main import main


class Steady:
    """Gives a token every `step` seconds."""

    vocab_size = 50

    def __init__(self, step: float):
        self.step, self.prompts, self.description = step, [], f"steady, {step} s"

    def reset(self) -> None:
        self.prompts.append(None)

    def stream(self, ids, *, max_new_tokens):
        self.prompts[-1] = list(ids)
        for _ in range(max_new_tokens):
            time.sleep(self.step)
            yield 1

    def close(self) -> None:
        self.prompts.append("closed")


def test_one_run_times_the_first_token_apart():
    backend = Steady(0.002)
    run = measure.once(backend, prompt_tokens=10, new_tokens=5)
    assert run.tokens == 5
    assert 0.002 <= run.first_s < run.total_s
    assert run.ms_per_token == pytest.approx((run.total_s - run.first_s) / 4 * 1e3)
    assert len(backend.prompts[0]) == 10
    assert all(0 <= token < 50 for token in backend.prompts[0])


def test_backends_take_turns_and_the_first_round_does_not_count():
    order = []
    backends = {"a": Steady(0), "b": Steady(0)}
    for name, backend in backends.items():
        backend.reset = lambda n=name, b=backend: (order.append(n), Steady.reset(b))
    runs = measure.take_turns(backends, 3, 4, repeats=2, progress=lambda *stage: None)
    assert order == ["a", "b"] * 3
    assert {name: len(done) for name, done in runs.items()} == {"a": 2, "b": 2}


def test_the_summary_is_the_median():
    runs = [measure.Run(1.0, 1.0 + seconds, 11) for seconds in (0.1, 0.2, 0.9)]
    found = measure.summary(runs)
    assert found["ms_per_token"] == pytest.approx(20)
    assert (found["ms_per_token_min"], found["ms_per_token_max"]) == pytest.approx((10, 90))
    assert found["tokens_per_s"] == pytest.approx(50)


def test_a_folder_that_cannot_be_made_is_said_before_anything_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("mpk_spec.cli.target.open_target", lambda *arguments, **options: pytest.fail("it ran"))
    (tmp_path / "file").touch()
    assert main(["bench", "smollm2", "--backend", "cpu", "-o", str(tmp_path / "file")]) == errors.EXIT_BAD_INPUT
    assert f"cannot write {tmp_path / 'file'}: File exists" in capsys.readouterr().err


def test_the_command_prints_a_table_and_writes_both_files(monkeypatch, tmp_path, capsys):
    target = SimpleNamespace(
        spec=None, name="smollm2", size="135m", checkpoint=SimpleNamespace(source="./made"), build=None
    )
    monkeypatch.setattr("mpk_spec.cli.target.open_target", lambda *arguments, **options: target)
    steps = {"cpu": 0.001, "torch": 0.002}
    monkeypatch.setattr(
        "mpk_spec.runtime.select.open_backend", lambda spec, size, checkpoint, name, *rest, **more: Steady(steps[name])
    )
    out = tmp_path / "results"
    assert main(["bench", "smollm2", "-n", "4", "--repeats", "1", "--prompt-tokens", "3", "-o", str(out)]) == 0
    page = capsys.readouterr().out
    assert page == (out / "smollm2-135m.md").read_text()
    assert page.startswith("# smollm2 135m\n")
    assert "cpu does " in page
    data = json.loads((out / "smollm2-135m.json").read_text())
    assert data["backends"]["cpu"]["tokens_per_s"] > data["backends"]["torch"]["tokens_per_s"]
    assert main(["bench", "smollm2", "-n", "4", "--repeats", "1", "--json", "--backend", "cpu"]) == errors.EXIT_OK
    assert list(json.loads(capsys.readouterr().out)["backends"]) == ["cpu"]
