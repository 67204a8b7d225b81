"""How alike the features of two sources are: linear CKA."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lacer.agents.probes.base import Sample, Values, register_probe


def linear_cka(a: np.ndarray, b: np.ndarray) -> float:
    """Linear centred kernel alignment (Kornblith et al. 2019, 1905.00414) of two sets of features, (N, D) and (N, E).

    Returns:
        0 to 1; 0 if one of them is constant. With few rows, wide features look more alike than they are.
    """
    a, b = (x.astype(np.float64) - x.astype(np.float64).mean(0) for x in (a, b))
    norm = np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)
    return float(np.linalg.norm(a.T @ b) ** 2 / norm) if norm > 1e-18 else 0.0


def of_pairs(sample: Sample, measure: Callable[[str, str], float]) -> Values:
    """A symmetric measure for each pair of sources: by source the largest, and that with each other source."""
    out: dict[str, dict[str, float]] = {n: {} for n in sample.sources}
    for i, a in enumerate(sample.sources):
        for b in sample.sources[i + 1:]:
            out[a][b] = out[b][a] = measure(a, b)
    return {a: {"": max(values.values()), **values} for a, values in out.items() if values}


@register_probe("redundancy", "linear CKA with the most similar other source (1: the same information, 0: nothing in "
                "common); high: one of the two may be dispensable", told=True)
def _redundancy(sample: Sample) -> Values:
    return of_pairs(sample, lambda a, b: linear_cka(sample.features[a], sample.features[b]))
