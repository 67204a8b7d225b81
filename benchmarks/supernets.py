"""Whether designers that train by themselves find the sources that matter.

The task is `lacer/KnownSources-v0` with five sources, of which a subset drawn by the seed matters; one of them,
`noise`, never does. Each source may be read by a block (`position` and `noise` by one of two) or left out; the fusion
is fixed. A training is right if the first encoder that it ranks uses exactly the sources that matter. Guessing is right
once in 32 times.

    python benchmarks/supernets.py ways=darts,darts:bilevel=true,enas,enas:rollout=2,pepnas seeds=10 first=100

A way is a designer and its options. The last line is JSON. Goal: RL-DARTS is right for at least 9 of 10 seeds.
"""

from __future__ import annotations

import itertools
import json
import platform
import sys
import time
from typing import Any

import numpy as np
import torch

from lacer.agents import PPOConfig, Protocol, Training
from lacer.agents.training import run_training
from lacer.envs import task_card
from lacer.search.designers.base import check_options, designer_class
from lacer.search.space import EncoderSpace

SOURCES = ("position", "trend", "words", "crowd", "noise")
BLOCKS = {"position.block": ["linear", "mlp", "unused"], "trend.block": ["cnn", "unused"],
          "words.block": ["sentence_mlp", "unused"], "crowd.block": ["deepsets", "unused"],
          "noise.block": ["linear", "mlp", "unused"], "fusion.block": ["concat"]}
PROTOCOL = Protocol(eval_episodes=16, ppo=PPOConfig(n_envs=32, n_steps=16, batch_size=256, gamma=0.1,
                                                     learning_rate=3e-3))


def relevant(seed: int) -> list[str]:
    """The sources that matter for a seed."""
    can = SOURCES[:-1]
    subsets = [list(c) for n in range(1, len(can) + 1) for c in itertools.combinations(can, n)]
    return subsets[np.random.default_rng(1000 + seed).integers(len(subsets))]


def space(card: Any) -> EncoderSpace:
    """One configuration of every block: the default one."""
    every = EncoderSpace(card, BLOCKS)
    fixed = {d.name: [_default(every, d.name)] for d in every.decisions if not d.name.endswith(".block")}
    return EncoderSpace(card, {**BLOCKS, **fixed})


def _default(every: EncoderSpace, name: str) -> Any:
    from lacer.encoders import list_blocks

    part, block, field = name.split(".")
    modality = "fusion" if part == "fusion" else every.card.sources[part].modality
    default = list_blocks(modality)[modality, block].model_fields[field].default
    options = every.by_name[name].options
    return default if default in options else options[0]


def train(way: str, seed: int, steps: int) -> dict[str, Any]:
    """One training of a designer; what it found."""
    name, _, rest = way.partition(":")
    given = {k: json.loads(v) for k, v in (pair.split("=") for pair in rest.split("+"))} if rest else {}
    designer: Any = designer_class(name)(seed, **check_options(name, given))
    kwargs = {"sources": list(SOURCES), "relevant": relevant(seed)}
    card = task_card("lacer/KnownSources-v0", **kwargs)
    where = space(card)
    start = time.perf_counter()
    e = run_training(Training(
        function=designer.function, env="lacer/KnownSources-v0", env_kwargs=kwargs, text_model="hash",
        decisions={d.name: list(d.options) for d in where.decisions}, protocol=PROTOCOL, steps=steps,
        options=designer.options(), seed=seed))
    if e.status != "ok":
        raise SystemExit(f"{way}, seed {seed}: {e.reason}")
    first = where.to_spec(where.from_ncode(e.found["ranked"][0][0]))
    used = sorted(first.sources)
    return {"seed": seed, "relevant": sorted(relevant(seed)), "used": used, "right": used == sorted(relevant(seed)),
            "sources_right": sum((s in used) == (s in relevant(seed)) for s in SOURCES),
            "env_steps": e.cost.env_steps, "seconds": round(time.perf_counter() - start, 1), "found": e.found}


def main(ways: list[str], seeds: int, first: int, steps: int) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for way in ways:
        rows = []
        for seed in range(first, first + seeds):
            row = train(way, seed, steps)
            rows.append(row)
            print(f"{way:28} seed {seed}: matter {','.join(row['relevant']):32} used {','.join(row['used']):38} "
                  f"{'right' if row['right'] else 'WRONG'}  {row['env_steps']:,} steps, {row['seconds']} s", flush=True)
            for part, options in row["found"].get("alphas", row["found"].get("controller", {})).items():
                if len(options) > 1:
                    print(" " * 30, part, " ".join(f"{n.split('(')[0]} {q:.3f}" for n, q in options.items()))
        right = sum(r["right"] for r in rows)
        results[way] = {"right": right, "sources_right": round(float(np.mean([r["sources_right"] for r in rows])), 2),
                        "env_steps": round(float(np.mean([r["env_steps"] for r in rows])))}
        print(f"{way}: right for {right} of {seeds} seeds", flush=True)
    print(json.dumps({"benchmark": "supernets", "steps": steps, "seeds": seeds, "first": first, "sources": len(SOURCES),
                      "chance": round(1 / 32, 3), "results": results, "torch": torch.__version__,
                      "machine": platform.machine()}))


if __name__ == "__main__":
    options = dict(a.split("=", 1) for a in sys.argv[1:])
    main(options.pop("ways", "darts,darts:bilevel=true,enas,pepnas").split(","), int(options.pop("seeds", 10)),
         int(options.pop("first", 100)), int(options.pop("steps", 6_144)))
