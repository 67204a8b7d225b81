"""Statistics against closed forms and second implementations; coverage of the intervals."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from lacer.agents import stats


def test_iqm_is_the_mean_of_the_middle_half() -> None:
    assert stats.iqm([100.0, 1, 2, 3, 4, 5, 6, -50]) == pytest.approx(np.mean([2, 3, 4, 5]))
    np.testing.assert_allclose(stats.iqm([[0.0, 9], [1, 9], [2, 9], [9, 9]]), [1.5, 9])


@pytest.mark.parametrize("statistic", ["mean", "iqm"])
def test_bootstrap_against_scipy(statistic: stats.Statistic) -> None:
    x = np.random.default_rng(0).normal(3, 2, 40)
    low, high = stats.bootstrap(x, statistic)
    other = scipy_stats.bootstrap((x,), np.mean if statistic == "mean" else stats.iqm, method="percentile",
                                  n_resamples=20_000, rng=np.random.default_rng(1)).confidence_interval
    assert low == pytest.approx(other.low, abs=0.03)
    assert high == pytest.approx(other.high, abs=0.03)


def test_bootstrap_of_curves_draws_runs_as_wholes() -> None:
    curves = np.random.default_rng(0).normal(size=(20, 3)) + np.array([0, 10, 20])
    low, high = stats.bootstrap(curves, draws=500)
    assert low.shape == high.shape == (3,)
    for i in range(3):
        np.testing.assert_allclose([low[i], high[i]], stats.bootstrap(curves[:, i], draws=500))
    shifted = stats.bootstrap(curves + 5, draws=500)[0]
    np.testing.assert_allclose(shifted, low + 5)


@pytest.mark.parametrize(("statistic", "n", "least"), [("mean", 30, 0.91), ("iqm", 30, 0.90), ("mean", 8, 0.84)])
def test_intervals_cover_the_truth(statistic: stats.Statistic, n: int, least: float) -> None:
    """The percentile bootstrap is known to be a little narrow for few runs: 95 % in name, at least these in fact."""
    rng, hits = np.random.default_rng(0), 0
    for i in range(400):
        low, high = stats.bootstrap(rng.normal(1.0, 2.0, n), statistic, draws=400, seed=i)
        hits += bool(low <= 1.0 <= high)
    assert least <= hits / 400 <= 0.97


def test_bootstrap_needs_finite_runs() -> None:
    for bad in ([], [1.0, np.nan]):
        with pytest.raises(ValueError, match="finite"):
            stats.bootstrap(bad)


def test_improvement_counts_pairs() -> None:
    assert stats.improvement([3, 4], [1, 2]) == 1
    assert stats.improvement([1, 2], [1, 2]) == 0.5
    a, b = np.random.default_rng(0).normal(0.3, 1, 50), np.random.default_rng(1).normal(0, 1, 70)
    assert stats.improvement(a, b) == pytest.approx(np.mean(a[:, None] > b[None]))


def test_holm_by_hand() -> None:
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert stats.holm([]) == []


def test_compare_finds_a_difference_and_invents_none() -> None:
    rng = np.random.default_rng(0)
    good, same, bad = rng.normal(1, 1, 60), rng.normal(0, 1, 60), rng.normal(0, 1, 60)
    by = {(c.a, c.b): c for c in stats.compare({"good": good, "same": same, "bad": bad})}
    assert by["good", "same"].better == by["good", "bad"].better == "good"
    assert by["same", "bad"].better == ""
    assert by["good", "bad"].low < 1 < by["good", "bad"].high
    lower = {(c.a, c.b): c for c in stats.compare({"good": -good, "bad": -bad}, higher_is_better=False)}
    assert lower["good", "bad"].better == "good"
    assert lower["good", "bad"].difference == pytest.approx(by["good", "bad"].difference)


def test_false_findings_stay_rare() -> None:
    rng = np.random.default_rng(0)
    groups = [{k: rng.normal(size=10) for k in "abc"} for _ in range(60)]
    found = sum(any(c.better for c in stats.compare(g, seed=i)) for i, g in enumerate(groups))
    assert found <= 7, "5 % of 60 comparisons of three groups that are alike, with three standard errors of room"


def test_equal_groups() -> None:
    [c] = stats.compare({"a": [1.0, 1.0, 1.0], "b": [1.0, 1.0, 1.0]})
    assert (c.p, c.difference, c.improvement, c.better) == (1.0, 0.0, 0.5, "")


def test_hitting_times() -> None:
    curves = [[0.0, 1, 1, 3], [0, 0, 0, 0], [5, 5, 5, 5]]
    assert list(stats.hitting_times(curves, 1)) == [2, np.inf, 1]
