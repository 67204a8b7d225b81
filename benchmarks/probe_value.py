"""Which probes, taken at a tenth of the training, tell the final return? Random encoders on KnownSources.

Encoders are drawn from the space of CompositeBench (`configs/bench/composite.yaml`), each trained once with its PPO
configuration and probed on its own rollouts on the way. For each probe: Spearman's rank correlation with the mean
return of the evaluation episodes, over encoders, with its 95 % bootstrap interval over encoders: of its value for the
fused state, and of its mean over the used sources. Beside them what there is without probes: the training return until
then, and the number of parameters. An encoder that uses more sources has the better return, and means over sources
change with their number, so the partial correlation given the number of used sources (by ranks) tells what a probe
knows beyond that.

    python benchmarks/probe_value.py
    python benchmarks/probe_value.py encoders=128 steps=10240 at=0.1 env=lacer/MixedTraffic-v0 out=runs.jsonl

With `out`, results are kept as they come and a run that was cut off goes on. `space=full` draws from all blocks. The
last line is JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from scipy import stats

from lacer.agents import Evaluation, PPOConfig, Protocol, RunRequest, run
from lacer.agents.probes import FUSED
from lacer.envs import task_card
from lacer.search.space import EncoderSpace, load_space

COMPOSITE = Path(__file__).parents[1] / "configs" / "bench" / "composite.yaml"


def collect(env: str, encoders: int, steps: int, at: float, seed: int, space: str,
            out: Path | None) -> list[Evaluation]:
    config = yaml.safe_load(COMPOSITE.read_text())
    # Rollouts of 128 steps, so that there were some updates by then.
    protocol = Protocol(steps=steps, eval_episodes=32, probe_at=(at,), ppo=PPOConfig(
        **{**config["protocol"]["ppo"], "n_envs": 8, "n_steps": 16}))
    card = task_card(env)
    searched = EncoderSpace(card) if space == "full" else load_space(config["space"], card)
    rng = np.random.default_rng(seed)
    done = [Evaluation.model_validate_json(x) for x in out.read_text().splitlines()] if out and out.exists() else []
    for i in range(encoders):
        spec = searched.to_spec(searched.sample(rng))
        if i < len(done):
            continue
        e = run(RunRequest(env=env, encoder=spec.to_dict(), protocol=protocol, seed=seed + i, text_model="hash"))
        done.append(e)
        print(f"{i + 1:4} of {encoders}: {e.status} {e.reason} {e.mean_return} in {e.cost.total_seconds:.1f} s",
              file=sys.stderr, flush=True)
        if out:
            with out.open("a") as f:
                f.write(e.model_dump_json() + "\n")
    return done


def values(e: Evaluation) -> dict[str, float]:
    """What was known of an encoder in mid-training."""
    step, probes = e.probe_curve[0]
    found = {"parameters": float(e.cost.parameters), "sources used": float(len(probes) - 1)}
    early = [r for s, r in e.curve if s <= step]
    if early:
        found["training return"] = early[-1]
    for name in dict.fromkeys(k for v in probes.values() for k in v if "/" not in k):
        if name in probes[FUSED]:
            found[f"{name}, fused"] = probes[FUSED][name]
        sources = [v[name] for part, v in probes.items() if part != FUSED and name in v]
        if sources:
            found[f"{name}, sources"] = float(np.mean(sources))
    return found


def partial(x: np.ndarray, y: np.ndarray, given: np.ndarray) -> float:
    """Spearman's rho of x and y given a third variable; 0 if one of them does not vary."""
    ranks = [stats.rankdata(v) for v in (x, y, given)]
    design = np.stack([ranks[2], np.ones(len(x))], 1)
    a, b = (r - design @ np.linalg.lstsq(design, r, rcond=None)[0] for r in ranks[:2])
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norm) if norm > 1e-6 else 0.0


def interval(x: np.ndarray, y: np.ndarray, given: np.ndarray, rng: np.random.Generator,
             resamples: int = 2000) -> list[float]:
    """:func:`partial` and its 95 % bootstrap interval (percentiles); plain rho if ``given`` is constant."""
    drawn = [rng.integers(len(x), size=len(x)) for _ in range(resamples)]
    values = [partial(x[i], y[i], given[i]) for i in drawn]
    return [round(v, 3) for v in (partial(x, y, given), *map(float, np.quantile(values, [0.025, 0.975])))]


def main(env: str = "lacer/KnownSources-v0", encoders: str = "64", steps: str = "5120", at: str = "0.1",
         seed: str = "0", space: str = "composite", out: str = "") -> None:
    torch.set_num_threads(1)
    start = time.monotonic()
    runs = collect(env, int(encoders), int(steps), float(at), int(seed), space, Path(out) if out else None)
    ok = [e for e in runs if e.ok and e.probe_curve]
    final = np.array([e.mean_return for e in ok])
    known = [values(e) for e in ok]
    rng = np.random.default_rng(0)
    rows: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(k for v in known for k in v):
        have = np.array([name in v for v in known])
        if have.sum() >= 20:
            x = np.array([v[name] for v in known if name in v])
            used = np.array([v["sources used"] for v in known])[have]
            rows[name] = {"encoders": int(have.sum()), "rho": interval(x, final[have], np.zeros(len(x)), rng),
                          "given_sources": interval(x, final[have], used, rng)}
    print(f"{len(ok)} encoders; Spearman's rho with the final return [95 % interval], and given the number of sources")
    for name, row in sorted(rows.items(), key=lambda r: -abs(r[1]["given_sources"][0])):
        print(f"{name:26}{row['encoders']:4}" + "".join(
            f"   {r:6.2f} [{low:.2f}, {high:.2f}] {'*' if low > 0 or high < 0 else ' '}"
            for r, low, high in (row["rho"], row["given_sources"])))
    share = float(np.median([e.cost.probe_seconds / e.cost.total_seconds for e in ok]))
    print(json.dumps({
        "benchmark": "probe_value", "env": env, "encoders": len(ok), "failed": len(runs) - len(ok), "steps": int(steps),
        "at": float(at), "step": ok[0].probe_curve[0][0], "space": space, "seconds": round(time.monotonic() - start),
        "probe_share_of_two": round(share, 4), "spearman": rows}))


if __name__ == "__main__":
    main(**dict(a.split("=", 1) for a in sys.argv[1:]))
