"""Multi-fidelity search: how well do early scores rank encoders, and how many environment steps does halving save?

On CompositeBench (642 encoders x 3 training seeds, with learning curves; probes in mid-training from
`composite_probes.py`):

- Kendall's rank correlation of each signal at each rung with the score after all 2,048 steps, mean of the other seeds.
- Simulated random searches. Halving's rule is Optuna's asynchronous one (checked here against
  `lacer.search.fidelity`). The plain search trains and evaluates every candidate (2,048 + 512 steps) and takes the best.
  A winner's quality is the mean score of training seeds that took no part in choosing it. The factor is what the plain
  search of so many candidates takes, divided by what halving takes until its mean quality is the same; its 95 %
  interval is a bootstrap over searches. Rungs, reduction, signal and survivors are chosen on one half of the encoders,
  the factor is reported on the other half.

    python benchmarks/fidelity.py
    python benchmarks/fidelity.py searches=400 plain=20,40,80

The last line is JSON. Trains nothing.
"""

from __future__ import annotations

import json
import sys
from bisect import insort
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from lacer.search.fidelity import Fidelity, promotes, ranked

DATA = Path(__file__).parent / "data"
RUNGS = (256, 512, 768, 1024)
FULL, EVALUATION = 2048, 512
SIGNALS = ("return", "probe:linear_probe", "return+probe:linear_probe")
CHOSEN_FOR = 40
"""Candidates of the plain search whose quality is to be reached when a setting is chosen."""


class Runs(NamedTuple):
    """Runs that can guide a search: one for each encoder (rows).

    Attributes:
        early: by signal, (encoders, rungs).
        score: after all steps.
        others: scores of the encoder's other two training seeds, (encoders, 2).
    """

    early: dict[str, np.ndarray]
    score: np.ndarray
    others: np.ndarray


class Setting(NamedTuple):
    """What is simulated; without rungs and survivors: the plain search."""

    signal: str = "return"
    rungs: tuple[int, ...] = ()
    reduction: int = 3
    survivors: int = 0


PLAIN = Setting()


def read() -> dict[int, Runs]:
    """The runs by the seed that guides; rows are encoders in the order of their codes."""
    table = pd.read_parquet(DATA / "composite_bench.parquet", columns=["ncode", "seed", "objective", "curve_returns"])
    probes = pd.read_parquet(DATA / "composite_probes.parquet")
    codes = np.array(sorted(table.ncode.unique()))
    score = table.pivot(index="ncode", columns="seed", values="objective").loc[codes]
    out = {}
    for seed in sorted(probes.seed.unique()):
        curves = table[table.seed == seed].set_index("ncode").loc[codes, "curve_returns"]
        found = probes[probes.seed == seed].pivot(index="ncode", columns="step", values="probe/fused/linear_probe")
        if len(found) < len(codes):
            continue  # not all are recorded
        out[int(seed)] = Runs(
            {"return": np.stack(curves.to_numpy())[:, [r // 256 - 1 for r in RUNGS]],
             "probe:linear_probe": found.loc[codes, list(RUNGS)].to_numpy()},
            score[seed].to_numpy(), score.drop(columns=seed).to_numpy())
    return out


def search(runs: Runs, order: np.ndarray, setting: Setting,
           rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A random search that proposes encoders in an order.

    Returns:
        Environment steps and quality of the winner, after each candidate.
    """
    names, levels = setting.signal.split("+"), [RUNGS.index(r) for r in setting.rungs]
    seen: list[dict[str, list[float]]] = [{n: [] for n in names} for _ in levels]
    own: list[list[tuple[float, ...]]] = [[] for _ in levels]
    done: list[tuple[float, int]] = []  # score and encoder, the best last
    spent, steps, quality = 0, np.zeros(len(order)), np.zeros(len(order))
    picks = rng.integers(2, size=len(order))  # which of the other seeds a survivor gets
    for i, encoder in enumerate(order):
        before = 0
        for level, rung in enumerate(setting.rungs):
            spent += rung - before
            before = rung
            scores = tuple(float(runs.early[n][encoder, levels[level]]) for n in names)
            for n, v in zip(names, scores, strict=True):
                insort(seen[level][n], v)
            own[level].append(scores)
            allowed = max(1, len(own[level]) // setting.reduction)
            if len(names) == 1:
                ok = scores[0] >= seen[level][names[0]][-allowed]
            else:
                values = sum(stats.rankdata(column) for column in np.array(own[level]).T)
                ok = values[-1] >= np.sort(values)[-allowed]
            if not ok:
                break
        else:
            spent += FULL - before + EVALUATION
            insort(done, (float(runs.score[encoder]), int(encoder)))
        steps[i] = spent
        if setting.survivors:
            best = done[-setting.survivors:]
            again = {e: picks[e % len(picks)] for _, e in best}
            winner = max(best, key=lambda x: x[0] + runs.others[x[1], again[x[1]]])[1]
            quality[i] = runs.others[winner, 1 - again[winner]]
            steps[i] += len(best) * (FULL + EVALUATION)
        else:
            quality[i] = runs.others[done[-1][1]].mean()
    return steps, quality


def simulate(runs: dict[int, Runs], pool: np.ndarray, setting: Setting, searches: int, longest: int,
             seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps and quality of many searches, (searches, candidates). The same seed: the same orders of encoders."""
    seeds, out = list(runs), []
    for i in range(searches):
        rng = np.random.default_rng([seed, i])
        out.append(search(runs[seeds[i % len(seeds)]], rng.permutation(pool)[:longest], setting, rng))
    return np.stack([s for s, _ in out]), np.stack([q for _, q in out])


def saved(plain: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray], candidates: int,
          draw: np.ndarray | slice = slice(None)) -> float:
    """What the plain search of so many candidates takes over what the other takes for its mean quality; 0 if it never
    gets there."""
    target = plain[1][draw, candidates - 1].mean()
    quality = np.maximum.accumulate(other[1][draw].mean(0))
    if quality[-1] < target:
        return 0.0
    return float(plain[0][draw, candidates - 1].mean() / other[0][draw, int(np.argmax(quality >= target))].mean())


def interval(plain: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray], candidates: int) -> list[float]:
    """:func:`saved` and its 95 % bootstrap interval over searches."""
    rng, n = np.random.default_rng(0), len(plain[0])
    draws = [saved(plain, other, candidates, rng.integers(n, size=n)) for _ in range(1000)]
    return [round(float(v), 2) for v in (saved(plain, other, candidates), *np.quantile(draws, [0.025, 0.975]))]


def settings() -> list[Setting]:
    """All that are tried."""
    ladders = [c for k in (1, 2, 3) for c in combinations(RUNGS, k)]
    return [Setting(signal, ladder, reduction, survivors) for signal in SIGNALS for ladder in ladders
            for reduction in (2, 3, 4) for survivors in (0, 3, 6)]


def correlations(runs: dict[int, Runs]) -> dict[str, dict[str, list[float]]]:
    """Kendall's tau with the final score of the other seeds, by signal and rung, and its 95 % bootstrap interval over
    encoders; the mean over guiding seeds."""
    out: dict[str, dict[str, list[float]]] = {}
    for signal in SIGNALS:
        for i, rung in enumerate(RUNGS):
            def tau(keep: np.ndarray, signal: str = signal, i: int = i) -> float:
                return float(np.mean([stats.kendalltau(
                    sum(stats.rankdata(r.early[n][keep, i]) for n in signal.split("+")),
                    r.others[keep].mean(1)).statistic for r in runs.values()]))

            n = len(next(iter(runs.values())).score)
            rng = np.random.default_rng(0)
            draws = [tau(rng.integers(n, size=n)) for _ in range(200)]
            out.setdefault(signal, {})[str(rung)] = [round(v, 3) for v in (
                tau(np.arange(n)), *map(float, np.quantile(draws, [0.025, 0.975])))]
    return out


def check_rule(runs: Runs) -> int:
    """Compares the rule above with the search's own, on 60 candidates. Returns how many judgements agree: all."""
    order = np.random.default_rng(5).permutation(len(runs.score))[:60]
    agreed = 0
    for signal in SIGNALS:
        setting = Setting(signal, (256, 1024), 3)
        fidelity = Fidelity(rungs=setting.rungs, reduction=3, signal=signal)
        steps, _ = search(runs, order, setting, np.random.default_rng(0))
        taken, reached, spent = np.diff([0, *steps]), [{}, {}], 0  # type: ignore[var-annotated]
        for number, encoder in enumerate(order):
            used = 0
            for level, rung in enumerate(setting.rungs):
                used, shown = rung, {n: float(runs.early[n][encoder, RUNGS.index(rung)]) for n in signal.split("+")}
                others = list(reached[level])
                values = ranked(fidelity.signals, [shown, *(reached[level][o] for o in others)])
                assert values is not None
                reached[level][number] = shown
                if not promotes(fidelity, number, float(values[0] or 0.0), {
                        o: float(v or 0.0) for o, v in zip(others, values[1:], strict=True)}, level):
                    break
            else:
                used = FULL + EVALUATION
            spent += used
            if used != taken[number]:
                raise SystemExit(f"{signal}: candidate {number} takes {taken[number]:g} steps here, {used} in a search")
            agreed += 1
    return agreed


def describe(s: Setting) -> str:
    """One line."""
    return (f"{s.signal}, rungs {'/'.join(map(str, s.rungs)) or 'none'}, one of {s.reduction}"
            + (f", {s.survivors} survivors x 1 seed" if s.survivors else ""))


def main(searches: str = "200", plain: str = "20,40,80", longest: str = "300") -> None:
    runs = read()
    n, sizes, most = int(searches), [int(p) for p in plain.split(",")], int(longest)
    encoders = len(next(iter(runs.values())).score)
    print(f"{encoders} encoders; {len(runs)} training seeds with probes guide; rule checked on "
          f"{check_rule(next(iter(runs.values())))} candidates")
    taus = correlations(runs)
    print("Kendall's tau with the final score of other seeds [95 % interval over encoders]")
    for signal, row in taus.items():
        print(f"  {signal:28}" + "".join(f"  {k}: {t:.2f} [{a:.2f}, {b:.2f}]" for k, (t, a, b) in row.items()))
    halves = np.array_split(np.random.default_rng(1).permutation(encoders), 2)
    base = [simulate(runs, half, PLAIN, n, most, 10 + i) for i, half in enumerate(halves)]
    table: list[tuple[float, Setting]] = []
    for s in settings():
        table.append((saved(base[0], simulate(runs, halves[0], s, n, most, 10), CHOSEN_FOR), s))
    rows: list[dict[str, Any]] = []
    again = Setting(survivors=3)
    groups: Sequence[tuple[str, list[Setting]]] = [
        *((f"best {signal}{', no survivors' if not s else ''}", [x for _, x in table if x.signal == signal
                                                                 and bool(x.survivors) == s])
          for signal in SIGNALS for s in (False, True)),
        ("plain with 3 survivors", [again])]
    scores = {s: f for f, s in table}
    for name, group in groups:
        s = max(group, key=lambda x: scores.get(x, 0.0))
        held = simulate(runs, halves[1], s, n, most, 11)
        rows.append({"what": name, "setting": describe(s), "chosen_at": round(scores.get(s, 0.0), 2),
                     "factor": {str(k): interval(base[1], held, k) for k in sizes}})
        print(f"{describe(s):82} chosen at {scores.get(s, 0.0):.2f}; on the other half " + "  ".join(
            f"plain {k}: {f:.1f} [{low:.1f}, {high:.1f}]" for k, (f, low, high) in rows[-1]["factor"].items()))
    print(json.dumps({"benchmark": "fidelity", "encoders": encoders, "guiding_seeds": list(runs), "searches": n,
                      "kendall": taus, "plain_quality": {str(k): round(float(base[1][1][:, k - 1].mean()), 4)
                                                         for k in sizes}, "factors": rows}))


if __name__ == "__main__":
    main(**dict(a.split("=", 1) for a in sys.argv[1:]))
