"""benchmarks/ablations.py: each fusion against none, and that a variant which is refused or wrong is said."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from mpk_spec.emit.source import emit
from mpk_spec.runtime.cuda_device import NoGpu


@pytest.fixture
def ablations(load_script):
    return load_script("ablations")


def run(ablations, monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ablations.py", *words])
    return ablations.main()


@pytest.fixture
def measured(ablations, monkeypatch):
    """Backends of plans that the kernel takes, whose logits say which fusions are gone."""
    from mpk_spec.perf import clock

    def open_random(plan, defines=()):
        emit(plan)
        groups = [g for t in plan.steps["decode"].templates for g in t.groups]
        found = 1 + 0.001 * sum(g.task != "linear" for g in groups)
        logits = torch.tensor([[1.0, found]])
        backend = SimpleNamespace(vocab_size=515, logits=lambda ids, alone: logits, close=lambda: None, groups=groups)
        return backend, None

    monkeypatch.setattr(ablations.random_kernel, "open_random", open_random)
    monkeypatch.setattr(clock, "time_decode", lambda backend, *_: SimpleNamespace(kernel_ms=0.01 * len(backend.groups)))
    return ablations


def test_each_fusion_is_left_out_once(measured, monkeypatch, capsys):
    assert run(measured, monkeypatch, "qwen3:tiny", "--fusions", "--target", "h100") == 0
    table = capsys.readouterr().out.partition("\n\n")[2].splitlines()[2:]
    rows = {cells[2].strip(): cells[3:6] for cells in (line.split("|") for line in table)}
    assert list(rows) == [
        "as planned", "as planned, but values by event", "without embed", "without qkv and embed", "without attend",
        "without attend, but for attention.cache and attention.a", "without o_add", "without gate_up",
        "without down_add", "without head", "without all, but for the cache",
    ]  # fmt: skip
    assert [c.strip() for c in rows["as planned"]] == ["0.1200", "+0.0%", "same"]
    assert rows["without attend"][0].strip() == "refused"
    assert (
        rows["without attend"][2]
        .strip()
        .endswith("the CUDA kernel has one task for 'attention.cache' and 'attention.a'")
    )
    assert [c.strip() for c in rows["without o_add"]] == ["0.1400", "+16.7%", "by 2.0e-03"]
    assert sum(c[0].strip() == "refused" for c in rows.values()) == 1


def test_queues_are_compared_with_claim_pools(measured, monkeypatch, capsys):
    seen, open_random = [], measured.random_kernel.open_random

    def opened(plan, **how):
        layer = plan.steps["decode"].templates[1].groups
        seen.append((plan.crossing, *((g.name, len(g.tasks)) for g in layer if g.launch == "dynamic")))
        return open_random(plan)

    monkeypatch.setattr(measured.random_kernel, "open_random", opened)
    assert run(measured, monkeypatch, "qwen3:tiny", "--pools", "--target", "h100:8") == 0
    layer = [("qkv", 8), ("o_add", 8), ("gate_up", 8), ("down_add", 8)]
    finer = [("qkv", 16), ("o_add", 12), ("gate_up", 16), ("down_add", 12)]
    assert seen == [
        ("data",), ("event",),
        ("event", layer[2]), ("event",), ("event", finer[2]),
        ("event", *layer), ("event",), ("event", *finer),
    ]  # fmt: skip
    table = capsys.readouterr().out.partition("\n\n")[2].splitlines()[2:]
    assert [line.split("|")[2].strip() for line in table][4] == "gate_up in up to 16 tasks, claimed"
    assert all(line.split("|")[5].strip() == "same" for line in table)


def test_other_bits_are_wrong_with_all_fusions_and_far_ones_without(ablations):
    planned = torch.tensor([[1.0, -2.0]])
    lever, unfused = ablations.LEVERS[1], ablations.Variant("", without=("o_add",))
    assert ablations.compared(lever, planned.clone(), planned) == ("same", False)
    assert ablations.compared(lever, planned + 0.01, planned)[1]
    assert not ablations.compared(unfused, planned + 0.01, planned)[1]
    assert ablations.compared(unfused, planned + 0.3, planned)[1]
    assert ablations.compared(unfused, planned * float("nan"), planned)[1]


def test_all_variants_are_compiled_without_a_gpu(ablations, monkeypatch, capsys):
    seen = []
    report = SimpleNamespace(registers=168, spill_bytes=0, seconds=5.5)

    def compiled(plan, defines):
        seen.append((plan.target, plan.crossing, plan.in_flight_bytes, plan.prefetch_bytes))
        return SimpleNamespace(report=report, cached=False)

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(ablations.random_kernel, "compiled", compiled)
    assert run(ablations, monkeypatch, "qwen3:tiny", "--compile") == 0
    assert seen == [
        ("h100", "data", 49152, 131072), ("h100", "event", 49152, 131072), ("h100", "data", 49152, 0),
        ("h100", "data", 32768, 131072), ("h100", "data", 49152, 131072), ("h100", "data", 3 * 4096, 131072),
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert "qwen3:tiny, 32 KiB of copies in flight for each SM: 168 registers" in said
    assert "| model |" not in said


def test_what_is_measured_needs_a_gpu(ablations, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(NoGpu):
        run(ablations, monkeypatch, "qwen3:tiny")


def test_variants_of_ones_own_have_rules_and_macros(measured, monkeypatch, capsys):
    seen, open_random = [], measured.random_kernel.open_random

    def opened(plan, **how):
        seen.append((plan.in_flight_bytes, plan.prefetch_bytes, how["defines"]))
        return open_random(plan)

    monkeypatch.setattr(measured.random_kernel, "open_random", opened)
    variants = ["--variant", "narrow:in_flight=8192,prefetch=0", "--variant", "mine:MPK_MINE=1,in_flight=8192"]
    assert run(measured, monkeypatch, "qwen3:tiny", "--target", "h100", *variants) == 0
    (usual, prefetch, none), *others = seen
    assert none == () and prefetch > 0 and usual > 8192
    assert others == [(8192, 0, ()), (8192, prefetch, ("MPK_MINE=1",))]
    assert "| qwen3:tiny | narrow |" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["narrow", ":in_flight=1", "narrow:"])
def test_a_variant_that_is_none(ablations, monkeypatch, capsys, text):
    with pytest.raises(SystemExit):
        run(ablations, monkeypatch, "qwen3:tiny", "--variant", text)
    assert f"'{text}' is no NAME:KEY=VALUE,..." in capsys.readouterr().err
