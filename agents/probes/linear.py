"""What a linear map can read off the features: of the true state, the reward and the return."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler

from lacer.agents.probes.base import Sample, Values, register_probe
from lacer.agents.probes.rank import decomposed

COMPONENTS = 16
"""Principal components of each source for :func:`_unique`; with all dimensions of all sources a fit needs more rows."""


def linear_probe(features: np.ndarray, targets: Mapping[str, np.ndarray], groups: np.ndarray) -> dict[str, float]:
    """R2, on held-out episodes, of ridge regression from features to each target (2208.12345).

    Args:
        features: (N, D).
        targets: by name, (N,). Those that do not vary, or hold NaN, are left out.
        groups: (N,) episode of each row; every second episode is held out.

    Returns:
        R2 by target, clipped at 0 from below (worse than the mean says no more than useless).
    """
    order = np.unique(groups)
    test = np.isin(groups, order[1::2])
    if not test.any() or test.all():
        return {}
    y = {n: np.asarray(t, np.float64) for n, t in targets.items()}
    y = {n: t for n, t in y.items() if np.isfinite(t).all() and t[~test].std() >= 1e-9 and t[test].var() >= 1e-18}
    if not y:
        return {}
    scale = StandardScaler().fit(features[~test])
    both = np.stack(list(y.values()), 1)
    model = RidgeCV(alphas=np.logspace(-2, 4, 7), alpha_per_target=True).fit(
        scale.transform(features[~test]), both[~test])
    error = np.mean((model.predict(scale.transform(features[test])).reshape(-1, len(y)) - both[test]) ** 2, 0)
    return {n: float(max(0.0, 1 - e / t[test].var())) for (n, t), e in zip(y.items(), error, strict=True)}


def _targets(sample: Sample) -> dict[str, np.ndarray]:
    out = {f"state/{k}": v for k, v in sample.state.items()}
    for name in ("reward", "returns"):
        if (value := getattr(sample, name)) is not None:
            out[name] = value
    return out


def _r2(sample: Sample) -> dict[str, dict[str, float]]:
    """By part and target (``state/NAME``, ``reward``, ``returns``), from one fit for all targets."""
    if sample.groups is None:
        return {}
    groups = sample.groups
    return sample.once("r2", lambda: {p: linear_probe(f.astype(np.float64), _targets(sample), groups)
                                      for p, f in sample.features.items()})


@register_probe("linear_probe", "R2 of a linear map from the features to the true state (1 perfect, 0 useless); low: "
                "the information is lost or tangled; try another or a larger block", told=True)
def _linear_probe(sample: Sample) -> Values:
    out = {}
    for part, r2 in _r2(sample).items():
        state = {k.removeprefix("state/"): v for k, v in r2.items() if k.startswith("state/")}
        if state:
            out[part] = {"": float(np.mean(list(state.values()))), **state}
    return out


@register_probe("reward_probe", "R2 of a linear map from the features to the step's reward (1 perfect, 0 useless); low "
                "in the fused state: what the reward depends on is missing, or the policy has evened it out")
def _reward_probe(sample: Sample) -> Values:
    return {p: {"": r2["reward"]} for p, r2 in _r2(sample).items() if "reward" in r2}


@register_probe("return_probe", "R2 of a linear map from the features to the return from the step on (1 perfect, 0 "
                "useless); low in the fused state: the critic has little to go by, try blocks that see further back")
def _return_probe(sample: Sample) -> Values:
    return {p: {"": r2["returns"]} for p, r2 in _r2(sample).items() if "returns" in r2}


@register_probe("unique_r2", "R2 of the true state that is lost without this source (0: the others tell all that it "
                "tells); 0 and a low linear_probe: leave it out; 0 and high redundancy: leave one of the two out")
def _unique(sample: Sample) -> Values:
    """R2(all sources) - R2(all but one), mean over the state variables; over reward and return where there are none."""
    targets = _targets(sample)
    targets = {k: v for k, v in targets.items() if k.startswith("state/")} or targets
    if sample.groups is None or len(sample.sources) < 2 or not targets:
        return {}
    components = {}
    for n in sample.sources:
        u, s = decomposed(sample, n)
        components[n] = (u * s)[:, :COMPONENTS]
    whole = linear_probe(np.concatenate(list(components.values()), 1), targets, sample.groups)
    out = {}
    for n in sample.sources if whole else ():
        rest = linear_probe(np.concatenate([c for k, c in components.items() if k != n], 1), targets, sample.groups)
        out[n] = {"": float(np.mean([whole[k] - rest[k] for k in whole]))}
    return out
