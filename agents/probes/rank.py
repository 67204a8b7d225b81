"""How many dimensions of the features are in use: effective rank and srank."""

from __future__ import annotations

import numpy as np

from lacer.agents.probes.base import Sample, Values, register_probe


def decompose(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors (N, K) and singular values (K,) of centred features (N, D); all zero if rows are equal.

    The columns of their product are the rows' principal components.
    """
    x = features.astype(np.float64)  # the mean of equal float32 numbers is not quite that number
    u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    if s.sum() <= 1e-9 * max(1.0, float(np.abs(x).max())):
        s = np.zeros_like(s)
    return u, s


def decomposed(sample: Sample, part: str) -> tuple[np.ndarray, np.ndarray]:
    """:func:`decompose` of a part's features, made once."""
    return sample.once(("svd", part), lambda: decompose(sample.features[part]))


def effective_rank(s: np.ndarray, width: int) -> float:
    """Effective rank (Roy & Vetterli 2007), exp(entropy of the normalised singular values), divided by the width.

    Args:
        s: singular values of centred features.
        width: number of features; there should be as many rows for a fair value.

    Returns:
        A number in (0, 1]; 0 if all singular values are.
    """
    if not s.any():
        return 0.0
    p = s / s.sum()
    p = p[p > 1e-12]
    return float(np.exp(-(p * np.log(p)).sum()) / width)


def srank(s: np.ndarray, width: int, share: float = 0.99) -> float:
    """srank (Kumar et al. 2021, 2010.14498), divided by the width: the smallest k whose k largest singular values make
    up ``share`` of the sum of all. Arguments as in :func:`effective_rank`."""
    if not s.any():
        return 0.0
    return float(np.searchsorted(np.cumsum(s) / s.sum(), share - 1e-12) + 1) / width


@register_probe("effective_rank", "share of the features' dimensions that are in use (0 to 1); low: collapsed or wider "
                "than needed, try a narrower or another block; near 1: a wider one may hold more", told=True)
def _effective_rank(sample: Sample) -> Values:
    return {p: {"": effective_rank(decomposed(sample, p)[1], f.shape[1])} for p, f in sample.features.items()}


@register_probe("srank", "share of the features' dimensions that hold 99 % of the singular values (0 to 1); read as "
                "effective_rank, but small directions count as much as large ones")
def _srank(sample: Sample) -> Values:
    return {p: {"": srank(decomposed(sample, p)[1], f.shape[1])} for p, f in sample.features.items()}
