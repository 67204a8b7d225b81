"""Real searches with and without multi-fidelity, with the same number of environment steps.

`lacer search` on CompositeBench's task, space and PPO configuration, each seed once per arm, under one budget of steps
(`max_env_steps`, the survivors' further seeds included): the random designer plain, with successive halving, with
Hyperband, and plain with three times the steps; evolution plain and with warm starts from the parent. What is compared
is the final score of the winner: trained anew with another seed, evaluated on other episodes. Paired by search seed
with the plain search of the same designer; the 95 % interval is a bootstrap over seeds.

    python benchmarks/fidelity_search.py
    python benchmarks/fidelity_search.py seeds=10 steps=51200 out=runs/fidelity arms=random,halving

With `out`, run folders are kept and a program that was ended goes on. The last line is JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from lacer.agents.stats import bootstrap
from lacer.search import search

QUICK = Path(__file__).parents[1] / "configs" / "comparisons" / "quick.yaml"
"""Its searches have CompositeBench's task, space and configuration, and an expert."""
HALVING: dict[str, Any] = {"rungs": [256, 1024], "reduction": 4, "signal": "return+probe:linear_probe"}


class Arm(NamedTuple):
    """What a search of an arm differs in.

    Attributes:
        designer: who proposes.
        fidelity: the search's `fidelity`.
        times: factor of the budget.
    """

    designer: str
    fidelity: dict[str, Any]
    times: int = 1


ARMS = {"random": Arm("random", {}), "halving": Arm("random", HALVING),
        "hyperband": Arm("random", {**HALVING, "pruner": "hyperband"}),
        "survivors": Arm("random", {**HALVING, "survivors": 2, "survivor_seeds": 1}),
        "random x 3": Arm("random", {}, 3), "evolution": Arm("evolution", {}),
        "warm start": Arm("evolution", {"warm_start": "parent"})}


def run(folder: Path, steps: int, seed: int, arm: Arm) -> dict[str, float]:
    """One search: candidates, steps, score of the winner when it was chosen and in the end."""
    base = yaml.safe_load(QUICK.read_text())["base"]
    options = {**base, "designer": arm.designer, "seed": seed, "candidates": 10_000, "max_env_steps": steps * arm.times,
               "protocol": {**base["protocol"], "probes": ["linear_probe"]}, "expert_first": False,
               "final_steps": 2048, "final_episodes": 32, "executor": "inprocess", "video": False,
               "fidelity": arm.fidelity}
    result = search(resume=folder, quiet=True) if (folder / "study.db").exists() else search(
        out=folder, quiet=True, **options)
    o = result.outcome
    chosen = next(t for t in o.trials if t.number == o.winner)
    return {"candidates": sum(t.survivor is None for t in o.trials if t.status != "rejected"),
            "pruned": sum(t.status == "pruned" for t in o.trials), "env_steps": sum(t.env_steps for t in o.trials),
            "chosen": float(chosen.objective or 0.0), "final": float(o.finals["winner"].objective or 0.0)}


def main(seeds: str = "5", steps: str = "25600", out: str = "",
         arms: str = "random,halving,hyperband,random x 3,evolution,warm start") -> None:
    torch.set_num_threads(1)
    chosen = {name: ARMS[name] for name in arms.split(",")}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(int(seeds)):
            for name, arm in chosen.items():
                folder = Path(out or temporary) / f"{name.replace(' ', '-')}-{seed}"
                found[name].append(run(folder, int(steps), seed, arm))
                print(f"seed {seed}, {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    final = {name: np.array([r["final"] for r in rows]) for name, rows in found.items()}
    figures = {name: {k: round(float(np.mean([r[k] for r in rows])), 4) for k in rows[0]} for name, rows in
               found.items()}
    for name, scores in final.items():
        if (plain := chosen[name].designer) in final:
            d = scores - final[plain]
            low, high = (float(x) for x in bootstrap(d, draws=10_000))
            figures[name] |= {"gain": round(float(d.mean()), 4), "low": round(low, 4), "high": round(high, 4)}
        print(f"{name:20} {figures[name]}")
    print(json.dumps({"benchmark": "fidelity_search", "seeds": int(seeds), "steps": int(steps), "arms": figures}))


if __name__ == "__main__":
    main(**dict(a.split("=", 1) for a in sys.argv[1:]))
