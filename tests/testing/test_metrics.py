from __future__ import annotations

import math

import pytest
import torch

from mpk_spec.testing.metrics import Metrics, Verdict, measure, most_flips


def metrics(kl=1e-3, p99=1e-2, error=0.5, flips=10, broken=0, spread=0.0):
    return Metrics(2000, kl, spread * kl, p99, spread * p99, error, flips, broken)


def test_kl_of_two_coins():
    """KL((1/2, 1/2) || (1/4, 3/4)) = ln 2 - ln(3)/2, at every position."""
    truth = torch.zeros(100, 2)
    other = torch.log(torch.tensor([[0.25, 0.75]])).expand(100, 2)
    found = measure([(truth[:30], other[:30]), (truth[30:], other[30:])])
    wanted = math.log(2) - math.log(3) / 2
    assert found.positions == 100
    assert found.kl_mean == pytest.approx(wanted, rel=1e-6)
    assert found.kl_p99 == pytest.approx(wanted, rel=1e-6)
    assert found.kl_mean_error == pytest.approx(0, abs=1e-9)
    assert found.max_error == pytest.approx(math.log(4), rel=1e-6)


def test_a_shift_of_all_logits_is_an_error_but_no_divergence():
    truth = torch.randn(70, 9, generator=torch.Generator().manual_seed(0))
    found = measure([(truth, truth + 3)])
    assert found.kl_mean == pytest.approx(0, abs=1e-12)
    assert found.max_error == pytest.approx(3, rel=1e-6)
    assert found.flips == 0


def test_flips_are_counted():
    truth = torch.eye(5)
    assert measure([(truth, truth.flip(0))]).flips == 4


def test_the_99th_percentile_is_of_positions():
    truth = torch.zeros(1000, 2)
    other = truth.clone()
    other[:15, 0] = 4.0  # 1.5 % of the positions are far off
    found = measure([(truth, other)])
    assert found.kl_p99 > 1
    assert found.kl_mean < 0.03


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_makes_all_infinite(value):
    truth = torch.zeros(10, 3)
    other = truth.clone()
    other[4, 1] = value
    found = measure([(truth, other)])
    assert found.broken == 1
    assert found.kl_mean == found.kl_p99 == found.max_error == math.inf
    assert not Verdict(metrics(), found).passed


@pytest.mark.parametrize(
    ("ours", "failing"),
    [
        (metrics(kl=1.09e-3), []),
        (metrics(kl=1.11e-3), ["KL mean"]),
        (metrics(p99=1.09e-2), []),
        (metrics(p99=1.11e-2), ["KL 99th percentile"]),
        (metrics(error=0.73), []),
        (metrics(error=0.74), ["max logit error"]),
        (metrics(flips=22), []),
        (metrics(flips=23), ["top-1 flips"]),
        (metrics(kl=1e-9, p99=1e-9, error=0, flips=0), []),
    ],
)
def test_each_limit(ours, failing):
    verdict = Verdict(metrics(), ours)
    assert [row.name for row in verdict.rows if not row.passed] == failing
    assert verdict.passed == (not failing)


def test_chance_widens_the_limit_by_two_standard_errors():
    rival = metrics(spread=0.03)
    limit = Verdict(rival, rival).rows[0].limit
    assert limit == pytest.approx(1e-3 * (1.1 + 2 * math.hypot(1.1 * 0.03, 0.03)), rel=1e-5)


def test_flips_follow_the_two_counts_chance():
    assert [most_flips(n) for n in (0, 2, 10, 100)] == [4, 8, 22, 141]


def test_the_ratio_has_no_allowance():
    assert Verdict(metrics(spread=0.5), metrics(kl=2e-3)).kl_ratio == pytest.approx(2)


def test_data_has_no_infinities():
    data = Verdict(metrics(), Metrics(9, math.inf, 0, math.inf, 0, math.inf, 3, 9)).data()
    assert (data["passed"], data["kl_ratio"], data["broken_positions"]) == (False, None, 9)
    assert [row["ours"] for row in data["rows"]] == [None, None, None, 3]
