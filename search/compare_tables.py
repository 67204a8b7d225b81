"""The figures of a comparison, as tidy tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from lacer.agents import Evaluation
from lacer.agents.stats import (
    Array,
    Comparison,
    bootstrap,
    compare,
    hitting_times,
    iqm,
    least_p,
    performance_profile,
    stratified_bootstrap,
)
from lacer.envs import Objective
from lacer.search.compare import Entry
from lacer.search.outcome import EXPERT, NOOP, WINNER, paired_difference
from lacer.search.runs import StoredRun
from lacer.search.study import score_of

AXES = {"candidates": "candidates", "env_steps": "environment steps, a designer’s own training included",
        "seconds": "wall time (s)"}
"""What the best so far is shown against."""

POINTS = 120
"""Points of a curve over environment steps or seconds."""


@dataclass(frozen=True)
class Compared:
    """Runs side by side.

    Scores are of two kinds, and no table mixes them. *Selection* scores are those that the searches chose by:
    curves and evaluations needed are made of them, and the best of many is too good to be true. *Final* scores are of
    the winner, trained anew with another seed and evaluated on episodes that took no part in its selection: ranking,
    tests and profiles are made of them alone. Searches with a plain function have only the former.

    Attributes:
        folder: where it is written.
        title: of the page.
        entries: the runs.
        given_levels: scores to be reached, if they were given.
        notes: what a reader must know.
        objectives: by environment's label.
    """

    folder: Path
    title: str
    entries: Sequence[Entry]
    given_levels: tuple[float, ...]
    notes: Sequence[str]
    objectives: Mapping[str, Objective]

    @property
    def envs(self) -> list[str]:
        """Labels of the environments; one "" where there is one only."""
        return list(dict.fromkeys(e.env for e in self.entries))

    @property
    def labels(self) -> list[str]:
        """Labels of the designers."""
        return list(dict.fromkeys(e.label for e in self.entries))

    @property
    def plain(self) -> bool:
        """Whether the objective was a function, so that there are no final scores but those of the search."""
        return self.entries[0].run.plain

    def runs(self, env: str, label: str) -> list[StoredRun]:
        """Runs of a designer in an environment, by seed."""
        found = [e.run for e in self.entries if (e.env, e.label) == (env, label)]
        return sorted(found, key=lambda r: int(r.config.get("seed", 0)))

    def sign(self, env: str) -> float:
        """1 where higher is better, else -1."""
        return self.objectives[env].signed(1.0)

    # -- what was measured ---

    @cached_property
    def searches(self) -> pd.DataFrame:
        """One row a search: what it chose, what that is worth, what it took."""
        return pd.DataFrame([self._search(e) for e in self.entries])

    def _search(self, e: Entry) -> dict[str, object]:
        run, winner = e.run, e.run.winner
        trials = [t.trial for t in run.trials]
        counts = {s: sum(t.status == s for t in trials) for s in ("ok", "failed", "pruned", "rejected")}
        repeated = len(run.repeated())
        finals = run.finals
        own = sum(int(t.proposal.meta.get("env_steps") or 0) for t in trials)
        usage = run.usage
        metric = run.objective.metric
        chosen = score_of(winner.trial, trials) if winner is not None else None
        final = chosen if run.plain else _score(finals.get(WINNER))
        expert, noop = _score(finals.get(EXPERT)), _score(finals.get(NOOP))
        gain = _gain(finals, metric)
        return {
            "environment": e.env, "designer": e.label, "seed": run.config.get("seed", 0), "run": run.place,
            "winner": winner.trial.number if winner is not None else None, "winner_selection_score": chosen,
            "final_score": final, "final_expert": expert, "final_doing_nothing": noop,
            "gain_over_expert": gain[0], "gain_low": gain[1], "gain_high": gain[2],
            "final_problem": "" if run.plain or final is not None else (
                finals[WINNER].reason if WINNER in finals else "the winner was not trained"),
            "proposals": len(trials), "evaluated": counts["ok"] + counts["failed"] + counts["pruned"],
            **counts, "duplicates": repeated, "invalid": counts["rejected"] - repeated,
            "env_steps": sum(t.env_steps for t in trials), "env_steps_of_designer": own,
            "env_steps_of_finals": sum(f.cost.env_steps for n, f in finals.items()
                                       if n != EXPERT or f is not finals.get(WINNER)),
            "seconds": run.seconds, "ended": run.ended,
            **{k: usage.get(k, 0.0) for k in ("requests", "tokens_in", "tokens_out")},
            "llm_seconds": usage.get("seconds", 0.0), "us_dollars": usage.get("cost") if usage else 0.0}

    @cached_property
    def curves(self) -> pd.DataFrame:
        """Best selection score so far: interquartile mean over seeds with a 95 % bootstrap band, by designer, against
        each of ``AXES``. Given where all seeds have a result; a search that has ended keeps its last value."""
        parts = []
        for env in self.envs:
            for label in self.labels:
                runs = self.runs(env, label)
                paths = [_path(r) for r in runs]
                if not paths:
                    continue
                for axis in AXES:
                    grid = _grid(axis, paths)
                    values = np.array([_at(grid, p[axis], p["best"]) for p in paths]).reshape(len(paths), len(grid))
                    whole = np.isfinite(values).all(0)
                    if not whole.any():
                        continue
                    low, high = bootstrap(values[:, whole], "iqm", draws=2000)
                    parts.append(pd.DataFrame({
                        "environment": env, "designer": label, "axis": axis, "x": grid[whole],
                        "iqm": iqm(values[:, whole]), "low": low, "high": high, "mean": values[:, whole].mean(0),
                        "seeds": len(paths)}))
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(
            columns=["environment", "designer", "axis", "x", "iqm", "low", "high", "mean", "seeds"])

    # -- what may be said ---

    def scores(self, env: str) -> dict[str, Array]:
        """Final scores by designer; searches without one are left out."""
        s = self.searches[self.searches["environment"] == env]
        out = {n: np.array(s[s["designer"] == n]["final_score"].dropna(), float) for n in self.labels}
        return {n: v for n, v in out.items() if len(v)}

    def tested(self, env: str) -> dict[str, Array]:
        """Final scores of the designers that can be tested: those with several searches that have one."""
        return {n: v for n, v in self.scores(env).items() if len(v) > 1}

    @cached_property
    def pairs(self) -> dict[str, list[Comparison]]:
        """All pairs of designers by environment; p-values corrected for all pairs of the environment (Holm)."""
        return {env: compare(self.tested(env), higher_is_better=self.sign(env) > 0) for env in self.envs}

    @cached_property
    def ranking(self) -> pd.DataFrame:
        """Designers by environment, the best interquartile mean of the final scores first, with the others that the
        corrected tests say it is better than."""
        rows = []
        for env in self.envs:
            for label, v in self.scores(env).items():
                low, high = bootstrap(v, "iqm") if len(v) > 1 else (math.nan, math.nan)
                beats = [c.b if c.a == label else c.a for c in self.pairs[env] if c.better == label]
                rows.append({"environment": env, "designer": label, "seeds": len(v), "iqm": float(iqm(v)),
                             "low": float(low), "high": float(high), "mean": float(v.mean()),
                             "better_than": ", ".join(beats)})
        table = pd.DataFrame(rows, columns=["environment", "designer", "seeds", "iqm", "low", "high", "mean",
                                            "better_than"])
        key = [self.envs.index(r["environment"]) * 1e6 for _, r in table.iterrows()]
        worth = [-self.sign(r["environment"]) * r["iqm"] for _, r in table.iterrows()]
        return table.iloc[np.lexsort((worth, key))].reset_index(drop=True) if len(table) else table

    def least_p(self, env: str) -> float:
        """The smallest corrected p-value that so many seeds can give; above 0.05 nothing can be told apart."""
        return least_p([len(v) for v in self.tested(env).values()])

    def seeds_needed(self, env: str) -> int:
        """Seeds per designer from which the corrected test can tell something apart."""
        groups = len(self.tested(env))
        return next(n for n in range(2, 100) if least_p([n] * groups) < 0.05)

    def levels(self, env: str) -> dict[str, float]:
        """Selection scores that designers are to reach, by name."""
        if self.given_levels:
            return {f"{v:g}": v for v in self.given_levels}
        sign = self.sign(env)
        results = [t.trial for e in self.entries if e.env == env for t in e.run.results]
        every = np.array([sign * t.objective for t in results if t.objective is not None])
        out = {}
        experts = [t.objective for t in results if t.proposal.designer == EXPERT and t.objective is not None]
        if experts:
            out["the expert’s encoder"] = float(np.mean(experts))
        if len(every) >= 10:
            out["best tenth of all candidates"] = sign * float(np.quantile(every, 0.9))
        if len(every) >= 100:
            out["best hundredth"] = sign * float(np.quantile(every, 0.99))
        return out

    @cached_property
    def reached(self) -> pd.DataFrame:
        """Per level: the share of seeds whose best selection score reaches it, and the median and 80th percentile of
        the candidates that they need (infinite where fewer reach it)."""
        rows = []
        for env in self.envs:
            for name, level in self.levels(env).items():
                for label in self.labels:
                    sign, needed = self.sign(env), []
                    for run in self.runs(env, label):
                        best = sign * np.nan_to_num(_path(run)["best"], nan=-sign * np.inf)
                        needed.append(float(hitting_times(best[None], sign * level)[0]) if len(best) else math.inf)
                    if needed:
                        rows.append({"environment": env, "designer": label, "level": name, "score": level,
                                     "share": float(np.isfinite(needed).mean()),
                                     "median": float(np.quantile(needed, 0.5, method="higher")),
                                     "p80": float(np.quantile(needed, 0.8, method="higher"))})
        return pd.DataFrame(rows, columns=["environment", "designer", "level", "score", "share", "median", "p80"])

    def normalised(self, env: str) -> tuple[dict[str, Array], str]:
        """Final scores with 0 doing nothing and 1 the expert's encoder, or where the expert gained nothing, with 0 the
        worst and 1 the best of all; and which."""
        s = self.searches[self.searches["environment"] == env]
        zero, one = (float(s[k].astype(float).mean()) for k in ("final_doing_nothing", "final_expert"))
        how = "0 is doing nothing, 1 the expert’s encoder"
        if not np.isfinite([zero, one]).all() or self.sign(env) * (one - zero) <= 0:
            every = [float(v) for values in self.scores(env).values() for v in values] or [0.0]
            zero, one = sorted((min(every), max(every)), reverse=self.sign(env) < 0)
            how = "0 is the worst of all searches, 1 the best"
        return {n: (v - zero) / ((one - zero) or 1.0) for n, v in self.scores(env).items()}, how

    @cached_property
    def profiles(self) -> pd.DataFrame:
        """Performance profiles: the share of searches whose winner scores more than x, with 95 % bands; over several
        environments, of normalised scores, each environment weighing the same."""
        many = len(self.envs) > 1
        by_env = [self.normalised(env)[0] if many else {n: self.sign(env) * v for n, v in self.scores(env).items()}
                  for env in self.envs]
        every = np.concatenate([np.zeros(0), *(v for scores in by_env for v in scores.values())])
        columns = ["designer", "score", "share", "low", "high"]
        if not len(every):
            return pd.DataFrame(columns=columns)
        margin = 0.05 * (np.ptp(every) or 1.0)
        at = np.linspace(every.min() - margin, every.max() + margin, POINTS)
        parts = []
        for label in self.labels:
            strata = [scores[label] for scores in by_env if label in scores]
            if len(strata) == len(by_env):
                share, low, high = performance_profile(strata, at)
                shown = at if many else self.sign(self.envs[0]) * at
                parts.append(pd.DataFrame({"designer": label, "score": shown, "share": share, "low": low,
                                           "high": high}))
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)

    @cached_property
    def overall(self) -> pd.DataFrame:
        """Over several environments: interquartile mean of all normalised final scores of a designer, with its 95 %
        stratified bootstrap interval; empty with one environment."""
        rows = []
        if len(self.envs) > 1:
            by_env = [self.normalised(env)[0] for env in self.envs]
            for label in self.labels:
                strata = [scores[label] for scores in by_env if label in scores]
                if len(strata) == len(by_env):
                    low, high = stratified_bootstrap(strata)
                    rows.append({"designer": label, "iqm": float(iqm(np.concatenate(strata))), "low": low, "high": high,
                                 "searches": sum(map(len, strata))})
        table = pd.DataFrame(rows, columns=["designer", "iqm", "low", "high", "searches"])
        return table.sort_values("iqm", ascending=False, ignore_index=True)

    @cached_property
    def costs(self) -> pd.DataFrame:
        """What a search took, mean over seeds."""
        columns = ["env_steps", "env_steps_of_designer", "env_steps_of_finals", "seconds", "requests", "tokens_in",
                   "tokens_out", "llm_seconds", "us_dollars"]
        table = self.searches.assign(us_dollars=self.searches["us_dollars"].astype(float))
        groups = table.groupby(["environment", "designer"], sort=False)[columns]
        return groups.agg(lambda v: v.mean(skipna=False)).reset_index()  # what one does not know, nobody knows

    @cached_property
    def rates(self) -> pd.DataFrame:
        """What became of the proposals, over all seeds."""
        columns = ["proposals", "evaluated", "ok", "failed", "pruned", "duplicates", "invalid"]
        table = self.searches.groupby(["environment", "designer"], sort=False)[columns].sum().reset_index()
        for name in ("evaluated", "duplicates", "invalid"):
            table[f"{name}_rate"] = table[name] / table["proposals"].clip(lower=1)
        for name in ("failed", "pruned"):
            table[f"{name}_rate"] = table[name] / table["evaluated"].clip(lower=1)
        return table


def _score(e: Evaluation | None) -> float | None:
    return e.objective if e is not None and e.ok else None


def _gain(finals: Mapping[str, Evaluation], metric: str) -> tuple[float, float, float]:
    """Winner less expert on the same episodes, with a 95 % bootstrap interval over the episodes; NaN where one of them
    has no result."""
    a, b = finals.get(WINNER), finals.get(EXPERT)
    if a is None or b is None or not a.ok or not b.ok or a.episode_seeds != b.episode_seeds or not (
            metric in a.metrics and metric in b.metrics):
        return (math.nan,) * 3
    return paired_difference(a, b, metric)


def _path(run: StoredRun) -> dict[str, Array]:
    """Where a search stood after each of its results: candidates, environment steps, seconds, best selection score."""
    sign = run.objective.signed(1.0)
    results = run.results
    own = sorted((run.clock(t.started), int(t.trial.proposal.meta.get("env_steps") or 0)) for t in run.trials)
    best, steps, out = -math.inf, 0, []
    candidates = 0
    for t in results:
        assert t.ended is not None
        candidates += t.trial.survivor is None
        e, clock = t.trial.evaluation, run.clock(t.ended)
        steps += e.cost.env_steps if e is not None else 0
        if t.trial.objective is not None and t.trial.survivor is None:
            best = max(best, sign * t.trial.objective)
        so_far = sign * best if math.isfinite(best) else math.nan
        out.append((candidates, steps + sum(s for begun, s in own if begun < clock), clock, so_far))
    table = np.array(out, float).reshape(-1, 4)
    return {"candidates": table[:, 0], "env_steps": table[:, 1], "seconds": table[:, 2], "best": table[:, 3]}


def _grid(axis: str, paths: Sequence[Mapping[str, Array]]) -> Array:
    end = max((float(p[axis][-1]) for p in paths if len(p[axis])), default=0.0)
    return np.arange(1.0, end + 1) if axis == "candidates" else np.linspace(0, end, POINTS + 1)[1:]


def _at(grid: Array, x: Array, y: Array) -> Array:
    """A step function: the value of the last x that is not beyond each point, NaN before the first."""
    i = np.searchsorted(x, grid, side="right") - 1
    return np.where(i >= 0, y[np.maximum(i, 0)], np.nan) if len(y) else np.full(len(grid), np.nan)
