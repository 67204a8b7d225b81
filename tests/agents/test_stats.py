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
    with pytest.raises(ValueError, match="statistic"):
        stats.bootstrap([1.0, 2.0], np.mean)  # type: ignore[arg-type]


def test_improvement_counts_pairs() -> None:
    assert stats.improvement([3, 4], [1, 2]) == 1
    assert stats.improvement([1, 2], [1, 2]) == 0.5
    a, b = np.random.default_rng(0).normal(0.3, 1, 50), np.random.default_rng(1).normal(0, 1, 70)
    assert stats.improvement(a, b) == pytest.approx(np.mean(a[:, None] > b[None]))


def test_interval_of_the_improvement_against_scipy() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(0.5, 1, 25), np.round(rng.normal(0, 1, 30), 1)
    other = scipy_stats.bootstrap((a, b), stats.improvement, method="percentile", n_resamples=1000, vectorized=False,
                                  rng=rng).confidence_interval
    low, high = stats.improvement_interval(a, b)
    assert (low, high) == pytest.approx((other.low, other.high), abs=0.02)
    assert low < stats.improvement(a, b) < high
    assert stats.improvement_interval([1.0, 1], [1.0, 1]) == (0.5, 0.5)


def test_interval_of_the_improvement_covers_the_truth() -> None:
    """Two normal distributions half a standard deviation apart: P(a > b) = Phi(0.5 / sqrt(2)) in closed form."""
    truth = float(scipy_stats.norm.cdf(0.5 / np.sqrt(2)))
    rng, hits = np.random.default_rng(0), 0
    for i in range(300):
        low, high = stats.improvement_interval(rng.normal(0.5, 1, 20), rng.normal(0, 1, 20), draws=400, seed=i)
        hits += low <= truth <= high
    assert 0.90 <= hits / 300 <= 0.98


def test_holm_by_hand() -> None:
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert stats.holm([]) == []


@pytest.mark.parametrize("n", range(4))
def test_holm_against_a_second_implementation(n: int) -> None:
    """The definition, step by step: the k-th smallest is accepted or not by alpha / (m - k + 1)."""
    p = np.random.default_rng(n).random(6) ** 3
    corrected = stats.holm(p.tolist())
    for alpha in np.linspace(0.01, 0.99, 50):
        rejected = set[int]()
        for k, i in enumerate(np.argsort(p)):
            if p[i] > alpha / (len(p) - k):
                break
            rejected.add(int(i))
        assert {i for i, q in enumerate(corrected) if q <= alpha} == rejected


@pytest.mark.parametrize("seed", range(6))
def test_exact_p_of_few_runs_with_ties_against_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 4, 4 + seed % 3).astype(float), rng.integers(0, 4, 5).astype(float)
    if np.ptp([*a, *b]) == 0:
        pytest.skip("all alike")
    every = scipy_stats.PermutationMethod(n_resamples=10_000)
    [c] = stats.compare({"a": a, "b": b})
    assert c.p == pytest.approx(scipy_stats.mannwhitneyu(a, b, method=every).pvalue)


def test_three_runs_tell_nothing_apart() -> None:
    """However far apart: 1 of the 20 ways to choose 3 of 6 at each end is 0.1. The smallest p is known beforehand."""
    [c] = stats.compare({"a": [1.0, 1, 1], "b": [0.0, 0, 0]})
    assert (c.p, c.better) == (pytest.approx(0.1), "")
    [d] = stats.compare({"a": [9.0, 8, 7], "b": [3.0, 2, 1]})
    assert (d.p, d.better) == (pytest.approx(0.1), "")
    for n, groups in ((3, 2), (4, 2), (5, 3), (6, 3)):
        far = {str(g): 10.0 * g + np.arange(n) for g in range(groups)}
        found = stats.compare(far)
        assert min(c.p for c in found) == pytest.approx(stats.least_p([n] * groups))
        assert any(c.better for c in found) == (stats.least_p([n] * groups) < 0.05)
    assert stats.least_p([7]) == 1.0


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


def test_performance_profile_by_hand_and_by_scipy() -> None:
    share, low, high = stats.performance_profile([[1.0, 2, 3, 4]], [0, 1, 2.5, 4])
    assert share.tolist() == [1, 0.75, 0.5, 0]
    assert (low[0], high[0], low[3], high[3]) == (1, 1, 0, 0)
    x = np.random.default_rng(0).normal(size=50)
    at = np.linspace(-2, 2, 9)
    share, low, high = stats.performance_profile([x], at, draws=10_000)
    np.testing.assert_allclose(share, 1 - scipy_stats.ecdf(x).cdf.evaluate(at))
    for i, t in enumerate(at):
        other = scipy_stats.bootstrap((x,), lambda v, axis=-1, t=t: (v > t).mean(axis), method="percentile",  # type: ignore[misc]
                                      n_resamples=5000, rng=1).confidence_interval
        assert (low[i], high[i]) == pytest.approx((other.low, other.high), abs=0.021)


def test_performance_profile_weighs_groups_alike_and_covers_the_truth() -> None:
    share, low, high = stats.performance_profile([[1.0], [0.0] * 9], [0.5])
    assert (share[0], low[0], high[0]) == (0.5, 0.5, 0.5), "each group is resampled by itself"
    rng, hits, at = np.random.default_rng(0), 0, 0.3
    truth = float(np.mean([scipy_stats.norm.sf(at), scipy_stats.norm.sf(at, 1)]))
    for i in range(300):
        strata = [rng.normal(0, 1, 15), rng.normal(1, 1, 25)]
        _, low, high = stats.performance_profile(strata, [at], draws=400, seed=i)
        hits += bool(low[0] <= truth <= high[0])
    assert 0.90 <= hits / 300 <= 0.985


@pytest.mark.parametrize("statistic", ["mean", "iqm"])
def test_stratified_bootstrap(statistic: stats.Statistic) -> None:
    """Of one group it is the plain one; of two far apart the groups' distance adds nothing to the width."""
    x = np.random.default_rng(0).normal(size=20)
    assert stats.stratified_bootstrap([x], statistic) == pytest.approx(
        [float(v) for v in stats.bootstrap(x, statistic, seed=1)], abs=0.02)
    if statistic == "mean":
        low, high = stats.stratified_bootstrap([x, x + 100], statistic)
        assert high - low < 1.0
        closed = 2 * 1.96 * np.std(x) / np.sqrt(2 * len(x))
        assert high - low == pytest.approx(closed, rel=0.05)
    for bad in ([], [[]], [[1.0], [np.nan]]):
        with pytest.raises(ValueError, match="finite"):
            stats.stratified_bootstrap(bad, statistic)
