"""benchmarks/ablations.py: each fusion against none, and that a variant which is refused or wrong is said."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from mpk_spec.emit.source import emit
from mpk_spec.errors import UserError

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def ablations(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "kernel", raising=False)
    found = importlib.util.spec_from_file_location("ablations_script", FOLDER / "ablations.py")
    module = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, "ablations_script", module)
    found.loader.exec_module(module)
    yield module
    sys.modules.pop("kernel", None)


def run(ablations, monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ablations.py", *words])
    return ablations.main()


@pytest.fixture
def measured(ablations, monkeypatch):
    """Backends of plans that the kernel takes, whose logits say which fusions are gone."""
    from types import SimpleNamespace

    from mpk_spec.perf import clock

    def open_random(model, asked):
        plan = emit(ablations.kernel.planned(model, asked)).plan
        groups = [g for t in plan.steps["decode"].templates for g in t.groups]
        found = 1 + 0.001 * sum(g.task != "linear" for g in groups)
        logits = torch.tensor([[1.0, found]])
        backend = SimpleNamespace(vocab_size=515, logits=lambda ids, alone: logits, close=lambda: None, groups=groups)
        return backend, None

    monkeypatch.setattr(ablations.kernel, "open_random", open_random)
    monkeypatch.setattr(clock, "time_decode", lambda backend, *_: SimpleNamespace(kernel_ms=0.01 * len(backend.groups)))
    return ablations


def test_each_fusion_is_left_out_once(measured, monkeypatch, capsys):
    assert run(measured, monkeypatch, "qwen3:tiny", "--fusions") == 0
    table = capsys.readouterr().out.partition("\n\n")[2].splitlines()[2:]
    rows = {cells[2].strip(): cells[3:6] for cells in (line.split("|") for line in table)}
    assert list(rows) == [
        "as planned", "as planned, but values by event", "without embed", "without qkv and embed", "without attend",
        "without attend, but for attention.cache and attention.a", "without o_add", "without gate_up",
        "without down_add", "without head", "without all, but for the cache",
    ]  # fmt: skip
    assert [c.strip() for c in rows["as planned"]] == ["0.1200", "+0.0%", "same"]
    assert rows["without attend"][0].strip() == "refused"
    assert rows["without attend"][2].strip() == "the CUDA kernel has one task for 'attention.cache' and 'attention.a'"
    assert [c.strip() for c in rows["without o_add"]] == ["0.1400", "+16.7%", "by 2.0e-03"]
    assert sum(c[0].strip() == "refused" for c in rows.values()) == 1


def test_other_bits_are_wrong_with_all_fusions_and_far_ones_without(ablations):
    planned = torch.tensor([[1.0, -2.0]])
    lever, unfused = ablations.LEVERS[1], ablations.Variant("", without=("o_add",))
    assert ablations.compared(lever, planned.clone(), planned) == ("same", False)
    assert ablations.compared(lever, planned + 0.01, planned)[1]
    assert not ablations.compared(unfused, planned + 0.01, planned)[1]
    assert ablations.compared(unfused, planned + 0.3, planned)[1]
    assert ablations.compared(unfused, planned * float("nan"), planned)[1]


def test_a_fusion_that_there_is_not_is_refused(ablations):
    from mpk_spec.schema import load_spec

    with pytest.raises(UserError) as error:
        ablations.kernel.ruled(load_spec("qwen3"), [], ["o_ad"])
    assert error.value.message == "there is no fusion 'o_ad'"
    assert "o_add" in error.value.hint
