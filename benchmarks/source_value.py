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
from collections.abc import Callable
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
    "scene": "small", "lanes": 2, "main_flow": [800, 1200], "ramp_flow": [60, 200], "control_interval": 6,
    "horizon": 120, "warm_up": 40, "order_weights": [0.4, 0, 0.3, 0.3], "order_weight": 0.3,
    "news": {"instruction": 1, "camera": 2, "traffic": 3, "history": 2, "sequence": 2},
}
"""Two lanes and little traffic, so that a step is cheap and what an action does is seen at once; few vehicles on the
ramp, so that obeying the dispatcher costs little speed."""
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


Policy = Callable[[dict[str, float]], np.ndarray]
"""Privileged state to action."""


def play(env: MixedTrafficEnv, policy: Policy, first: int, episodes: int) -> dict[str, Any]:
    """Episodes under a scripted policy."""
    out: dict[str, Any] = {"returns": [], "speeds": []}
    for seed in range(first, first + episodes):
        _, info = env.reset(seed=seed)
        total, done = 0.0, False
        while not done:
            _, reward, _, done, info = env.step(policy(info["state"]))
            total += reward
        out["returns"].append(total)
        out["speeds"].append(info["metrics"]["average_speed"])
    return out


def controls(episodes: int, scene: dict[str, Any]) -> dict[str, Any]:
    """No control, random actions, the constant speed advice that is best on other episodes, and what knowing the lane
    of the incident is worth: clearing it, and clearing another one."""
    env = make("lacer/MixedTraffic-v0", **scene).unwrapped
    assert isinstance(env, MixedTrafficEnv)
    segments, lanes, shape = env.road.segments, env.road.lanes, env.action_space.shape or ()
    rng = np.random.default_rng(0)

    def advice(level: float) -> Policy:
        action = np.zeros(shape)
        action[:segments] = -level
        return lambda state: action

    def clear(shift: int) -> Policy:
        def act(state: dict[str, float]) -> np.ndarray:
            action = np.zeros(shape)
            for k in range(lanes):
                if state[f"incident_lane_{k}"]:
                    action[segments + (k + shift) % lanes] = 1.0
            action[-1] = state["ramp_order"] < 0
            return action
        return act

    best = max((0.25, 0.5, 0.75, 1.0),
               key=lambda level: np.mean(play(env, advice(level), CHOICE_SEED, episodes)["speeds"]))
    policies = {"no control": advice(0.0), "random": lambda state: rng.uniform(-1, 1, shape),
                f"constant advice {-best}": advice(best), "lane and orders known": clear(0), "a wrong lane": clear(1)}
    out = {name: play(env, policy, EVAL_SEED, episodes) for name, policy in policies.items()}
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


def compare(played: dict[str, Any]) -> dict[str, Any]:
    """Print scripted policies against no control, on the same episodes; the same as JSON."""
    out: dict[str, Any] = {}
    print("scripted                 return  speed, m/s  against no control: return, speed [95 % interval]")
    for name, x in played.items():
        gain = {k: interval(np.array([x[k]]) - np.array([played["no control"][k]])) for k in ("returns", "speeds")}
        out[name] = {"return": round(float(np.mean(x["returns"])), 2), "speed": round(float(np.mean(x["speeds"])), 2),
                     "gain": {k: [round(a, 2) for a in v] for k, v in gain.items()}}
        r, v = gain["returns"], gain["speeds"]
        print(f"{name:24} {out[name]['return']:+.2f}  {out[name]['speed']:.2f}  "
              f"{r[0]:+.2f} [{r[1]:+.2f}, {r[2]:+.2f}]  {v[0]:+.2f} [{v[1]:+.2f}, {v[2]:+.2f}]")
    return out


def report(rows: list[dict[str, Any]], others: dict[str, Any], seeds: list[int]) -> dict[str, Any]:
    """Print the tables; what they say, as JSON."""
    out: dict[str, Any] = {"controls": compare(others), "value": {}, "gain": {}}
    table = {(r["condition"], r["seed"]): r for r in rows}

    def values(condition: str, key: str, which: list[int]) -> np.ndarray:
        return np.array([table[condition, s][key] for s in which])

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
            out["gain"][name] = {k: [round(a, 3) for a in v] for k, v in gain.items()}
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
    parser.add_argument("--controls", choices=("small", "full"), help="only play the scripted controls, on this scene")
    args = parser.parse_args()
    if args.controls:
        print(json.dumps({"benchmark": "controls", "scene": args.controls, "episodes": args.episodes,
                          **compare(controls(args.episodes, {"scene": args.controls}))}))
        return
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
    result = report(rows, controls(args.episodes, SCENE), args.seeds)
    print(json.dumps({"benchmark": "source_value", "steps": args.steps, "episodes": args.episodes, **result}))


if __name__ == "__main__":
    main()
