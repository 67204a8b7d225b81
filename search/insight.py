"""What can be read out of all trials together: which decisions mattered, and whether the designer foresaw results."""

from __future__ import annotations

import base64
import gzip
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from lacer.search.drawing import clean
from lacer.search.study import Trial

ENOUGH = 10
"""Trials with a result below which importances are not estimated."""
TREES = 16
PROMPT_BYTES = 800_000
"""Most that the prompts may add to a report."""


@dataclass(frozen=True)
class Importance:
    """Share of the objective's variance that each decision explains by itself.

    Attributes:
        shares: by decision, the largest first; they sum to 1 over the decisions that were looked at.
        trials: how many results they rest on.
        options: per decision how many options were tried.
    """

    shares: Mapping[str, float]
    trials: int
    options: Mapping[str, int]


def decision_importance(trials: Sequence[Trial]) -> Importance | None:
    """Functional ANOVA of a random forest (Hutter et al. 2014, ICML), as Optuna computes it.

    Only decisions that every encoder takes are looked at: which block for each source, and which fusion. The fields of
    a block are chosen only where it is, too seldom for an estimate.

    Returns:
        None with fewer than :data:`ENOUGH` results, without differences between them, or without a varying decision.
    """
    done = [t for t in trials if t.objective is not None and math.isfinite(t.objective) and t.proposal.point]
    if len(done) < ENOUGH or len({t.objective for t in done}) < 2:
        return None
    points = [t.proposal.point or {} for t in done]
    common = [d for d in points[0] if all(d in p for p in points)]
    tried = {d: list({repr(p[d]): p[d] for p in points}.values()) for d in common}
    tried = {d: options for d, options in tried.items() if len(options) > 1}
    if not tried:
        return None
    import optuna

    kinds = {d: optuna.distributions.CategoricalDistribution([repr(o) for o in options])
             for d, options in tried.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = optuna.create_study(storage=optuna.storages.InMemoryStorage(), study_name="importance")
        study.add_trials([optuna.trial.create_trial(params={d: repr(p[d]) for d in kinds}, distributions=dict(kinds),
                                                    value=t.objective) for t, p in zip(done, points, strict=True)])
        found = optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.FanovaImportanceEvaluator(n_trees=TREES, seed=0))
    shares = {d: float(v) for d, v in sorted(found.items(), key=lambda x: -x[1])}
    if not shares or not all(map(math.isfinite, shares.values())):
        return None
    return Importance(shares, len(done), {d: len(o) for d, o in tried.items()})


@dataclass(frozen=True)
class Predictions:
    """What the designer expected of its encoders, and what came out.

    Attributes:
        points: (trial, expected, outcome).
        bias: mean of outcome - expected.
        error: mean absolute error.
        baseline: the error of always expecting the mean of the earlier outcomes.
        rank: Spearman's correlation of the two, None with fewer than 3 or without differences.
    """

    points: tuple[tuple[int, float, float], ...]
    bias: float
    error: float
    baseline: float | None
    rank: float | None


def predictions(trials: Sequence[Trial]) -> Predictions | None:
    """Compares ``expected`` of the proposals with the outcomes; None where nothing was predicted."""
    points, base = [], []
    earlier: list[float] = []
    for t in trials:
        if t.objective is None:
            continue
        expected = t.proposal.meta.get("expected")
        if isinstance(expected, int | float) and not isinstance(expected, bool) and math.isfinite(expected):
            points.append((t.number, float(expected), t.objective))
            if earlier:
                base.append(abs(t.objective - float(np.mean(earlier))))
        earlier.append(t.objective)
    if not points:
        return None
    x, y = np.array([p[1] for p in points]), np.array([p[2] for p in points])
    varied = len(points) >= 3 and np.ptp(x) > 0 and np.ptp(y) > 0
    return Predictions(tuple(points), float((y - x).mean()), float(np.abs(y - x).mean()),
                       float(np.mean(base)) if base else None, float(stats.spearmanr(x, y)[0]) if varied else None)


def pack_prompts(prompts: Mapping[int, Sequence[tuple[str, str]]], order: Sequence[int]) -> tuple[str, set[int]]:
    """Prompts and replies as base64 of gzipped JSON: ``{"lines": [...], "trials": {number: [[title, [line, ...]]]}}``.

    Prompts of a search repeat most of their lines, so each line is kept once.

    Args:
        prompts: by trial.
        order: trials, those first that are to be kept if not all fit in.

    Returns:
        the text ("" without prompts) and the trials that are in it.
    """
    kept = [n for n in order if n in prompts]
    while kept:
        lines: dict[str, int] = {}
        trials = {n: [[clean(title), [lines.setdefault(line, len(lines)) for line in clean(text).split("\n")]]
                      for title, text in prompts[n]] for n in kept}
        data = json.dumps({"lines": list(lines), "trials": trials}, separators=(",", ":"))
        text = base64.b64encode(gzip.compress(data.encode(), mtime=0)).decode()
        if len(text) <= PROMPT_BYTES:
            return text, set(kept)
        kept = kept[:len(kept) * 2 // 3]
    return "", set()
