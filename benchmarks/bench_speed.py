"""How fast `lacer bench` is: ask, look up, tell, on NAS-Bench-Macro, in CPU seconds of one core.

    python benchmarks/bench_speed.py
    python benchmarks/bench_speed.py budget=200 seeds=10

Goal: 2,000 evaluations a second for the cheap designers (random, evolution). The others are shown beside them; their
time is that of their models. CPU time, so that other work on the machine does not count. The last line is JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from lacer.search.bench import play
from lacer.search.designers.base import make_plain
from lacer.search.tables import read_table

TABLE = Path(__file__).parent / "data" / "nasbench_macro.csv.gz"


def main(budget: int = 200, seeds: int = 10) -> None:
    table = read_table(TABLE, score="mean_acc")
    figures: dict[str, float] = {}
    for name, runs in (("random", seeds), ("evolution", seeds), ("optuna:TPESampler", 1), ("bo", 1)):
        play(make_plain(name, 10_000), table, 20, 0, name)  # imports, caches
        begin = time.process_time()
        for seed in range(runs):
            play(make_plain(name, seed), table, budget, seed, name)
        figures[name] = runs * budget / (time.process_time() - begin)
        print(f"{name:20} {figures[name]:8.0f} evaluations/s")
    cheap = min(figures["random"], figures["evolution"])
    print(json.dumps({"benchmark": "bench_speed", "budget": budget, "seeds": seeds,
                      "evaluations_per_second": {k: round(v, 1) for k, v in figures.items()},
                      "goal_met": cheap >= 2000}))


if __name__ == "__main__":
    main(**{k: int(v) for k, v in (a.split("=") for a in sys.argv[1:])})
