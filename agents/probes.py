"""Representation-quality probes of one source's features or of the fused state."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler

MEANING = {
    "effective_rank": "share of the features' dimensions that are in use (0 to 1); low: collapsed or oversized",
    "linear_probe": "R2 of a linear map from the features to the true state (1 perfect, 0 useless); low: the "
    "information is lost or tangled",
    "redundancy": "linear CKA with the most similar other source (1: the same information, 0: nothing in common); "
    "high: one of the two may be dispensable",
}
"""Each probe in one line; reports and prompts share it."""


def effective_rank(features: np.ndarray) -> float:
    """Effective rank (Roy & Vetterli 2007), exp(entropy of the normalised singular values), divided by the width.

    Args:
        features: (N, D), N >= D for a fair value.

    Returns:
        A number in (0, 1]; 0 if all rows are equal. Features are centred first, so a constant has rank 0.
    """
    features = features.astype(np.float64)  # the mean of equal float32 numbers is not quite that number
    s = np.linalg.svd(features - features.mean(0), compute_uv=False)
    if s.sum() <= 1e-9 * max(1.0, float(np.abs(features).max())):
        return 0.0
    p = s / s.sum()
    p = p[p > 1e-12]
    return float(np.exp(-(p * np.log(p)).sum()) / features.shape[1])


def linear_probe(features: np.ndarray, targets: Mapping[str, np.ndarray], groups: np.ndarray) -> dict[str, float]:
    """R2, on held-out episodes, of ridge regression from features to each state variable (2208.12345).

    Args:
        features: (N, D).
        targets: by name, (N,). Variables that do not vary are left out.
        groups: (N,) episode of each row; every second episode is held out.

    Returns:
        R2 by variable, clipped at 0 from below (worse than the mean says no more than useless).
    """
    order = np.unique(groups)
    test = np.isin(groups, order[1::2])
    if not test.any() or test.all():
        return {}
    x = StandardScaler().fit(features[~test]).transform(features)
    out: dict[str, float] = {}
    for name, y in targets.items():
        y = np.asarray(y, np.float64)
        spread = y[test].var()
        if y[~test].std() < 1e-9 or spread < 1e-18:
            continue
        model = RidgeCV(alphas=np.logspace(-2, 4, 7)).fit(x[~test], y[~test])
        out[name] = float(max(0.0, 1 - np.mean((model.predict(x[test]) - y[test]) ** 2) / spread))
    return out


def linear_cka(a: np.ndarray, b: np.ndarray) -> float:
    """Linear centred kernel alignment (Kornblith et al. 2019, 1905.00414) of two sets of features, (N, D) and (N, E).

    Returns:
        0 to 1; 0 if one of them is constant. With few rows, wide features look more alike than they are.
    """
    a, b = (x.astype(np.float64) - x.astype(np.float64).mean(0) for x in (a, b))
    norm = np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)
    return float(np.linalg.norm(a.T @ b) ** 2 / norm) if norm > 1e-18 else 0.0


def probe(features: Mapping[str, np.ndarray], state: Mapping[str, np.ndarray],
          groups: np.ndarray) -> dict[str, dict[str, float]]:
    """All probes of every entry of ``features`` (sources and ``fused``), each (N, D).

    ``linear_probe`` is the mean over the state variables; ``linear_probe/NAME`` the single ones. ``redundancy/OTHER``
    is the linear CKA of two sources, ``redundancy`` the largest of a source.
    """
    out: dict[str, dict[str, float]] = {}
    for name, f in features.items():
        r2 = linear_probe(f, state, groups)
        out[name] = {"effective_rank": effective_rank(f),
                     **({"linear_probe": float(np.mean(list(r2.values())))} if r2 else {}),
                     **{f"linear_probe/{k}": v for k, v in r2.items()}}
    sources = [n for n in features if n != "fused"]
    for i, a in enumerate(sources):
        for b in sources[i + 1:]:
            out[a][f"redundancy/{b}"] = out[b][f"redundancy/{a}"] = linear_cka(features[a], features[b])
    for name in sources if len(sources) > 1 else []:
        out[name]["redundancy"] = max(v for k, v in out[name].items() if k.startswith("redundancy/"))
    return out
