"""The search on a GPU that is a formula: what it tries, takes, passes by, remembers, and when it ends."""

from __future__ import annotations

import json

import pytest
from fake_measurer import FakeMeasurer, group, milliseconds, planned, search

from mpk_spec.errors import UserError
from mpk_spec.schema import load_spec
from mpk_spec.tuner.journal import Measurement, NotJudged, journal_of
from mpk_spec.tuner.search import Gain
from mpk_spec.tuner.space import knobs, shown, with_choice

SPEC = load_spec("qwen3")
BEST = {"attend": {"kv_splits": 3}, "*": {"prefetch": 262144}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tune" / "a.jsonl"


def test_the_knobs_of_a_plan():
    found = {(k.group, k.name): k.choices for k in knobs(planned({}), SPEC)}
    assert {name for _, name in found} == {
        "kv_splits",
        "kv_merge",
        "grid",
        "weight_chunk",
        "order",
        "in_flight",
        "in_flight_looking",
        "prefetch",
        "crossing",
        "stages",
        "fuse",
    }
    assert found["attend", "kv_merge"] == tuple({"kv_merge": how} for how in ("auto", "fused", "apart"))
    assert found["*", "crossing"] == ({"crossing": "event"}, {"crossing": "data"})
    assert {g for g, name in found if name == "grid"} == {"qkv", "o_add", "gate_up", "down_add", "head"}
    assert [c["prefetch"] for c in found["*", "prefetch"]] == [0, 65536, 131072, 262144]
    assert [c["in_flight"] for c in found["*", "in_flight"]] == [32768, 49152, 65536, 81920, 98304]
    for (name, knob), choices in found.items():
        for choice in choices if knob == "grid" else ():
            made = planned({name: choice})  # none is refused
            assert (
                group(made, name).grid == tuple(choice["grid"]) and group(made, name).partition == choice["partition"]
            )


def test_rings_of_all_chunks_there_is_room_for_and_of_fewer():
    """Also where the spec's own rules ask for fewer: what is tried wins over those."""
    most = planned({}).ring_bytes // planned({}).chunk_bytes
    for own in ({}, {"*": {"stages": 9}}):
        (knob,) = (k for k in knobs(planned(own), SPEC) if k.name == "stages")
        rings = [planned(with_choice(own, knob, choice)).ring_bytes for choice in knob.choices]
        assert knob.group == "*"
        assert [ring // planned({}).chunk_bytes for ring in rings] == [most, most * 3 // 4, most // 2]


def test_a_smaller_ring_is_found(path):
    measurer = FakeMeasurer(ms=lambda p: milliseconds(p) + p.ring_bytes / 2**20)
    best = search(measurer, path)[0].run()
    half = planned({}).ring_bytes // planned({}).chunk_bytes // 2
    assert best.rules == {**BEST, "*": {"prefetch": 262144, "stages": half}}


def test_each_fusion_is_left_out():
    """Of the one with the cache all that the kernel has other tasks for. What is on its own then has a grid."""
    found = {k.group: k for k in knobs(planned({}), SPEC) if k.name == "fuse"}
    assert found.keys() == SPEC.fusions.keys()
    for name, knob in found.items():
        whole, cut = (planned(with_choice({}, knob, choice)) for choice in knob.choices)
        assert whole.key == planned({}).key != cut.key
        assert cut.schedule[name]["fuse"] == (["attention.cache", "attention.a"] if name == "attend" else False)
    rules = with_choice({"o_add": {"grid": [6, 1, 1]}, "head": {"stages": 2}}, found["o_add"], {"fuse": False})
    assert rules == {"o_add": {"fuse": False}, "head": {"stages": 2}}
    places = {(k.group, k.name) for k in knobs(planned(rules), SPEC)}
    assert ("o_add", "fuse") in places and ("attention.o", "grid") in places and ("o_add", "grid") not in places


def test_a_fusion_that_does_not_pay_is_left_out(path):
    """And the grid that its linear has then is searched, too."""

    def ms(made):
        alone = next((g for t in made.steps["decode"].templates for g in t.groups if g.name == "attention.o"), None)
        return milliseconds(made) - (0.1 * (2 - len(alone.tasks) / 12) if alone else 0)

    run, said = search(FakeMeasurer(ms=ms), path)
    best = run.run()
    assert best.rules["o_add"] == {"fuse": False}
    least = min(c["grid"][0] for k in knobs(best.plan, SPEC) if k.group == "attention.o" for c in k.choices)
    assert least < 12 and best.rules["attention.o"]["grid"] == [least, 1, 1]
    assert shown(best.rules).startswith("prefetch 262144, o_add fuse false, ")
    assert any(s.startswith("attend fuse 1/1: ") and "attend fuse attention.cache + attention.a: " in s for s in said)
    assert all(any(s.startswith(f"{name} fuse 1/1: ") for s in said) for name in SPEC.fusions)  # none is refused


def test_it_finds_the_best_of_each_knob(path):
    measurer = FakeMeasurer()
    run, said = search(measurer, path)
    best = run.run()
    assert best.rules == BEST and best.ms == pytest.approx(4.8)
    assert run.trials[0].rules == {} and best.plan.key == planned(BEST).key
    keys = [p.key for p in measurer.measured]
    assert len(keys) == len(set(keys)) == len(said) - sum("refused" in s for s in said)
    assert set(measurer.prepared) == set(keys[1:])
    assert said[0].startswith("without rules: as planned: ") and said[0].endswith(" ms, same bits")
    assert any(
        s.startswith("attend kv_splits ") and "/3: prefetch 262144, attend kv_splits 3: 4.8" in s and "%), same" in s
        for s in said
    )
    assert run.confirm(best).is_real


def test_who_merges_is_found_for_the_splits_that_are_best(path):
    """The planner has the readers merge three splits; here tasks of their own do it faster."""
    apart = lambda p: any(g.task == "attention_merge" for t in p.steps["decode"].templates for g in t.groups)  # noqa: E731
    assert not apart(planned({"attend": {"kv_splits": 3}}))
    measurer = FakeMeasurer(ms=lambda p: milliseconds(p) - 0.3 * apart(p))
    best = search(measurer, path)[0].run()
    assert best.rules == {**BEST, "attend": {"kv_splits": 3, "kv_merge": "apart"}} and apart(best.plan)
    assert shown(best.rules) == "prefetch 262144, attend kv_splits 3, attend kv_merge apart"


def test_refused_candidates_are_said_once_and_never_measured(path):
    run, said = search(FakeMeasurer(), path)
    run.run()
    refused = [t for t in run.trials if t.refused]
    assert shown(refused[0].rules) == "prefetch 262144, attend kv_splits 6"
    assert "prefetch 262144, attend kv_splits 6: refused: a context of 256 has 4 blocks of 64, got 6 splits" in said
    assert len({shown(t.rules) for t in refused}) == len(refused)
    assert all(t.plan is None and t.ms == float("inf") for t in refused)


def test_a_second_run_repeats_nothing(path):
    first = FakeMeasurer()
    best = search(first, path)[0].run()
    again = FakeMeasurer()
    run, said = search(again, path)
    found = run.run()
    assert again.measured == [] and again.prepared == [] and found.rules == best.rules
    assert all(s.endswith(", measured before") for s in said if "refused" not in s)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["plan"] for line in lines] == [p.key for p in first.measured]
    assert {"settings", "ms", "ms_min", "ms_max", "right", "output"} < lines[0].keys()


def test_it_goes_on_where_it_was_cut_short(path):
    search(FakeMeasurer(), path)[0].run()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]) + lines[5][:20])  # ended while it wrote
    measurer = FakeMeasurer()
    assert search(measurer, path)[0].run().rules == BEST
    assert len(measurer.measured) == len(lines) - 5
    third = FakeMeasurer()  # what was measured right after the torn line was kept, too
    assert search(third, path)[0].run().rules == BEST and third.measured == []


def test_a_journal_that_cannot_be_read_is_said(path):
    path.mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot read .*a\.jsonl: Is a directory"):
        search(FakeMeasurer(), path)


@pytest.mark.parametrize("limit", [45.0, 100.0])
def test_a_limit_ends_it_in_time_and_later_it_goes_on(path, limit):
    measurer = FakeMeasurer()
    run, said = search(measurer, path, limit)
    run.run()
    assert run.out_of_time and 0 < measurer.now <= limit - 20  # which the confirmation takes
    assert said.count(f"the {limit:g} seconds are over: the same command goes on from here") == 1
    rest = FakeMeasurer()
    whole, _ = search(rest, path, None)
    assert whole.run().rules == BEST and not whole.out_of_time
    assert not {p.key for p in rest.measured} & {p.key for p in measurer.measured}


def test_a_wrong_candidate_is_said_loudly_and_never_chosen(path):
    """The fastest of all computes other numbers."""
    measurer = FakeMeasurer(
        ms=lambda p: 1.0 if p.in_flight_bytes == 32768 else milliseconds(p), wrong=lambda p: p.in_flight_bytes == 32768
    )
    run, said = search(measurer, path)
    assert run.run().rules == BEST
    loud = [s for s in said if "WRONG: logits differ by 3" in s]
    assert loud and all("in_flight 32768" in s for s in loud)
    run, said = search(FakeMeasurer(), path)
    assert run.run().rules == BEST and any("WRONG" in s for s in said)  # also where it is remembered


def test_a_kernel_that_fails_is_passed_by_now_and_later(path):
    broken = lambda p: p.in_flight_bytes == 65536  # noqa: E731
    measurer = FakeMeasurer(fails=broken)
    run, said = search(measurer, path)
    assert run.run().rules == BEST
    assert any("WRONG, failed: the kernel was aborted: SM 3" in s for s in said)
    again = FakeMeasurer(fails=broken)
    search(again, path)[0].run()
    assert again.measured == []


def test_two_failures_in_a_row_end_it(path):
    measurer = FakeMeasurer(fails=lambda p: p.in_flight_bytes != 49152)
    run, _ = search(measurer, path)
    with pytest.raises(UserError, match="the kernel was aborted"):
        run.run()
    assert len(measurer.measured) == 3 and len(path.read_text().splitlines()) == 2  # the second may be no fault of its


@pytest.mark.parametrize("how", ["wrong", "fails"])
def test_a_plan_without_rules_that_is_wrong_ends_it(path, how):
    run, _ = search(FakeMeasurer(**{how: lambda p: True}), path)
    with pytest.raises(UserError, match=r"does not run as it should: logits differ|the kernel was aborted"):
        run.run()


def test_candidates_that_cannot_be_judged_here_are_no_failures(path):
    measurer = FakeMeasurer()
    plain, measure = group(planned({}), "attend").kv_splits, measurer.measure

    def judged(made):
        if group(made, "attend").kv_splits != plain:
            raise NotJudged("other splits cannot be judged: no memory")
        return measure(made)

    measurer.measure = judged
    run, said = search(measurer, path)
    assert run.run().rules == {"*": {"prefetch": 262144}}
    assert any("refused: other splits cannot be judged: no memory" in s for s in said)
    assert "splits" not in path.read_text()


def test_a_difference_within_the_noise_is_not_taken(path):
    """Every plan is a little faster than the one before: by a thousandth at most."""
    run, _ = search(FakeMeasurer(ms=lambda p: 5.0 - int(p.key, 16) % 100 * 5e-5), path)
    assert run.run().rules == {}


@pytest.mark.parametrize(("noise", "real"), [(0.0, True), (0.05, True), (1.0, False)])
def test_the_confirmation_looks_at_the_spread(path, noise, real):
    run, said = search(FakeMeasurer(noise=noise), path)
    best = run.run()
    gain = run.confirm(best)
    assert gain.is_real == real and gain.after == pytest.approx(best.ms)
    assert said[-1] == "confirming prefetch 262144, attend kv_splits 3"


def test_what_a_gain_must_be():
    assert Gain(5.0, 4.9, 0.01).is_real
    assert not Gain(5.0, 4.9, 0.04).is_real  # 2.5 standard errors
    assert not Gain(5.0, 4.998, 0.0).is_real  # 0.04 %
    assert not Gain(5.0, 5.1, 0.0).is_real


def test_a_journal_is_for_one_plan_gpu_weights_and_context(tmp_path, monkeypatch):
    monkeypatch.setenv("MPK_SPEC_CACHE", str(tmp_path))
    given = (planned({}), "H100", "random:0", 128, 48)
    same = journal_of(*given)
    assert same.path == journal_of(*given).path and same.path.name.startswith("qwen3-tiny-h100-c128-")
    changes = [(0, planned(BEST)), (1, "H200"), (2, "random:1"), (3, 4096), (4, 8)]
    others = {journal_of(*given[:n], other, *given[n + 1 :]).path for n, other in changes}
    assert len(others | {same.path}) == 6
    same.add("a", "b", Measurement(1.0, 1.0, 1.0, True, "same bits"))
    assert journal_of(*given).found == {"a": Measurement(1.0, 1.0, 1.0, True, "same bits")}
