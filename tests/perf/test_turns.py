"""Backends that answer in turn: what is timed, and what is made of it."""

from __future__ import annotations

import pytest
from steady import Steady

from mpk_spec.perf import turns


def test_one_run_times_the_first_token_apart():
    backend = Steady(0.002)
    run = turns.once(backend, prompt_tokens=10, new_tokens=5)
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
    runs = turns.take_turns(backends, 3, 4, repeats=2, progress=lambda *stage: None)
    assert order == ["a", "b"] * 3
    assert {name: len(done) for name, done in runs.items()} == {"a": 2, "b": 2}


def test_the_summary_is_the_median():
    runs = [turns.Run(1.0, 1.0 + seconds, 11) for seconds in (0.1, 0.2, 0.9)]
    found = turns.summary(runs)
    assert found["ms_per_token"] == pytest.approx(20)
    assert (found["ms_per_token_min"], found["ms_per_token_max"]) == pytest.approx((10, 90))
    assert found["tokens_per_s"] == pytest.approx(50)
