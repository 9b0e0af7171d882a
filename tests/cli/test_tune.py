"""`mpk-spec tune` on a machine whose GPU is a formula: what is printed, written, refused, and how it ends."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
from profiler.synthetic import times_of

from mpk_spec import errors
from mpk_spec.cli.calibrate import Measured, fit_constants
from mpk_spec.cli.main import main
from mpk_spec.cli.search import planner
from mpk_spec.errors import MpkSpecError
from mpk_spec.planner import plan
from mpk_spec.planner.cost import calibration_file, cost_model, read_calibration
from mpk_spec.planner.plan import Plan
from mpk_spec.planner.simulate import simulate
from mpk_spec.planner.targets import find_target
from mpk_spec.profiler.clock import common_clock
from mpk_spec.schema import load_spec
from mpk_spec.tuner import gpu
from mpk_spec.tuner.journal import Measurement

ASK = ["tune", "qwen3", "--size", "tiny", "--weights", "random:0"]
PLANNED: dict[tuple, Plan | MpkSpecError] = {}  # by all tests here, which ask for the same ones


def remembering(target, cache):
    """`planner`, which plans nothing twice."""
    plan_anew = planner(target, cache)

    def planned(rules):
        key = target.spec.path, target.size, str(target.checkpoint.source), cache, json.dumps(rules)
        if key not in PLANNED:
            try:
                PLANNED[key] = plan_anew(rules)
            except MpkSpecError as error:
                PLANNED[key] = error
        if isinstance(PLANNED[key], MpkSpecError):
            raise PLANNED[key]
        return PLANNED[key]

    return planned


@pytest.fixture
def machine(monkeypatch):
    """An H100 on which a token takes 5 ms, less with more prefetch; `wrong` is a number of bytes in flight."""
    state = SimpleNamespace(measured=[], wrong=0, gain=0.1)

    def ms(made):
        return 5.0 - state.gain * made.prefetch_bytes / 262144

    def measure(self, made):
        state.measured.append((made.context, self.context, self.tokens))
        right = made.in_flight_bytes != state.wrong
        return Measurement(ms(made), ms(made), ms(made), right, "same bits" if right else "logits differ by 3")

    monkeypatch.setattr("mpk_spec.cli.search.planner", remembering)
    found = SimpleNamespace(name="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("mpk_spec.runtime.select.target_here", lambda: (find_target("h100"), found))
    monkeypatch.setattr(gpu.GpuMeasurer, "measure", measure)
    monkeypatch.setattr(gpu.GpuMeasurer, "prepare", lambda self, plans: None)
    monkeypatch.setattr(gpu.GpuMeasurer, "in_turn", lambda self, plans, n: [tuple(map(ms, plans))] * n)
    return state


def test_it_prints_a_table_the_best_and_its_rules(machine, capsys):
    assert main(ASK) == errors.EXIT_OK
    shown = capsys.readouterr()
    table, said, rules = shown.out.split("\n\n")
    assert table.splitlines()[2].split() == ["prefetch", "262144", "4.9000", "-1.01%", "same", "bits"]
    assert "refused: a context of 512 has 8 blocks of 64, got 12 splits" in table
    assert said == (
        "best: prefetch 262144: 4.9000 ms per token at context 128, 4.9500 without, 0.0500 (+-0.0000) or 1.01% less"
    )
    assert rules.splitlines() == [
        "schedule:",
        "  - when: {target: h100, size: tiny, tp: 1, batch: 1}",
        "    set:",
        '      "*": {prefetch: 262144}',
    ]
    assert set(machine.measured) == {(512, 128, 48)}
    assert "without rules: as planned: 4.9500 ms, same bits" in shown.err and "measurements: " in shown.err
    count = len(machine.measured)
    assert main(ASK) == errors.EXIT_OK and len(machine.measured) == count  # all known
    assert capsys.readouterr().out == shown.out


def test_a_file_that_extends_the_spec(machine, capsys, tmp_path):
    path = tmp_path / "tuned.yaml"
    assert main([*ASK, "-o", str(path), "-c", "200"]) == errors.EXIT_OK
    assert capsys.readouterr().out.endswith(f"the rules are in {path}\n")
    assert path.read_text().startswith("# On NVIDIA H100 80GB HBM3: 4.9000 ms per token at context 200, 4.9500 without")
    asked = {"size": "tiny", "target": "h100", "context": 512}
    assert plan(load_spec(path), **asked).prefetch_bytes == 262144
    assert main(["validate", str(path)]) == errors.EXIT_OK


def test_what_is_within_the_noise_is_not_recommended(machine, monkeypatch, capsys, tmp_path):
    noisy = [(5.0, 4.9 + 0.3 * (-1) ** n) for n in range(6)]
    monkeypatch.setattr(gpu.GpuMeasurer, "in_turn", lambda self, plans, n: noisy)
    path = tmp_path / "tuned.yaml"
    assert main([*ASK, "-o", str(path)]) == errors.EXIT_OK
    shown = capsys.readouterr().out
    assert (
        f"within the noise, so it is not recommended and {path} is not written" in shown
        and "schedule:" not in shown
        and not path.exists()
    )


def test_what_is_slower_in_turn_is_said_so(machine, monkeypatch, capsys):
    monkeypatch.setattr(gpu.GpuMeasurer, "in_turn", lambda self, plans, n: [(5.0, 5.1)] * 6)
    assert main(ASK) == errors.EXIT_OK
    shown = capsys.readouterr().out
    assert "5.1000 ms per token at context 128, 5.0000 without, 0.1000 (+-0.0000) or 2.00% more" in shown
    assert "in turn with the plan it is no faster, so it is not recommended" in shown and "schedule:" not in shown


def test_where_nothing_is_better(machine, capsys):
    machine.gain = 0.0
    assert main(ASK) == errors.EXIT_OK
    assert "the plan without rules is the best of " in capsys.readouterr().out


def test_wrong_candidates_end_it_with_their_code(machine, capsys):
    machine.wrong = 32768
    assert main(ASK) == errors.EXIT_VERDICT
    shown = capsys.readouterr()
    assert "WRONG: logits differ by 3" in shown.out and "schedule:" in shown.out
    assert "candidates failed or computed wrong numbers (never chosen)" in shown.err


def test_json(machine, capsys):
    assert main([*ASK, "--json"]) == errors.EXIT_OK
    found = json.loads(capsys.readouterr().out)
    assert found["best"] == {"*": {"prefetch": 262144}} and found["confirmed"]["real"] and found["complete"]
    assert found["tried"][0] == {
        "rules": {}, "refused": None, "ms": pytest.approx(4.95), "right": True, "output": "same bits",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([*ASK, "--calibrate", "--limit", "5"], "--limit is for the search, --calibrate has none"),
        ([*ASK, "--calibrate", "-o", "a.yaml"], "--output is for the search, --calibrate has none"),
        ([*ASK, "--stream-gbps", "3000"], "--stream-gbps is a constant of the cost model"),
        ([*ASK, "-c", "600"], "more than the 512 positions"),
    ],
)
def test_what_makes_no_sense_is_refused(machine, asked, message, capsys):
    assert main(asked) == errors.EXIT_BAD_INPUT
    assert message in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(machine, capsys, tmp_path):
    path = tmp_path / "nowhere" / "tuned.yaml"
    assert main([*ASK, "-o", str(path)]) == errors.EXIT_BAD_INPUT
    assert f"cannot write {path}: No such file or directory" in capsys.readouterr().err and machine.measured == []


def test_the_spec_itself_is_not_overwritten(machine, capsys, tmp_path):
    from mpk_spec.paths import specs_dir

    path = specs_dir() / "qwen3.yaml"
    before = path.read_text()
    assert main([*ASK, "-o", str(path)]) == errors.EXIT_BAD_INPUT
    assert "is the spec itself" in capsys.readouterr().err and path.read_text() == before


def test_calibration_says_what_it_predicted_and_what_it_predicts_now(tmp_path, monkeypatch, capsys):
    """Of a GPU whose hops take longer than the constants say, and longer still where clocks are read."""
    monkeypatch.setenv("MPK_SPEC_CACHE", str(tmp_path))
    made = plan(load_spec("qwen3"), size="0.6b", target="h100", context=256, verified=False)

    def true(hop_us: float):
        slow = {f"{kind}_hop_us": hop_us for kind in ("data", "norm", "merge", "attend")}
        return simulate(made, context=128, cost=cost_model("h100", {"stream_gbps": 3100.0} | slow))

    found = Measured(made, common_clock(times_of(true(2.5))), true(2.0).us, 3100.0)
    monkeypatch.setattr("mpk_spec.cli.calibrate.measured", lambda *asked: found)
    fit_constants("qwen3", "0.6b", None, 128, 2, None, False)
    said = capsys.readouterr().out
    clocked, plain, before, now = (float(x) for x in re.findall(r"(\d+\.\d{4}) ms", said))
    assert clocked == pytest.approx(true(2.5).ms, rel=0.02) and plain == pytest.approx(found.us / 1e3, abs=1e-4)
    assert clocked > plain > 1.1 * before and now == pytest.approx(plain, rel=0.003)
    was = f"{cost_model('h100').norm_hop_us:.3f}"
    assert re.search(rf"^norm_hop_us +{re.escape(was)} +[12]\.\d+ +2\.\d+ ", said, re.MULTILINE)
    assert re.search(r"^down_add .* \+?-?[012] %$", said, re.MULTILINE)  # nothing marked as differing
    known = read_calibration("h100")
    assert str(calibration_file("h100")) in said and 1.5 < known["norm_hop_us"] < 2.3 and known["stream_gbps"] == 3100
