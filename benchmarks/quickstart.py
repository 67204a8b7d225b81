"""What `make search` costs and gains: python benchmarks/quickstart.py [--seed N] [--designer NAME] [--out FOLDER]

Runs `lacer search --config quick` and prints wall time, the share of it that is PPO (training and evaluation in the
workers, of all the workers' time), PPO's steps per second, and what the winner gained on fresh episodes, with 95 %
bootstrap intervals over episodes. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from lacer.search import search
from lacer.search.config import validate, worker_count
from lacer.search.outcome import EXPERT, NOOP, WINNER, paired_difference
from lacer.search.presets import read_yaml


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--designer", default="auto")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp()) / "run"
    config = {**read_yaml("quick"), "seed": args.seed, "designer": args.designer, "wandb": "offline"}
    start = time.perf_counter()
    result = search(out=out, **config)
    wall = time.perf_counter() - start
    o = result.outcome
    metric = o.card.objective.metric
    runs = [t.evaluation for t in o.trials if t.evaluation] + [
        e for n, e in o.finals.items() if not (n == EXPERT and e is o.finals.get(WINNER))]
    ppo = sum(e.cost.train_seconds + e.cost.eval_seconds for e in runs)
    workers = worker_count(validate(config, "quick"))
    figures = {
        "seconds": round(wall, 1), "candidates": len(o.trials),
        "failed": sum(t.status == "failed" for t in o.trials),
        "ppo_share": round(ppo / (wall * workers), 3),
        "probe_share": round(sum(e.cost.probe_seconds for e in runs) / (wall * workers), 4),
        "steps_per_second_per_worker": round(float(np.median([e.cost.steps_per_second for e in runs
                                                              if e.cost.steps_per_second])), 1),
        "env_steps": sum(e.cost.env_steps for e in runs),
        **{name.replace(" ", "_"): round(e.objective, 3) for name, e in o.finals.items() if e.objective is not None},
        **{f"winner_minus_{name.replace(' ', '_')}": [round(x, 3) for x in paired_difference(
            o.finals[WINNER], o.finals[name], metric)] for name in (NOOP, EXPERT)},
    }
    for name, value in figures.items():
        print(f"{name:32} {value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
