"""Multi-fidelity search: how well do early scores rank encoders, and how many environment steps does halving save?

On CompositeBench (642 encoders x 3 training seeds, with learning curves; probes in mid-training from
`composite_probes.py`):

- Kendall's rank correlation of each signal at each rung with the score after all 2,048 steps, mean of the other seeds.
- Simulated random searches. Halving's rule is Optuna's asynchronous one (checked here against
  `lacer.search.fidelity`). The plain search trains and evaluates every candidate (2,048 + 512 steps), takes the best.
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
LADDERS = (256, 512, 1024)
"""What rungs are put together from."""
FULL, EVALUATION = 2048, 512
SIGNALS = ("return", "probe:linear_probe", "return+probe:linear_probe")
REDUCTIONS = (4, 8)
SURVIVORS = (0, 3, 6)
"""Numbers of survivors that get one further training seed."""
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
    """What is simulated; without rungs: all are trained to the end."""

    signal: str = "return"
    rungs: tuple[int, ...] = ()
    reduction: int = 3


PLAIN = Setting()


def read() -> dict[int, Runs]:
    """The runs by the seed that guides; rows are encoders in the order of their codes."""
    table = pd.read_parquet(DATA / "composite_bench.parquet", columns=["ncode", "seed", "objective", "curve_returns"])
    probes = pd.read_parquet(DATA / "composite_probes.parquet")
    steps = probes.groupby(["ncode", "seed"]).step.nunique().unstack()
    codes = np.array(sorted(steps.index[steps.min(axis=1) == len(RUNGS)]))  # where not all are recorded: those that are
    if len(codes) < len(steps):
        steps = steps.iloc[:, :1]
        codes = np.array(sorted(steps.index[steps.iloc[:, 0] == len(RUNGS)]))
    score = table.pivot(index="ncode", columns="seed", values="objective").loc[codes]
    out = {}
    for seed in steps.columns:
        curves = table[table.seed == seed].set_index("ncode").loc[codes, "curve_returns"]
        found = probes[probes.seed == seed].pivot(index="ncode", columns="step", values="probe/fused/linear_probe")
        out[int(seed)] = Runs(
            {"return": np.stack(curves.to_numpy())[:, [r // 256 - 1 for r in RUNGS]],
             "probe:linear_probe": found.loc[codes, list(RUNGS)].to_numpy()},
            score[seed].to_numpy(), score.drop(columns=seed).to_numpy())
    return out


class Level:
    """What candidates have shown at a rung so far, and whether one that shows something passes it."""

    def __init__(self, signals: int, reduction: int, room: int) -> None:
        self.reduction, self.n = reduction, 0
        self.shown, self.ranks = np.zeros((signals, room)), np.zeros(room)

    def passes(self, scores: Sequence[float]) -> bool:
        """Ranks are kept up to date instead of sorted anew; one signal's ranks are in the order of its scores."""
        n, self.n = self.n, self.n + 1
        for row, score in zip(self.shown, scores, strict=True):
            higher, equal = row[:n] > score, row[:n] == score
            self.ranks[:n] += higher + 0.5 * equal
            self.ranks[n] += 1 + n - higher.sum() - 0.5 * equal.sum()
            row[n] = score
        k = self.n - max(1, self.n // self.reduction)
        return bool(self.ranks[n] >= np.partition(self.ranks[:self.n], k)[k])


def search(runs: Runs, order: np.ndarray, setting: Setting, rng: np.random.Generator) -> tuple[Any, Any]:
    """A random search that proposes encoders in an order.

    Returns:
        Environment steps and quality of the winner, after each candidate: (numbers of survivors, candidates).
    """
    names = setting.signal.split("+")
    levels = [Level(len(names), setting.reduction, len(order)) for _ in setting.rungs]
    early = [np.stack([runs.early[n][:, RUNGS.index(r)] for n in names], 1).tolist() for r in setting.rungs]
    done: list[tuple[float, int]] = []  # score and encoder, the best last
    steps, quality = np.zeros((len(SURVIVORS), len(order))), np.zeros((len(SURVIVORS), len(order)))
    pick = rng.integers(2, size=len(runs.score))  # which of the other seeds a survivor gets
    again, left = runs.others[np.arange(len(pick)), pick], runs.others[np.arange(len(pick)), 1 - pick]
    spent, found = 0, np.zeros(len(SURVIVORS))
    for i, encoder in enumerate(order):
        before = 0
        for level, values, rung in zip(levels, early, setting.rungs, strict=True):
            spent += rung - before
            before = rung
            if not level.passes(values[encoder]):
                break
        else:
            spent += FULL - before + EVALUATION
            insort(done, (float(runs.score[encoder]), int(encoder)))
            for j, n in enumerate(SURVIVORS):
                if n:
                    winner = max((e for _, e in done[-n:]), key=lambda e: runs.score[e] + again[e])
                    found[j] = left[winner]
                else:
                    found[j] = runs.others[done[-1][1]].mean()
        for j, n in enumerate(SURVIVORS):
            steps[j, i] = spent + min(n, len(done)) * (FULL + EVALUATION)
        quality[:, i] = found
    return steps, quality


def simulate(runs: dict[int, Runs], pool: np.ndarray, setting: Setting, searches: int, longest: int,
             seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps and quality of many searches, (searches, numbers of survivors, candidates). The same seed: the same orders
    of encoders."""
    seeds, out = list(runs), []
    for i in range(searches):
        rng = np.random.default_rng([seed, i])
        out.append(search(runs[seeds[i % len(seeds)]], rng.permutation(pool)[:longest], setting, rng))
    return np.stack([s for s, _ in out]), np.stack([q for _, q in out])


Curves = tuple[np.ndarray, np.ndarray]


def saved(plain: Curves, other: Curves, survivors: int, candidates: int, draw: Any = slice(None)) -> float:
    """What the plain search of so many candidates takes over what the other takes for its mean quality; 0 if it never
    gets there."""
    j = SURVIVORS.index(survivors)
    target = plain[1][draw, 0, candidates - 1].mean()
    quality = np.maximum.accumulate(other[1][draw, j].mean(0))
    if quality[-1] < target:
        return 0.0
    return float(plain[0][draw, 0, candidates - 1].mean() / other[0][draw, j, int(np.argmax(quality >= target))].mean())


def interval(plain: Curves, other: Curves, survivors: int, candidates: int) -> list[float]:
    """:func:`saved` and its 95 % bootstrap interval over searches."""
    rng, n = np.random.default_rng(0), len(plain[0])
    draws = [saved(plain, other, survivors, candidates, rng.integers(n, size=n)) for _ in range(500)]
    return [round(float(v), 2) for v in (saved(plain, other, survivors, candidates), *np.quantile(
        draws, [0.025, 0.975]))]


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
            draws = [tau(rng.integers(n, size=n)) for _ in range(100)]
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
        taken, spent = np.diff([0, *steps[0]]), 0
        reached: list[dict[int, dict[str, float]]] = [{}, {}]
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


def main(searches: str = "200", plain: str = "20,40,80", longest: str = "160") -> None:
    runs = read()
    n, sizes, most = int(searches), [int(p) for p in plain.split(",")], int(longest)
    encoders = len(next(iter(runs.values())).score)
    print(f"{encoders} encoders; runs of {len(runs)} of 3 training seeds guide; the rule agrees with the search's in "
          f"{check_rule(next(iter(runs.values())))} judgements")
    taus = correlations(runs)
    print("Kendall's tau with the final score of other seeds [95 % interval over encoders]")
    for signal, row in taus.items():
        print(f"  {signal:28}" + "".join(f"  {k}: {t:.2f} [{a:.2f}, {b:.2f}]" for k, (t, a, b) in row.items()))
    choose, report = np.array_split(np.random.default_rng(1).permutation(encoders), 2)
    first, base = (simulate(runs, half, PLAIN, n, most, seed) for half, seed in ((choose, 10), (report, 11)))
    tried: dict[tuple[Setting, int], float] = {}
    for s in (Setting(signal, ladder, reduction) for signal in SIGNALS for k in (1, 2)
              for ladder in combinations(LADDERS, k) for reduction in REDUCTIONS):
        curves = simulate(runs, choose, s, n // 4, most, 10)
        half = (first[0][:n // 4], first[1][:n // 4])
        tried |= {(s, survivors): saved(half, curves, survivors, CHOSEN_FOR) for survivors in SURVIVORS}
    tried |= {(PLAIN, survivors): saved(first, first, survivors, CHOSEN_FOR) for survivors in SURVIVORS[1:]}
    rows: list[dict[str, Any]] = []
    print("Factor of environment steps saved at the quality of a plain search of so many candidates, other half")
    for signal, rungs, further in [*((x, True, f) for x in SIGNALS for f in (False, True)), ("return", False, True)]:
        s, survivors = max((k for k in tried if k[0].signal == signal and bool(k[0].rungs) == rungs
                            and bool(k[1]) == further), key=lambda k: tried[k])
        held = simulate(runs, report, s, n, most, 11)
        factors = {str(k): interval(base, held, survivors, k) for k in sizes}
        rows.append({"signal": signal if s.rungs else "", "rungs": s.rungs, "reduction": s.reduction,
                     "survivors": survivors, "chosen_at": round(tried[s, survivors], 2), "factor": factors})
        name = f"{signal}, rungs {'/'.join(map(str, s.rungs))}, one of {s.reduction}" if s.rungs else "no rungs"
        print(f"  {name + (f', {survivors} survivors' if survivors else ''):70} chosen at {tried[s, survivors]:4.1f}; "
              + "  ".join(f"{k}: {f:.1f} [{a:.1f}, {b:.1f}]" for k, (f, a, b) in factors.items()), flush=True)
    print(json.dumps({"benchmark": "fidelity", "encoders": encoders, "guiding_seeds": list(runs), "searches": n,
                      "kendall": taus, "plain_quality": {str(k): round(float(base[1][:, 0, k - 1].mean()), 4)
                                                         for k in sizes}, "factors": rows}))


if __name__ == "__main__":
    main(**dict(a.split("=", 1) for a in sys.argv[1:]))
