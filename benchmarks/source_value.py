"""What each source of lacer/MixedTraffic-v0 is worth: one encoder trained with all sources and with each one blanked.

    python benchmarks/source_value.py --out values.jsonl

A blanked source is constant, zeros or an empty message, in training and in evaluation; nothing else changes. Every
condition is trained with the same seeds and steps, and evaluated on the same episodes, whose seeds no training sees.
The loss of a source is the return with all sources minus the return without it; its 95 % interval comes from drawing
trainings and episodes anew (10,000 draws, both with replacement). The trainings with all sources are also set against
no control, random actions, and constant speed advice, the best of which is chosen on other episodes.

Every finished training is one line of the file OUT, so that the benchmark can be stopped and started again. The last
line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from lacer.agents import Protocol, RunRequest, run
from lacer.agents.evaluation import PPOConfig
from lacer.envs import make, register_env
from lacer.envs.traffic.demand import CARRIERS
from lacer.envs.traffic.mixed import MixedTrafficEnv

SCENE: dict[str, Any] = {
    "scene": "small", "lanes": 2, "main_flow": [800, 1200], "control_interval": 6, "horizon": 120, "warm_up": 40,
    "news": {"instruction": 1, "camera": 2, "traffic": 3, "history": 2, "sequence": 2},
    "order_weights": [0.2, 0, 0.4, 0.4],
}
"""Two lanes and little traffic, so that a step is cheap and what an action does is seen at once."""
ENCODER: dict[str, Any] = {
    "sources": {
        "traffic": {"block": "mlp", "width": 64, "depth": 1},
        "history": {"block": "cnn", "width": 32},
        "sequence": {"block": "deepsets", "width": 32, "depth": 1},
        "camera": {"block": "cnn", "channels": 8, "width": 64},
        "instruction": {"block": "sentence_mlp", "width": 32},
    },
    "fusion": {"block": "concat", "width": 64, "depth": 1},
}
PPO = PPOConfig(n_envs=4, n_steps=64, batch_size=64, n_epochs=8, learning_rate=1e-3, gamma=0.5, gae_lambda=0.9,
                log_std_init=0.5, head=(64, 64))
"""Wide exploration and a short horizon: the right lane shows in the reward of the same step."""
EVAL_SEED, CHOICE_SEED = 2_000_000, 2_500_000
ENV = "source_value:lacer/BlankedTraffic-v0"


class BlankedTraffic(MixedTrafficEnv):
    """The motorway, of which one source shows nothing."""

    def __init__(self, blank: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.blank = blank

    def _observe(self) -> dict[str, Any]:
        obs = super()._observe()
        if self.blank:
            value = obs[self.blank]
            obs[self.blank] = " " if isinstance(value, str) else np.zeros_like(value)
        return obs


if "lacer/BlankedTraffic-v0" not in gym.registry:  # this file runs as __main__ and is imported by its name
    register_env("lacer/BlankedTraffic-v0", "source_value:BlankedTraffic", "the motorway with one source blanked")


def train(condition: str, seed: int, steps: int, episodes: int) -> dict[str, Any]:
    """One training and its evaluation."""
    protocol = Protocol(steps=steps, eval_episodes=episodes, eval_seed=EVAL_SEED, ppo=PPO)
    blank = "" if condition == "all" else condition
    request = RunRequest(env=ENV, env_kwargs={**SCENE, "blank": blank}, encoder=ENCODER, protocol=protocol, seed=seed)
    result = run(request, start_method="fork")  # by the default each environment's process would import torch
    if not result.ok:
        raise SystemExit(f"{condition}, seed {seed}: {result.reason}")
    return {"condition": condition, "seed": seed, "steps": steps, "returns": result.returns,
            "speeds": result.metrics["average_speed"], "curve": result.curve,
            "steps_per_second": result.cost.steps_per_second}


def play(env: MixedTrafficEnv, action: np.ndarray | None, first: int, episodes: int) -> dict[str, Any]:
    """Episodes under a constant action; None is random ones."""
    out: dict[str, Any] = {"returns": [], "speeds": []}
    rng, shape = np.random.default_rng(first), env.action_space.shape
    for seed in range(first, first + episodes):
        env.reset(seed=seed)
        total, done = 0.0, False
        while not done:
            _, reward, _, done, info = env.step(rng.uniform(-1, 1, shape) if action is None else action)
            total += reward
        out["returns"].append(total)
        out["speeds"].append(info["metrics"]["average_speed"])
    return out


def controls(episodes: int) -> dict[str, Any]:
    """No control, random actions, and the constant speed advice that is best on other episodes."""
    env = make("lacer/MixedTraffic-v0", **SCENE).unwrapped
    assert isinstance(env, MixedTrafficEnv)
    free = np.zeros(env.action_space.shape or ())
    advice = {}
    for level in (0.25, 0.5, 0.75, 1.0):
        advice[level] = free.copy()
        advice[level][:env.road.segments] = -level
    chosen = max(advice, key=lambda a: np.mean(play(env, advice[a], CHOICE_SEED, episodes)["speeds"]))
    out = {name: play(env, action, EVAL_SEED, episodes) for name, action in
           (("no control", free), ("random", None), (f"constant advice {-chosen}", advice[chosen]))}
    env.close()
    return out


def interval(difference: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % interval of differences (trainings, episodes), both drawn anew."""
    rng = np.random.default_rng(0)
    rows, columns = difference.shape
    i = rng.integers(rows, size=(10_000, rows))
    j = rng.integers(columns, size=(10_000, columns))
    means = np.array([difference[np.ix_(a, b)].mean() for a, b in zip(i, j, strict=True)])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


def report(rows: list[dict[str, Any]], others: dict[str, Any], seeds: list[int]) -> dict[str, Any]:
    """Print the tables; what they say, as JSON."""
    table = {(r["condition"], r["seed"]): r for r in rows}

    def values(condition: str, key: str, which: list[int]) -> np.ndarray:
        return np.array([table[condition, s][key] for s in which])

    out: dict[str, Any] = {"value": {}, "gain": {}}
    print("source       loss of return [95 % interval]     loss of speed, m/s")
    for name in CARRIERS:
        both = [s for s in seeds if ("all", s) in table and (name, s) in table]
        if not both:
            continue
        losses = {key: interval(values("all", key, both) - values(name, key, both)) for key in ("returns", "speeds")}
        out["value"][name] = {"seeds": len(both), **{k: [round(x, 3) for x in v] for k, v in losses.items()}}
        r, v = losses["returns"], losses["speeds"]
        print(f"{name:12} {r[0]:+.2f} [{r[1]:+.2f}, {r[2]:+.2f}]  {len(both)} seeds   "
              f"{v[0]:+.2f} [{v[1]:+.2f}, {v[2]:+.2f}]")
    trained = [s for s in seeds if ("all", s) in table]
    if trained:
        print("PPO with all sources against     return                       speed, m/s")
        for name, x in others.items():
            gain = {key: interval(values("all", key, trained) - np.array(x[key])) for key in ("returns", "speeds")}
            out["gain"][name] = {"speed": round(float(np.mean(x["speeds"])), 2),
                                 **{k: [round(a, 3) for a in v] for k, v in gain.items()}}
            r, v = gain["returns"], gain["speeds"]
            print(f"{name:24} {r[0]:+.2f} [{r[1]:+.2f}, {r[2]:+.2f}]   {v[0]:+.2f} [{v[1]:+.2f}, {v[2]:+.2f}]")
        out["speed"] = [round(float(x), 2) for x in values("all", "speeds", trained).mean(1)]
        out["return"] = [round(float(x), 2) for x in values("all", "returns", trained).mean(1)]
    return out


def main() -> None:
    """Train what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("source_value.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--conditions", nargs="+", choices=["all", *CARRIERS], default=["all", *CARRIERS])
    parser.add_argument("--steps", type=int, default=12_288)
    parser.add_argument("--episodes", type=int, default=60)
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    rows = [r for r in rows if r["steps"] == args.steps and len(r["returns"]) == args.episodes]
    done = {(r["condition"], r["seed"]) for r in rows}
    for seed in args.seeds:
        for condition in args.conditions:
            if (condition, seed) in done:
                continue
            start = time.monotonic()
            row = train(condition, seed, args.steps, args.episodes)
            rows.append(row)
            with args.out.open("a") as f:
                f.write(json.dumps(row) + "\n")
            print(f"seed {seed} {condition:12} return {np.mean(row['returns']):+.2f} "
                  f"speed {np.mean(row['speeds']):.2f} in {time.monotonic() - start:.0f} s", flush=True)
    result = report(rows, controls(args.episodes), args.seeds)
    print(json.dumps({"benchmark": "source_value", "steps": args.steps, "episodes": args.episodes, **result}))


if __name__ == "__main__":
    main()
