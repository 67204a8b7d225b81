"""Mutual information between features and the return, the action, and other sources' features."""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import cdist
from scipy.special import digamma

from lacer.agents.probes.base import Sample, Values, register_probe
from lacer.agents.probes.rank import decomposed
from lacer.agents.probes.similarity import of_pairs

NEIGHBOURS = 4
COMPONENTS = 5
"""Principal components that stand for the features: with more, the estimate is far too low."""
ROWS = 256
"""At most; time and memory grow with their square."""
_SAME = 1e-6
"""Distance, in standard deviations of the first component, below which two points are one."""


def distances(x: np.ndarray) -> np.ndarray:
    """(N, N) largest difference of a coordinate, of points (N, D) scaled so that the widest coordinate has standard
    deviation 1. Points as good as equal are at 0."""
    x = x.astype(np.float64).reshape(len(x), -1)
    spread = x.std(0).max(initial=0.0)
    if spread <= 1e-12 * max(1.0, float(np.abs(x).max(initial=0.0))):
        return np.zeros((len(x), len(x)))
    d = cdist(x / spread, x / spread, "chebyshev")
    d[d < _SAME] = 0
    return d


def classes(y: np.ndarray) -> np.ndarray:
    """(N, N) 0 between equal rows of ``y`` (N, D), infinite between others."""
    return np.where(cdist(y.astype(np.float64), y.astype(np.float64), "chebyshev") > 0, np.inf, 0.0)


def mutual_information(x: np.ndarray, y: np.ndarray, k: int = NEIGHBOURS) -> float:
    """Mutual information in nats: the first estimator of Kraskov, Stögbauer & Grassberger (2004), from distances.

    Where a row's k nearest neighbours coincide with it, as discrete or repeated values do, counts take the distance's
    place (Gao et al. 2017, 1709.06212); with :func:`classes` for ``y`` it is the estimator of Ross (2014). Biased low
    in high dimensions and for strong dependence.

    Args:
        x, y: (N, N) distances of the same rows, see :func:`distances` and :func:`classes`.
        k: neighbours; rows with fewer neighbours at a finite distance are left out.

    Returns:
        At least 0; 0 for less than 2 k rows.
    """
    if len(x) < 2 * k:
        return 0.0
    both = np.maximum(x, y)
    np.fill_diagonal(both, np.inf)
    radius = np.partition(both, k - 1, axis=1)[:, k - 1]
    keep = np.isfinite(radius)
    if not keep.all():
        if keep.sum() < 2 * k:
            return 0.0
        return mutual_information(x[np.ix_(keep, keep)], y[np.ix_(keep, keep)], k)
    tie, r = radius == 0, radius[:, None]
    # Counts include the row itself, as the paper's n + 1 does; at a tie all points at distance 0 count.
    near = [np.where(tie, (d == 0).sum(1), (d < r).sum(1)) for d in (x, y)]
    kk = np.where(tie, (both == 0).sum(1) + 1, k)
    value = digamma(len(x)) + np.mean(digamma(kk) - digamma(near[0]) - digamma(near[1]))
    return float(max(0.0, value))


def _rows(sample: Sample) -> np.ndarray:
    n = len(next(iter(sample.features.values())))
    return np.linspace(0, n - 1, min(n, ROWS)).round().astype(int)


def _distances(sample: Sample, part: str) -> np.ndarray:
    def make() -> np.ndarray:
        u, s = decomposed(sample, part)
        return distances((u * s)[_rows(sample), :COMPONENTS])

    return sample.once(("distances", part), make)


def _with(sample: Sample, target: np.ndarray) -> Values:
    return {p: {"": mutual_information(_distances(sample, p), target)} for p in sample.features}


@register_probe("mi_return", "mutual information of the features and the return from the step on, in nats (0: none); "
                "low in every part: nothing tells good moments from bad ones")
def _mi_return(sample: Sample) -> Values:
    return {} if sample.returns is None else _with(sample, distances(sample.returns[_rows(sample)]))


@register_probe("mi_action", "mutual information of the features and the greedy action, in nats (0: none); low: the "
                "policy does not act on this source; leave it out or give it a stronger block")
def _mi_action(sample: Sample) -> Values:
    if sample.action is None:
        return {}
    action = sample.action[_rows(sample)]
    if np.issubdtype(action.dtype, np.integer):
        return _with(sample, classes(action))
    if action.shape[1] > COMPONENTS:
        u, s, _ = np.linalg.svd(action - action.mean(0), full_matrices=False)
        action = (u * s)[:, :COMPONENTS]
    return _with(sample, distances(action))


@register_probe("mi_redundancy", "mutual information with the other source that shares most, in nats (0: none); finds "
                "what redundancy misses because it is not linear; high: one of the two may be dispensable")
def _mi_redundancy(sample: Sample) -> Values:
    return of_pairs(sample, lambda a, b: mutual_information(_distances(sample, a), _distances(sample, b)))
