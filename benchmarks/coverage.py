"""How often the 95 % intervals and the tests of `agents/stats.py` are right: coverage of the truth, and false findings.

Runs are drawn from a normal and from a skewed distribution (exponential), as final scores of searches may be, for as
many seeds as comparisons have. False findings: three groups that are alike, share of comparisons in which any pair is
called different.

    python benchmarks/coverage.py

The last line is JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np

from lacer.agents import stats

Draw = Callable[[np.random.Generator, int], np.ndarray]
SHAPES: dict[str, tuple[Draw, dict[stats.Statistic, float]]] = {
    "normal": (lambda rng, n: rng.normal(size=n), {"mean": 0.0, "iqm": 0.0}),
    "exponential": (lambda rng, n: rng.exponential(size=n), {"mean": 1.0, "iqm": 0.0}),
}
SEEDS = (3, 5, 8, 20, 50)
TRIES = 1000


def main() -> None:
    rng = np.random.default_rng(0)
    # The interquartile mean of the exponential distribution: 2 times the integral of -log(1 - u) from 1/4 to 3/4.
    SHAPES["exponential"][1]["iqm"] = 2 * ((0.25 * np.log(0.25) + 0.75) - (0.75 * np.log(0.75) + 0.25))
    out: dict[str, dict[str, float]] = {}
    print(f"{'':28}" + "".join(f"{n:>8} seeds" for n in SEEDS))
    for shape, (draw, truths) in SHAPES.items():
        for statistic, truth in truths.items():
            row = {}
            for n in SEEDS:
                hits = 0
                for i in range(TRIES):
                    low, high = stats.bootstrap(draw(rng, n), statistic, draws=500, seed=i)
                    hits += bool(low <= truth <= high)
                row[str(n)] = hits / TRIES
            out[f"{shape}, {statistic}"] = row
        row = {}
        for n in SEEDS:
            hits = 0
            for i in range(TRIES // 2):
                low, high = stats.improvement_interval(draw(rng, n), draw(rng, n), draws=500, seed=i)
                hits += low <= 0.5 <= high
            row[str(n)] = hits / (TRIES // 2)
        out[f"{shape}, P(improvement)"] = row
        row = {}
        for n in SEEDS:
            found = sum(any(c.better for c in stats.compare({k: draw(rng, n) for k in "abc"}, seed=i))
                        for i in range(TRIES // 5))
            row[str(n)] = found / (TRIES // 5)
        out[f"{shape}, false findings"] = row
    for name, row in out.items():
        print(f"{name:28}" + "".join(f"{row[str(n)]:>14.3f}" for n in SEEDS))
    print(json.dumps({"benchmark": "coverage", "level": 0.95, "tries": TRIES, "coverage": out}))


if __name__ == "__main__":
    main()
