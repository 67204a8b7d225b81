"""Designers without an LLM on every table of benchmarks/data: does a model beat random search, and by how much?

    python benchmarks/designers.py --out bench/designers
    python benchmarks/designers.py --seeds 20 --tables macro,arlbench

Every table is one `lacer bench`; a folder that holds a part of it is gone on with. The last line is JSON: per table and
designer the mean of the best so far with its 95 % interval, whether that interval lies apart from random search's, and
the share of seeds that found the table's best.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from lacer.search.bench import bench
from lacer.search.bench_report import figures, summary
from lacer.search.config import BenchConfig

DATA = Path(__file__).parent / "data"
PPO = "clip_eps,ent_coef,gae_lambda,learning_rate,max_grad_norm,minibatch_size,normalize_advantage,vf_clip_eps,vf_coef"
TABLES: dict[str, dict[str, Any]] = {
    "macro": {"table": "nasbench_macro.csv.gz", "score": "mean_acc"},
    "tnb101_micro": {"table": "tnb101_micro_val.csv.gz", "score": "class_object"},
    "tnb101_macro": {"table": "tnb101_macro_val.csv.gz", "score": "class_object", "variable_length": True},
    "arlbench": {"table": "arlbench_ppo.csv.gz", "arch": PPO, "bins": 3, "score": "performance", "rank": True,
                 "where": {"env": "box2d_lunar_lander"}},
    "composite": {"table": "composite_bench.parquet", "arch": "ncode", "score": "objective", "repeated": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="bench/designers", help="folder (default: bench/designers)")
    parser.add_argument("--tables", default=",".join(TABLES))
    parser.add_argument("--designers", default="random,evolution,optuna:TPESampler,bo")
    parser.add_argument("--budget", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    out: dict[str, Any] = {}
    for name in args.tables.split(","):
        settings = TABLES[name] | {"table": str(DATA / TABLES[name]["table"])}
        points = [p for p in (24, 48, 100) if p < args.budget] + [args.budget]
        config = BenchConfig(**settings, designers=args.designers, budget=args.budget, seeds=args.seeds,
                             workers=args.workers, checkpoints=",".join(map(str, points)))
        start = time.perf_counter()
        result = bench(config, Path(args.out) / name)
        seconds = time.perf_counter() - start
        print(summary(result), f"{seconds:.0f} s\n", sep="\n", flush=True)
        all_of_it = figures(result)
        rows: dict[str, Any] = {}
        for designer, at in all_of_it["designers"].items():
            rows[designer] = {p: [v["mean"], v["low"], v["high"]] for p, v in at.items()}
            rows[designer]["found_best"] = all_of_it["reached"][designer]["1.0"]["share"]
            if designer != "random" and "random" in all_of_it["designers"]:
                rows[designer]["above_random"] = {
                    p: v["low"] > all_of_it["designers"]["random"][p]["high"] for p, v in at.items()}
        out[name] = {"best": all_of_it["optimum"], "seconds": round(seconds, 1), **rows}
    print(json.dumps({"benchmark": "designers", "seeds": args.seeds, "budget": args.budget, "tables": out}))


if __name__ == "__main__":
    main()
