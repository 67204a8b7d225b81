"""Statistics of runs: interquartile means, bootstrap intervals, comparisons with corrected tests.

What Agarwal et al. 2021 (arXiv 2108.13264) recommend for few runs: interval estimates from a bootstrap over runs, the
interquartile mean, and the probability of improvement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
        ValueError: no runs, or values that are not finite.
    """
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


def mean_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float, float]:
    """Mean, interquartile mean, and the 95 % bootstrap interval of the mean."""
    low, high = bootstrap(values, seed=seed)
    return float(np.mean(values)), float(iqm(values)), float(low), float(high)


def improvement(a: ArrayLike, b: ArrayLike) -> float:
    """Probability that a run of ``a`` is better than one of ``b``, ties counting half: the Mann-Whitney statistic
    divided by the number of pairs."""
    x, y = np.asarray(a, float), np.asarray(b, float)
    return float(stats.mannwhitneyu(x, y).statistic / (len(x) * len(y)))


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
        improvement: probability that a run of a is better than one of b.
        p: of the two-sided Mann-Whitney test, corrected for the number of comparisons (Holm).
    """

    a: str
    b: str
    difference: float
    low: float
    high: float
    improvement: float
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
                              improvement(x[a], x[b]), corrected))
    return out


def _p_value(a: Array, b: Array) -> float:
    if np.ptp(np.concatenate([a, b])) == 0:
        return 1.0  # all runs alike
    return float(stats.mannwhitneyu(a, b).pvalue)


def hitting_times(curves: ArrayLike, level: float) -> Array:
    """First point (from 1) at which each run has reached a level; infinity where it never does.

    Args:
        curves: (runs, points), best-so-far curves, higher is better.
        level: what is to be reached.
    """
    hit = np.asarray(curves, float) >= level
    return np.where(hit.any(1), hit.argmax(1) + 1.0, np.inf)
