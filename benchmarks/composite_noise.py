"""What CompositeBench holds: noise, what matters, how early it can be told. Reads the table; trains nothing.

    python benchmarks/composite_noise.py
    python benchmarks/composite_noise.py table=bench/mine/table.parquet

- Variance between encoders and between training seeds of one encoder (one-way analysis of variance, random effects),
  and their share: the reliability of a score from one seed, and of the mean over all seeds.
- Kendall's rank correlation between the training return after a part of the steps and the final score (means over
  seeds).
- Spearman's rank correlation of each probe of the fused state with the final score, over encoders.
- What channels can tell of luck: share of the variance of the mean of an encoder's other trainings that is explained by
  the score of one training, and by that and its learning curve and probes (cross-validated over encoders).
- Mean score by option of each decision.

The last line is JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lacer.search.tables import METADATA, arrow

TABLE = Path(__file__).parent / "data" / "composite_bench.parquet"


def explained(runs: pd.DataFrame) -> dict[str, float]:
    """R2 of regressions on what a run told, by what they read; `all but luck`: what nothing can exceed."""
    by = runs.groupby("ncode").objective
    others = (by.transform("sum") - runs.objective) / (by.transform("size") - 1)
    curve = np.stack(runs.curve_returns.to_numpy())
    half = curve.shape[1] // 2
    x = pd.DataFrame({"score": runs.objective, "end": curve[:, -1], "late": curve[:, -3:].mean(1),
                      "half": curve[:, half:half + 2].mean(1)}, index=runs.index)
    x = pd.concat([x, runs[[c for c in runs.columns if c.startswith("probe/")]]], axis=1)
    x = x.fillna(x.median()).fillna(0.0)
    ridge = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 4, 13)))
    trees = ExtraTreesRegressor(200, min_samples_leaf=5, random_state=0, n_jobs=-1)
    out = {}
    for name, columns, model in (("score", ["score"], ridge), ("score and curve", list(x.columns[:4]), ridge),
                                 ("all", list(x.columns), ridge), ("all, trees", list(x.columns), trees)):
        guess = cross_val_predict(model, x[columns], others, groups=runs.ncode, cv=GroupKFold(8))
        out[name] = 1 - float(((guess - others) ** 2).mean() / others.var(ddof=0))
    luck = by.var().mean() / (by.size().mean() - 1)
    return {**out, "all but luck": 1 - float(luck / others.var(ddof=0))}


def main(table: str = str(TABLE)) -> None:
    _, parquet = arrow()
    about = json.loads(parquet.read_schema(table).metadata[METADATA])
    frame = pd.read_parquet(table)
    ok = frame[frame.status == "ok"]
    score = ok.groupby("ncode").objective
    means, within, n = score.mean(), score.var().mean(), score.size().mean()
    between = max(0.0, means.var() - within / n)
    out: dict[str, Any] = {
        "encoders": int(ok.ncode.nunique()), "seeds": float(n), "runs": len(frame), "failed": len(frame) - len(ok),
        "score": {"worst": means.min(), "median": means.median(), "best": means.max()},
        "sd_between_encoders": between ** 0.5, "sd_between_seeds": within ** 0.5,
        "reliability_one_seed": between / (between + within), "reliability_mean": between / (between + within / n),
        "hours": ok["cost/total_seconds"].sum() / 3600, "env_steps": int(ok["cost/env_steps"].sum()),
    }
    print(f"{out['encoders']} encoders, {n:.3g} seeds each, {out['failed']} failed runs, {out['hours']:.1f} core hours")
    print(f"score: worst {means.min():.3f}, median {means.median():.3f}, best {means.max():.3f}")
    print(f"standard deviation between encoders {between ** 0.5:.4f}, between seeds {within ** 0.5:.4f}; reliability "
          f"of one seed {out['reliability_one_seed']:.3f}, of the mean {out['reliability_mean']:.3f}")

    curves = np.stack(ok.curve_returns.to_numpy())
    steps = ok.curve_steps.iloc[0]
    out["kendall_by_steps"] = {}
    for i, at in enumerate(steps):
        early = pd.Series(curves[:, i], index=ok.ncode).groupby(level=0).mean()
        out["kendall_by_steps"][str(at)] = float(stats.kendalltau(early, means[early.index]).statistic)
    print("Kendall's tau of the training return with the final score, by steps:",
          {k: round(v, 3) for k, v in out["kendall_by_steps"].items()})

    out["spearman_of_probes"] = {}
    for column in ok.columns:
        if column.startswith("probe/fused/") and column.count("/") == 2:
            values = ok.groupby("ncode")[column].mean()
            if values.notna().all() and values.nunique() > 1:
                out["spearman_of_probes"][column.split("/")[-1]] = float(
                    stats.spearmanr(values, means[values.index]).statistic)
    print("Spearman's rho of the fused state's probes with the final score:",
          {k: round(v, 3) for k, v in out["spearman_of_probes"].items()})

    out["explained"] = explained(ok)
    print("variance of the other trainings' mean score that is explained by a training's",
          {k: round(v, 3) for k, v in out["explained"].items()})

    out["by_option"] = {}
    codes = means.index.to_series().str.split(".", expand=True)
    for i, decision in enumerate(about["decisions"]):
        by = means.groupby(codes[i]).agg(["mean", "size"])
        if len(by) - ("_" in by.index) > 1:
            out["by_option"][decision["name"]] = {
                str(decision["options"][int(k)]): float(v["mean"]) for k, v in by.iterrows() if k != "_"}
            print(f"{decision['name']:24}", {k: round(v, 3) for k, v in out["by_option"][decision["name"]].items()})
    best = means.idxmax()
    encoder = json.loads(ok[ok.ncode == best].encoder.iloc[0])
    print("best:", encoder)
    out["best"] = best
    print(json.dumps({"benchmark": "composite_noise", **out}))


if __name__ == "__main__":
    main(**dict(a.split("=", 1) for a in sys.argv[1:]))
