"""Statistics of runs: interquartile means, bootstrap intervals, comparisons with corrected tests.

What Agarwal et al. 2021 (arXiv 2108.13264) recommend for few runs: interval estimates from a bootstrap over runs, the
interquartile mean, and the probability of improvement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Array = NDArray[np.float64]
Statistic = Literal["mean", "iqm"]

DRAWS = 10_000
"""Resamples of a bootstrap."""


def iqm(x: ArrayLike, axis: int = 0) -> Any:
    """Interquartile mean: the mean of the middle half, a quarter cut off at each end (rounded down)."""
    return stats.trim_mean(np.asarray(x, float), 0.25, axis=axis)


def bootstrap(x: ArrayLike, statistic: Statistic = "mean", *, level: float = 0.95, draws: int = DRAWS,
              seed: int = 0) -> tuple[Array, Array]:
    """Percentile bootstrap interval of a statistic over runs.

    Args:
        x: (runs,) or (runs, points); runs are drawn with replacement, all points of a run together.
        statistic: ``"mean"`` or ``"iqm"``.
        level: of the interval.
        draws: resamples.
        seed: of the resampling.

    Returns:
        Lower and upper ends, each of shape () or (points,).

    Raises:
        ValueError: no runs, values that are not finite, or another statistic.
    """
    if statistic not in ("mean", "iqm"):
        raise ValueError(f"statistic must be 'mean' or 'iqm', not {statistic!r}")
    a = np.asarray(x, float)
    if not len(a) or not np.isfinite(a).all():
        raise ValueError("a bootstrap needs at least one run, and finite values")
    flat, rng = a.reshape(len(a), -1), np.random.default_rng(seed)
    if statistic == "mean":  # how often each run is drawn is all that counts
        values = rng.multinomial(len(a), np.full(len(a), 1 / len(a)), draws) @ flat / len(a)
    else:
        drawn = rng.integers(len(a), size=(draws, len(a)))
        values = np.stack([iqm(column[drawn], axis=1) for column in flat.T], axis=1)
    tail = 50 * (1 - level)
    low, high = np.percentile(values, [tail, 100 - tail], axis=0)
    return low.reshape(a.shape[1:]), high.reshape(a.shape[1:])


def stratified_bootstrap(strata: Sequence[ArrayLike], statistic: Statistic = "iqm", *, level: float = 0.95,
                         draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of several groups of runs taken together; runs are drawn within each
    group, so that every group keeps its weight (Agarwal et al. 2021, section 4.1).

    Args:
        strata: runs of each group, e.g. the scores on each environment.
        statistic, level, draws, seed: as in :func:`bootstrap`.

    Raises:
        ValueError: no runs, or values that are not finite.
    """
    drawn = _resampled(strata, draws, seed)
    values = drawn.mean(1) if statistic == "mean" else iqm(drawn, axis=1)
    tail = 50 * (1 - level)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def performance_profile(strata: Sequence[ArrayLike], levels: ArrayLike, *, level: float = 0.95, draws: int = 2000,
                        seed: int = 0) -> tuple[Array, Array, Array]:
    """Share of runs that score more than each of some levels (Agarwal et al. 2021, section 4.2).

    Args:
        strata: runs of each group, e.g. the normalised scores on each environment; all groups weigh the same.
        levels: (points,) scores.
        level, draws, seed: of the pointwise percentile bootstrap, which draws runs within each group.

    Returns:
        The share, and the lower and upper ends of its interval, each of shape (points,).

    Raises:
        ValueError: no runs, or values that are not finite.
    """
    at = np.asarray(levels, float)
    _check(strata)
    rng = np.random.default_rng(seed)
    share, drawn = np.zeros(len(at)), np.zeros((draws, len(at)))
    for x in strata:
        above = np.asarray(x, float)[:, None] > at
        share += above.mean(0) / len(strata)
        drawn += rng.multinomial(len(above), np.full(len(above), 1 / len(above)), draws) @ above / len(above) \
            / len(strata)
    tail = 50 * (1 - level)
    low, high = np.percentile(drawn, [tail, 100 - tail], axis=0)
    return share, low, high


def _resampled(strata: Sequence[ArrayLike], draws: int, seed: int) -> Array:
    """(draws, all runs)."""
    _check(strata)
    rng = np.random.default_rng(seed)
    groups = [np.asarray(x, float) for x in strata]
    return np.concatenate([x[rng.integers(len(x), size=(draws, len(x)))] for x in groups], axis=1)


def _check(strata: Sequence[ArrayLike]) -> None:
    if not strata or any(not np.size(x) or not np.isfinite(np.asarray(x, float)).all() for x in strata):
        raise ValueError("a bootstrap needs at least one run of each group, and finite values")


def mean_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float, float]:
    """Mean, interquartile mean, and the 95 % bootstrap interval of the mean."""
    low, high = bootstrap(values, seed=seed)
    return float(np.mean(values)), float(iqm(values)), float(low), float(high)


def improvement(a: ArrayLike, b: ArrayLike) -> float:
    """Probability that a run of ``a`` is better than one of ``b``, ties counting half: the Mann-Whitney statistic
    divided by the number of pairs."""
    x, y = np.asarray(a, float), np.asarray(b, float)
    return float(stats.mannwhitneyu(x, y).statistic / (len(x) * len(y)))


def improvement_interval(a: ArrayLike, b: ArrayLike, *, level: float = 0.95, draws: int = DRAWS,
                         seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of :func:`improvement`; both groups of runs are resampled."""
    x, y = np.asarray(a, float), np.asarray(b, float)
    wins = (x[:, None] > y) + 0.5 * (x[:, None] == y)
    rng = np.random.default_rng(seed)
    shares = [rng.multinomial(n, np.full(n, 1 / n), draws) / n for n in wins.shape]
    values = ((shares[0] @ wins) * shares[1]).sum(1)
    tail = 50 * (1 - level)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979)."""
    order = np.argsort(p)
    out, worst = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p) - rank) * float(p[i])))
        out[i] = worst
    return out


@dataclass(frozen=True)
class Comparison:
    """Two groups of runs.

    Attributes:
        a, b: their names.
        difference: mean of a minus mean of b, and its 95 % bootstrap interval.
        improvement: probability that a run of a is better than one of b, and its 95 % bootstrap interval.
        p: of the two-sided Mann-Whitney test, corrected for the number of comparisons (Holm).
    """

    a: str
    b: str
    difference: float
    low: float
    high: float
    improvement: float
    improvement_low: float
    improvement_high: float
    p: float

    @property
    def better(self) -> str:
        """The better group where the corrected test and the interval agree at 5 %, else ""."""
        if self.p >= 0.05 or self.low <= 0 <= self.high:
            return ""
        return self.a if self.difference > 0 else self.b


def compare(groups: Mapping[str, ArrayLike], *, higher_is_better: bool = True, seed: int = 0) -> list[Comparison]:
    """All pairs of groups of independent runs.

    Args:
        groups: final scores of the runs, by name; at least two runs each.
        higher_is_better: else scores are negated, so that ``difference`` and ``improvement`` speak of the better.
        seed: of the bootstrap.
    """
    sign = 1.0 if higher_is_better else -1.0
    x = {k: sign * np.asarray(v, float) for k, v in groups.items()}
    pairs = list(combinations(x, 2))
    p = holm([_p_value(x[a], x[b]) for a, b in pairs])
    out = []
    for (a, b), corrected in zip(pairs, p, strict=True):
        rng = np.random.default_rng(seed)
        means = [rng.multinomial(len(g), np.full(len(g), 1 / len(g)), DRAWS) @ g / len(g) for g in (x[a], x[b])]
        low, high = np.percentile(means[0] - means[1], [2.5, 97.5])
        out.append(Comparison(a, b, float(x[a].mean() - x[b].mean()), float(low), float(high),
                              improvement(x[a], x[b]), *improvement_interval(x[a], x[b], draws=2000, seed=seed),
                              corrected))
    return out


def least_p(sizes: Sequence[int]) -> float:
    """The smallest corrected p-value that comparing all pairs of groups of these sizes can give: that of the largest
    groups, if one is wholly above the other. With three groups of three runs it is 0.3, so nothing can be told apart;
    five runs give 0.024."""
    pairs = list(combinations(sizes, 2))
    return min((min(1.0, 2 / math.comb(m + n, n) * len(pairs)) for m, n in pairs), default=1.0)


EXACT = 8
"""Runs of a group up to which the test counts all permutations, ties or not."""


def _p_value(a: Array, b: Array) -> float:
    both = np.concatenate([a, b])
    if np.ptp(both) == 0:
        return 1.0  # all runs alike
    if max(len(a), len(b)) <= EXACT and len(np.unique(both)) < len(both):
        # scipy would approximate by a normal distribution, which gives three against three, all different but tied
        # within each group, 0.047 where 0.1 is right.
        ranks = stats.rankdata(both)
        sums = ranks[_choices(len(both), len(a))].sum(1)
        mine, room = ranks[:len(a)].sum(), 1e-9
        return float(min(1.0, 2 * min((sums >= mine - room).mean(), (sums <= mine + room).mean())))
    return float(stats.mannwhitneyu(a, b).pvalue)


@cache
def _choices(n: int, k: int) -> NDArray[np.int64]:
    """All ways to choose k of n, one a row."""
    return np.array(list(combinations(range(n), k)))


def hitting_times(curves: ArrayLike, level: float) -> Array:
    """First point (from 1) at which each run has reached a level; infinity where it never does.

    Args:
        curves: (runs, points), best-so-far curves, higher is better.
        level: what is to be reached.
    """
    hit = np.asarray(curves, float) >= level
    return np.where(hit.any(1), hit.argmax(1) + 1.0, np.inf)
