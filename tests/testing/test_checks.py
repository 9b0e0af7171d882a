"""Each kind of check: what it computes, when it fails, what it says of mistakes in the YAML."""

from __future__ import annotations

import re

import pytest
from tiny import spec_of

from mpk_spec.errors import SpecError
from mpk_spec.paths import specs_dir
from mpk_spec.planner.weights import weight_bytes
from mpk_spec.schema import load_spec
from mpk_spec.testing import checks
from mpk_spec.testing.checks import KINDS, Outcome, guarded, read_parameters
from mpk_spec.testing.fixtures import Fixtures

MADE: dict[str, Fixtures] = {}


def outcome(kind: str, spec: str = "qwen3", **parameters) -> Outcome:
    fixtures = MADE.setdefault(spec, Fixtures(spec_of(spec)))
    found = KINDS[kind]
    return guarded(lambda: found.run(fixtures, found.parameters.model_validate(parameters)))


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        ("parameters", 455808, 455807),
        ("bytes_per_token", 911616, 911614),
    ],
)
def test_counts(kind, right, wrong):
    assert outcome(kind, size="tiny", equal=right) == Outcome(str(right), str(right), "pass")
    assert outcome(kind, size="tiny", equal=wrong) == Outcome(str(wrong), str(right), "fail")


def test_bytes_of_a_rank_and_of_chosen_experts():
    """Two ranks halve what is split, and not the norms; of 16 experts a token reads 3."""
    whole = weight_bytes(Fixtures(spec_of("qwen3")).plan("tiny"))
    half = weight_bytes(Fixtures(spec_of("qwen3")).plan("tiny", tp=2))
    assert whole / 2 < half < whole
    plan = Fixtures(spec_of("qwen3_moe")).plan("tiny")
    one_expert = 3 * 128 * 96 * 2
    dense = sum(
        2 * w.full_shape[0] * (w.full_shape[1] if len(w.full_shape) > 1 else 1) * (3 if w.per_layer else 1)
        for w in plan.weights.values()
        if not w.stack and w.kind != "embedding"
    )
    assert weight_bytes(plan) == dense + 3 * 3 * one_expert


def test_all_reduces():
    assert outcome("all_reduces", size="tiny", tp={1: 0, 2: 6}).verdict == "pass"
    assert outcome("all_reduces", size="tiny", tp={1: 0, 2: 5}) == Outcome(
        "tp 1: 0, tp 2: 5", "tp 1: 0, tp 2: 6", "fail"
    )


def test_fusions():
    every = list(spec_of("qwen3").fusions)
    assert outcome("fusions_applied", size="tiny", target="h100", equal="all").verdict == "pass"
    assert outcome("fusions_applied", size="tiny", target="h100", equal=every[:-1]).reason == "applied: head"
    split = outcome("fusions_applied", size="tiny", tp=2, equal="all")  # sums over ranks cut these two
    assert (split.verdict, split.reason) == ("fail", "not applied: o_add, down_add")


def test_kl_ratio_has_two_sides():
    assert outcome("kl_ratio", size="tiny", at_most=1.1).verdict == "pass"
    failed = outcome("kl_ratio", size="tiny", at_most=0.01)
    assert failed.verdict == "fail" and 0.1 < float(failed.got) < 1.1


def test_kl_ratio_without_the_weights_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    skipped = outcome("kl_ratio", size="0.6b", weights="checkpoint", at_most=1.1)
    assert skipped.verdict == "skip"
    assert skipped.reason == "the weights of size '0.6b' are not on this machine (hub:Qwen/Qwen3-0.6B)"


def test_planted_must_be_noticed_each():
    noticed = outcome("planted", size="tiny", drop=["attention.qn", "values.rope"], must_fail="kl_ratio")
    assert noticed.verdict == "pass"
    assert re.fullmatch(r"[\d.e+]+ without attention\.qn, [\d.e+]+ without values\.rope", noticed.got)


def test_a_planted_failure_that_goes_unnoticed(monkeypatch):
    monkeypatch.setattr(checks, "ratio_of", lambda fixtures, given, spec: 1.0)
    missed = outcome("planted", size="tiny", drop=["attention.qn"], must_fail="kl_ratio")
    assert (missed.verdict, missed.reason) == ("fail", "unnoticed: attention.qn")


def test_tiny_equals_hugging_face_with_any_number_of_ranks():
    fixtures = Fixtures(spec_of("qwen3"))
    for tp in (1, 2):
        found = checks.equals_huggingface(fixtures, "tiny", tp)
        assert found.verdict == "pass" and float(found.got) < 1e-5


def test_an_error_for_people_is_a_failed_check():
    failed = outcome("all_reduces", size="tiny", tp={3: 1})
    assert failed.verdict == "fail"
    assert "do not divide over 3 ranks" in failed.reason


HEAD = f"spec: v1\nextends: {specs_dir() / 'qwen3.yaml'}\nname: mine\n"
BODY = (
    "model: {architectures: [Qwen3ForCausalLM]}\n"
    "sizes: {tiny: {hidden_size: 96, intermediate_size: 256, num_hidden_layers: 3, num_attention_heads: 8,\n"
    "  num_key_value_heads: 2, head_dim: 32, vocab_size: 515}}\n"
    "checks:\n"
)


def mistakes(tmp_path, line: str) -> str:
    """What is said of one line under `checks:`, its position as `line:column`."""
    path = tmp_path / "mine.yaml"
    path.write_text(HEAD + BODY + f"  {line}\n")
    spec = load_spec(path)
    with pytest.raises(SpecError) as caught:
        read_parameters(spec, next(iter(spec.checks)))
    problem = caught.value.problems[0]
    assert problem.position.file.endswith("mine.yaml") and problem.position.line == 8
    return f"{problem.position.column}: {problem.message}" + (f"; {problem.hint}" if problem.hint else "")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("parameter: {size: tiny, equal: 3}", "3: unknown check 'parameter'; did you mean 'parameters'?"),
        ("mine: {check: kl_ration, size: tiny}", "17: unknown check 'kl_ration'; did you mean 'kl_ratio'?"),
        ("parameters: {size: tiny, equals: 3}", "28: unknown key 'equals' in 'parameters'; did you mean 'equal'?"),
        ("parameters: {size: tiny, equal: many}", "35: 'equal' must be a whole number, this is text"),
        ("parameters: {size: tiny}", "3: 'checks.parameters' has no 'equal'; equal: the number it must be"),
        ("fusions_applied: {size: tiny, equal: [qkw]}", "41: unknown fusion 'qkw'; did you mean 'qkv'?"),
        (
            "planted: {size: tiny, drop: [attention.qm], must_fail: kl_ratio}",
            "32: there is no 'attention.qm' to drop; did you mean 'attention.q'?",
        ),
    ],
)
def test_mistakes_have_a_place_and_a_hint(tmp_path, line, said):
    assert mistakes(tmp_path, line) == said


def test_planted_needs_a_check_that_can_notice(tmp_path):
    said = mistakes(tmp_path, "planted: {size: tiny, drop: [values.rope], must_fail: kl}")
    assert said == "57: there is no kl_ratio check 'kl'; there are no kl_ratio checks here"


def test_a_check_may_have_a_name_of_its_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(HEAD + BODY + "  small: {check: parameters, size: tiny, equal: 455808}\n")
    kind, given = read_parameters(load_spec(path), "small")
    assert (kind.name, given.equal) == ("parameters", 455808)
