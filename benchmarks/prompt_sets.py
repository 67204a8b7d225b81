"""How much the wording of the prompts matters: the same search with each set of templates, beside the spread of seeds.

Runs a designer with every set of prompts and several seeds on one environment, all else equal, and compares two
standard deviations of the best score found: between the sets (of their means over the seeds, less what the spread of
seeds alone would make of these means) and between the seeds (within a set, pooled). Set and seed are crossed, so
sets are also compared seed by seed.

    python benchmarks/prompt_sets.py llm=openai:MODEL llm_base_url=URL env=lacer/KnownSources-v0 seeds=3 candidates=10
    python benchmarks/prompt_sets.py llm=replay:FILE seeds=1

Further ``key=value``: designer, steps, episodes, out (a folder that keeps the runs, and is gone on with), sets and seed
(only these, the seeds from that one on, to share the work between processes). The last line is JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from lacer.search import search
from lacer.search.llm.prompt import SETS


def spreads(scores: np.ndarray) -> dict[str, Any]:
    """Standard deviations between sets and between seeds.

    Args:
        scores: (sets, seeds), the best score of each search.

    Returns:
        ``between_seeds``: standard deviation within a set, pooled (0 with one seed); ``between_sets``: that of the true
        means of the sets, by analysis of variance, 0 where seeds explain all; ``means``: the sets' means with their
        95 % bootstrap intervals over seeds; ``share``: share of the whole variance that the sets make.
    """
    sets, seeds = scores.shape
    within = float(scores.var(axis=1, ddof=1).mean()) if seeds > 1 else 0.0
    between = max(0.0, float(scores.mean(axis=1).var(ddof=1)) - within / seeds) if sets > 1 else 0.0
    rng = np.random.default_rng(0)
    draws = scores[:, rng.integers(seeds, size=(10_000, seeds))].mean(2)
    return {"between_sets": between ** 0.5, "between_seeds": within ** 0.5,
            "share": between / (between + within) if between + within > 0 else 0.0,
            "means": [[float(m), *map(float, np.percentile(d, [2.5, 97.5]))]
                      for m, d in zip(scores.mean(axis=1), draws, strict=True)]}


def main(options: dict[str, Any]) -> dict[str, Any]:
    seeds, first = int(options.pop("seeds", 3)), int(options.pop("seed", 0))
    sets = options.pop("sets", ",".join(SETS)).split(",")
    out = options.pop("out", None)
    steps, episodes = int(options.pop("steps", 4096)), int(options.pop("episodes", 10))
    keys = {"candidates": 10, "designer": "lacer", "env": "lacer/KnownSources-v0", "llm": None, "llm_base_url": None,
            "llm_timeout": 180}
    for key in options:
        if key not in keys:
            sys.exit(f"unknown option {key}; there are seeds, seed, sets, steps, episodes, out, {', '.join(keys)}")
    given = {**keys, **options}
    if not given["llm"]:
        sys.exit("give llm=openai:MODEL, anthropic:MODEL or replay:FILE")
    given["candidates"] = int(given["candidates"])
    scores = np.full((len(sets), seeds), np.nan)
    spent = {"tokens_in": 0.0, "tokens_out": 0.0, "requests": 0.0}
    by_model = total = 0
    with tempfile.TemporaryDirectory() as scratch:
        for j, seed in enumerate(range(first, first + seeds)):
            for i, prompts in enumerate(sets):
                folder = Path(out or scratch) / f"{prompts}-{seed}"
                if (folder / "config.yaml").exists():
                    result = search(resume=folder, quiet=True).outcome
                else:
                    result = search(
                        out=folder, quiet=True, seed=seed, designer_kwargs={"prompts": prompts}, wandb="off",
                        final_steps=1, final_episodes=2, text_model="hash", workers=1, ahead=0,
                        protocol={"steps": steps, "eval_episodes": episodes,
                                  "ppo": {"n_envs": 4, "n_steps": 64, "gamma": 0.5}}, **given).outcome
                best = next(t for t in result.trials if t.number == result.winner)
                scores[i, j] = best.objective
                evaluated = [t for t in result.trials if t.status != "rejected"][1:]
                by_model += sum(t.proposal.designer == given["designer"] for t in evaluated)
                total += len(evaluated)
                spent = {k: v + result.usage.get(k, 0) for k, v in spent.items()}
                print(f"{prompts:12} seed {seed}: best score {best.objective:.4f} (#{best.number})", flush=True)
    got = spreads(scores)
    print("\nbest score of a search, mean over seeds with 95 % bootstrap interval")
    for prompts, (mean, low, high) in zip(sets, got["means"], strict=True):
        print(f"  {prompts:12} {mean:.4f} [{low:.4f}, {high:.4f}]")
    print(f"standard deviation between sets of prompts {got['between_sets']:.4f}, between seeds "
          f"{got['between_seeds']:.4f}; sets make {got['share']:.0%} of the variance")
    return {"benchmark": "prompt_sets", **given, "seeds": seeds, "steps": steps, "scores": {
        s: [round(float(x), 4) for x in row] for s, row in zip(sets, scores, strict=True)},
        **{k: round(got[k], 4) for k in ("between_sets", "between_seeds", "share")},
        "proposed_by_model": round(by_model / max(1, total), 3), **spent}


if __name__ == "__main__":
    print(json.dumps(main(dict(arg.split("=", 1) for arg in sys.argv[1:]))))
