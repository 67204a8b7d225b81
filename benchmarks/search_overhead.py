"""What the loop of a search costs per candidate, beside the designer's thinking and the evaluation.

A search of NAS-Bench-Macro by random proposals, its scores looked up in the table: in process, with everything that a
run folder gets (SQLite study, one transaction per proposal and per result). Measured over the last candidates of
studies of different size, and, to see where it goes, the storage alone.

    python benchmarks/search_overhead.py sizes=1000,10000

The last line is JSON. Goals: at most 20 ms a candidate with 1,000 trials in the study, 50 ms with 10,000.
"""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from lacer.agents import Call, Cost, Evaluation
from lacer.envs import Objective
from lacer.search import Proposal, SearchSpace, StoredStudy
from lacer.search.designers.base import Designer
from lacer.search.engine import Budget, Engine
from lacer.search.executors import InProcess
from lacer.search.storage import sqlite_url
from lacer.search.study import Study, Trial

TABLE = Path(__file__).with_name("data") / "nasbench_macro.csv.gz"


class Timed(Designer):
    """Random proposals, repeats included since the table has 6,561 rows only; knows how long it took."""

    seconds = 0.0

    def propose(self, study: Study, n: int) -> list[Proposal]:
        start = time.perf_counter()
        rng = self.rng(study)
        made = [Proposal(study.space.sample(rng), "random") for _ in range(n)]
        self.seconds += time.perf_counter() - start
        return made


def main(sizes: list[int], last: int = 200) -> None:
    with gzip.open(TABLE, "rt") as f:
        scores = {row["arch"]: float(row["mean_acc"]) for row in csv.DictReader(f)}
    space = SearchSpace.from_table(scores)
    # As large as an evaluation of a PPO run: learning curve, twenty episodes, probes of five sources.
    rng = np.random.default_rng(0)
    evaluation = Evaluation(
        mean_return=1.0, returns=rng.random(20).tolist(), metrics={"speed": rng.random(20).tolist()},
        episode_seeds=list(range(20)), curve=[(i * 256, float(rng.random())) for i in range(40)],
        probes={f"source {i}": {f"probe {k}": float(rng.random()) for k in range(40)} for i in range(6)},
        cost=Cost(env_steps=10_000))
    spent = 0.0

    def look_up(point: dict[str, object]) -> Evaluation:
        nonlocal spent
        start = time.perf_counter()
        answer = evaluation.model_copy(update={"objective": scores[space.to_string(point)]})
        spent += time.perf_counter() - start
        return answer

    def call(trial: Trial, _: int) -> Call:
        return Call(function="", point=trial.proposal.point or {})

    result: dict[str, object] = {"benchmark": "search_overhead", "decisions": len(space.decisions), "last": last}
    for size in sizes:
        folder = Path(tempfile.mkdtemp())
        study = StoredStudy(sqlite_url(folder / "study.db"), "s", space, Objective("accuracy", "%"), create="yes")
        designer = Timed(0)
        engine = Engine(study, designer, InProcess(look_up), call, budget=Budget(size), repeats="add")
        engine.run()
        designer.seconds = spent = 0.0
        engine.budget = Budget(size + last)
        start = time.perf_counter()
        engine.run()
        wall = time.perf_counter() - start
        per = (wall - designer.seconds - spent) / last * 1e3
        start = time.perf_counter()
        again = StoredStudy(sqlite_url(folder / "study.db"), "s", space, Objective("accuracy", "%"), create="no")
        opened = time.perf_counter() - start
        assert len(again) == size + last
        megabytes = (folder / "study.db").stat().st_size / 1e6
        print(f"{size:>6,} trials: {per:.1f} ms a candidate (designer {designer.seconds / last * 1e3:.2f} ms, "
              f"evaluation {spent / last * 1e3:.3f} ms); to open the study again {opened:.1f} s, {megabytes:.1f} MB")
        result[str(size)] = {"ms_per_candidate": round(per, 2), "reopen_s": round(opened, 2),
                             "mb": round(megabytes, 1)}
        again.close()
        study.close()
        shutil.rmtree(folder)
    print(json.dumps(result))


if __name__ == "__main__":
    options = dict(a.split("=", 1) for a in sys.argv[1:])
    main([int(s) for s in options.get("sizes", "1000,10000").split(",")], int(options.get("last", 200)))
