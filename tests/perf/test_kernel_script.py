"""benchmarks/kernel.py: what it refuses, plans, says and writes; the kernel itself needs GPUs."""

from __future__ import annotations

import gzip
import json
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from profiler.synthetic import times_of

from mpk_spec import testing
from mpk_spec.emit.compiler import Compiled, Report
from mpk_spec.errors import SpecError, UserError
from mpk_spec.perf.clock import Times
from mpk_spec.planner.simulate import simulate
from mpk_spec.reference.backend import ReferenceBackend
from mpk_spec.runtime import random_model, select
from mpk_spec.runtime.cuda_device import NoGpu
from mpk_spec.schema import load_spec
from mpk_spec.testing.yardstick import Yardstick, sequences

COMPILED = Compiled(b"cubin", Report("sm_90a", "NVRTC", 168, 0, 5.5), Path("folder"), False)


@pytest.fixture
def script(load_script):
    return load_script("kernel")


@pytest.fixture
def parsed(script, monkeypatch):
    def parse(*words: str):
        monkeypatch.setattr(sys, "argv", ["kernel.py", *words])
        return script.arguments()

    return parse


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture
def gpus(script, monkeypatch):
    """Two H200s, as far as is asked before a kernel is opened."""
    monkeypatch.setattr(script, "need_gpus", lambda count: None)
    monkeypatch.setattr(select, "target_here", lambda: (SimpleNamespace(name="h200"), None))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda number: "NVIDIA H200")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trace", "qwen3:tiny", "--layer", "1"], "--layer says what the --output of a trace is to hold"),
        (["time", "qwen3:tiny", "--output", "t.json"], "--output is for one trace"),
        (["trace", "qwen3:tiny", "--tp", "1", "2", "--output", "t.json"], "--output is for one trace"),
        (["trace", "qwen3:tiny", "qwen3:8b", "--output", "t.json"], "--output is for one trace"),
        (["check", "qwen3:tiny", "--ceiling"], "--ceiling is what a time is a part of"),
        (["time", "qwen3:tiny", "--tp", "9"], "argument --tp: invalid choice: 9"),
        (["time"], "the following arguments are required: SPEC:SIZE"),
    ],
)
def test_a_command_line_that_says_nothing_is_refused(parsed, capsys, words, says):
    with pytest.raises(SystemExit, match="2"):
        parsed(*words)
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "says", "hint"),
    [
        ("qwen3", "'qwen3' names no size of 'qwen3'", "qwen3:SIZE, one of tiny, 0.6b"),
        ("qwen3:0.6", "'qwen3:0.6' names no size of 'qwen3'", "did you mean '0.6b'?"),
        ("qwen", "there is no spec named 'qwen'", "did you mean 'qwen3'?"),
    ],
)
def test_a_model_that_there_is_not_is_refused_before_another_is_measured(script, parsed, model, says, hint):
    with pytest.raises(UserError) as error:
        script.run(parsed("time", "qwen3:tiny", model))
    assert error.value.message == says
    assert hint in error.value.hint


@pytest.mark.parametrize("tp", [1, 2])
def test_rules_and_fusions_reach_the_plan_at_every_degree(script, parsed, tp):
    words = ["--rule", "in_flight=32768", "--rule", "crossing=event", "--without", "o_add", "--tp", str(tp)]
    ((model, changed),) = script.plans(parsed("compile", "qwen3:tiny", "--target", "h100", *words))
    ((_, plain),) = script.plans(parsed("compile", "qwen3:tiny", "--target", "h100", "--tp", str(tp)))
    assert (model, changed.tp, plain.tp) == ("qwen3:tiny", tp, tp)
    assert (changed.crossing, plain.crossing) == ("event", "data")
    assert (changed.in_flight_bytes, plain.in_flight_bytes) == (32768, 49152)
    groups = [{g.name for t in p.steps["decode"].templates for g in t.groups} for p in (changed, plain)]
    assert "o_add" in groups[1] - groups[0]


def test_the_cache_has_room_for_what_is_timed(script, parsed):
    words = ["compile", "qwen3:0.6b", "--target", "h100", "--prompt", "4096", "--new", "32"]
    ((_, plan),) = script.plans(parsed(*words))
    assert plan.context == 4128


def test_it_compiles_each_degree_once_without_a_gpu(script, parsed, no_gpu, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("mpk_spec.emit.compiler.compile_kernel", lambda *asked: seen.append(asked) or COMPILED)
    assert script.run(parsed("compile", "qwen3:tiny", "--tp", "2", "1", "2")) == 0
    assert [(name, arch, defines) for name, _, arch, defines, _ in seen] == [("qwen3-tiny", "sm_90a", ())] * 2
    assert seen[0][1] != seen[1][1]
    said = capsys.readouterr().out
    assert "qwen3:tiny, tp 1, h100: planning" in said
    assert "qwen3:tiny, tp 2, h100: planning" in said
    assert said.count("168 registers, 0 bytes spilled, compiled in 5.5 s") == 2


@pytest.mark.parametrize("what", ["check", "time", "trace"])
def test_what_runs_the_kernel_needs_a_gpu(script, parsed, no_gpu, what):
    parsed(what, "qwen3:tiny", "--target", "h100")
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code.startswith("error: ")
    assert end.value.code.endswith("this measures the kernel: it needs a GPU")


def test_too_few_gpus_are_said_before_any_is_used(script, parsed, monkeypatch):
    monkeypatch.setattr("mpk_spec.runtime.cuda_device.find_device", lambda: None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(NoGpu, match="4 ranks need 4 GPUs, this machine has 1"):
        script.run(parsed("time", "qwen3:tiny", "--tp", "1", "4"))


@pytest.mark.parametrize(
    ("words", "limit"),
    [
        (["time", "qwen3:tiny"], None), (["time", "qwen3:tiny", "--tp", "1", "2"], 120.0),
        (["compile", "qwen3:tiny", "--tp", "2"], None), (["check", "qwen3:tiny", "--limit", "7"], 7.0),
    ],
)  # fmt: skip
def test_ranks_that_wait_for_ever_are_shown_and_ended(script, parsed, monkeypatch, words, limit):
    calls = []
    later = "faulthandler.dump_traceback_later"
    monkeypatch.setattr(later, lambda seconds, exit: calls.append(seconds if exit else "no end"))
    monkeypatch.setattr(script, "run", lambda options: 0)
    parsed(*words)
    assert script.main() == 0
    assert calls == ([limit] if limit else [])


def test_several_degrees_make_a_table_with_what_they_gain(script, parsed, gpus, monkeypatch, capsys):
    times = {1: Times(0.4, 0.39, 0.41, 0.42, 0.05, 64, 5), 2: Times(0.25, 0.24, 0.26, 0.27, 0.06, 64, 5)}
    monkeypatch.setattr(script, "measured_ceiling", lambda target: {"h200": 4000.0}[target])
    monkeypatch.setattr(script, "measure", lambda plan, options: (times[plan.tp], 0.8 / plan.tp))
    words = ["time", "qwen3:tiny", "--tp", "2", "1", "--ceiling", "--rule", "crossing=event", "--without", "head"]
    assert script.run(parsed(*words)) == 0
    said, _, table = capsys.readouterr().out.partition("\n\n")
    assert table.splitlines() == [
        "NVIDIA H200 (h200), batch 1, 128 positions in the cache, crossing=event, without head",
        "qwen3:tiny, tp 1: 0.4000 ms/token (0.3900 to 0.4100), 0.800 GB, 2000 GB/s, 50.0 % of the ceiling; "
        "as a user sees it 0.4200 ms, a launch costs 0.050 ms",
        "qwen3:tiny, tp 2: 0.2500 ms/token (0.2400 to 0.2600), 1.60 times tp 1, 0.400 GB, 1600 GB/s a rank, "
        "40.0 % of the ceiling; as a user sees it 0.2700 ms, a launch costs 0.060 ms",
    ]
    assert all(line in said for line in table.splitlines())  # each at once


def test_a_degree_that_a_model_does_not_divide_by_is_said_before_another_is_measured(script, parsed, gpus, monkeypatch):
    monkeypatch.setattr(script, "measure", lambda *asked: pytest.fail("measured"))
    with pytest.raises(SpecError, match="9 heads do not divide over 2 ranks"):
        script.run(parsed("time", "qwen3:tiny", "smollm2:135m", "--tp", "1", "2"))


def test_without_one_gpu_nothing_is_said_of_a_gain(script):
    times = Times(0.25, 0.24, 0.26, 0.27, 0.06, 64, 5)
    rows = [script.Row("a", 1, times, 1.0), script.Row("b", 2, times, 1.0)]
    assert "times tp 1" not in "".join(script.lines(rows, None))


class Referred(ReferenceBackend):
    """A plan on the CPU in the place of its kernel on GPUs; `wrong` is what it gets wrong."""

    def __init__(self, plan, checkpoint, wrong: str = ""):
        super().__init__(plan, checkpoint)
        self.wrong, self.calls, self.ranks = wrong, 0, self

    def logits(self, ids, *, last=None, alone=0):
        self.calls += 1
        found = super().logits(ids)  # on the CPU a token alone has not the bits that it has in a chunk
        off = {"nan": float("nan"), "twice": 1e-6 * self.calls, "alone": 1e-6 * alone, "all": 9.0 * torch.randn(515)}
        return found + off.get(self.wrong, 0.0)

    def stream(self, ids, *, max_new_tokens, stop=frozenset()):
        self.calls += 1
        for token in super().stream(ids, max_new_tokens=max_new_tokens, stop=stop):
            yield token ^ (self.wrong == "answer") ^ (self.wrong == "answers" and self.calls % 2)

    def call(self, method: str, name: str, tokens: int) -> list[torch.Tensor]:
        assert method == "value"
        values = [rank.buffers[name][:tokens].clone() for rank in self.executor.ranks]
        values[-1] += self.wrong == name
        return values


@cache
def truth():
    """Hugging Face on the ids of a check, run once for all tests."""
    checkpoint = random_model.random_checkpoint(load_spec("qwen3"), "tiny", 0)
    return Yardstick(checkpoint, sequences(515, 48, 1, 48))


@pytest.fixture
def checked(script, parsed, monkeypatch, capsys):
    """Whether `check` finds all well, and what it says."""
    monkeypatch.setattr(script, "ANSWER", 10)

    def yardstick(checkpoint, ids):
        assert ids == truth().ids
        return truth()

    monkeypatch.setattr(testing.yardstick, "Yardstick", yardstick)

    def checked(tp: int, wrong: str = "") -> tuple[bool, list[str]]:
        options = parsed("check", "qwen3:tiny", "--tp", str(tp), "--target", "h100", "--prompt", "48")
        ((_, plan),) = script.plans(options)
        checkpoint = random_model.checkpoint_of_plan(plan, 0)
        monkeypatch.setattr(script, "open_random", lambda *asked: (Referred(plan, checkpoint, wrong), checkpoint))
        right = script.check(plan, options)
        return right, [line.partition("s] ")[2] for line in capsys.readouterr().out.splitlines()]

    return checked


@pytest.mark.parametrize("tp", [1, 2])
def test_a_check_says_each_step_and_then_whether_it_is_right(checked, tp):
    right, said = checked(tp)
    assert right
    steps = [line for line in said if not line.startswith("  ")]
    assert steps == [
        f"qwen3:tiny, tp {tp}, h100: planning",
        *(f"logits of {count} tokens beside the plan's on the CPU" for count in (1, 16, 40)),
        "logits of 48 tokens, twice", "the last 40 of them token by token",
        *(f"'{name}' of all ranks" for name in ("y", "next_ids") if tp > 1), "an answer of 10 tokens, twice",
        "logits of question and answer", "Hugging Face in float32 and in bf16", "passed: yes",
    ]  # fmt: skip
    assert not any(line.endswith("NO") for line in said)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ("twice", "  the same bits twice: NO"), ("answer", "  they say the same 10 tokens: NO"),
        ("answers", "  the same tokens twice: NO"), ("y", "  the same bits: NO"), ("next_ids", "  the same bits: NO"),
        ("nan", "  all finite, but for 24720: NO"), ("all", "  near enough, over 48 positions: NO"),
    ],
)  # fmt: skip
def test_what_is_wrong_fails_the_check(script, checked, monkeypatch, wrong, line):
    monkeypatch.setattr(script, "SMALL", 0)
    right, said = checked(2, wrong)
    assert not right
    assert line in said
    assert said[-1] == "passed: NO"
    assert not any("on the CPU" in one for one in said)  # which is for small models


def test_a_token_alone_with_other_bits_fails_the_check(checked):
    right, said = checked(1, "alone")
    assert not right
    assert [line for line in said if line.endswith("apart: NO")]


def test_one_check_that_fails_fails_the_program(script, parsed, gpus, monkeypatch):
    monkeypatch.setattr(script, "check", lambda plan, options: plan.tp == 1)
    assert script.run(parsed("check", "qwen3:tiny")) == 0
    assert script.run(parsed("check", "qwen3:tiny", "--tp", "1", "2")) == 1


def test_the_bytes_of_a_row_are_a_ranks(script, parsed, monkeypatch):
    seen = []

    def time_decode(*asked):
        seen.append(asked[1:])

    monkeypatch.setattr("mpk_spec.perf.clock.time_decode", time_decode)
    monkeypatch.setattr(script, "open_random", lambda *asked: (SimpleNamespace(close=lambda: None), None))
    options = parsed("time", "qwen3:tiny", "--tp", "1", "2", "--target", "h100", "--new", "32", "--repeats", "3")
    one, two = (script.measure(plan, options)[1] for _, plan in script.plans(options))
    assert seen == [(128, 32, 3)] * 2
    assert 0.5 <= two / one < 0.51  # norms are whole on both


@pytest.mark.parametrize("tp", [1, 2])
def test_one_layer_of_all_ranks_is_written(script, parsed, monkeypatch, tmp_path, capsys, tp):
    trace = tmp_path / "layer.json.gz"
    words = ["--tp", str(tp), "--target", "h100", "--layer", "1", "--output", str(trace)]
    options = parsed("trace", "qwen3:tiny", *words)
    ((_, plan),) = script.plans(options)
    simulation = simulate(plan, context=128)
    backend = SimpleNamespace(plan=plan, emitted=SimpleNamespace(step=simulation.step), close=lambda: None)
    monkeypatch.setattr(script, "open_random", lambda *asked: (backend, None))
    raw = [(times_of(simulation, tick_ns=1, seed=rank), None) for rank in range(tp)]
    monkeypatch.setattr("mpk_spec.profiler.run.record", lambda *asked: raw)
    script.trace(plan, options)
    said = capsys.readouterr().out
    assert "critical path of a token" in said
    assert ("the sums of a layer together" in said) == (tp > 1)
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    tasks = [e for e in events if e.get("cat") == "task"]
    assert {(e["pid"], e["args"]["layer"]) for e in tasks} >= {(2 * rank, 1) for rank in range(tp)}
    assert {e["args"]["step"] for e in tasks} == {1}


def test_a_layer_that_there_is_not_is_said_before_the_kernel_is_opened(script, parsed, monkeypatch, tmp_path):
    options = parsed(
        "trace", "qwen3:tiny", "--target", "h100", "--layer", "3", "--output", str(tmp_path / "trace.json")
    )
    ((_, plan),) = script.plans(options)
    monkeypatch.setattr(script, "open_random", lambda *asked: pytest.fail("opened"))
    with pytest.raises(UserError, match="has no layer 3"):
        script.trace(plan, options)


def test_a_place_that_cannot_be_written_is_said_first(script, parsed, tmp_path):
    options = parsed("trace", "qwen3:tiny", "--output", str(tmp_path / "nowhere" / "trace.json"))
    with pytest.raises(UserError, match="cannot write"):
        script.run(options)
