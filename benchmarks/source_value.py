"""What each source of lacer/MixedTraffic-v0 is worth: one encoder trained with all sources and with each one blanked.

    python benchmarks/source_value.py --out values.jsonl

A blanked source is constant, zeros or an empty message, in training and in evaluation; nothing else changes. Every
condition is trained with the same seeds and steps, and evaluated on the same episodes, whose seeds no training sees.
The loss of a source is the return with all sources minus the return without it; its 95 % interval comes from drawing
trainings and episodes anew (10,000 draws, both with replacement). The trainings with all sources are also set against
scripted policies: no control, random actions, and the constant advice (speed, or lane to clear) that was best on other
episodes.

    python benchmarks/source_value.py --encoders 10 --seeds 41 42 43 --steps 6144 --out encoders.jsonl

trains that many random encoders of the space `quick`, all sources shown, and sets the spread of their returns against
that of the seeds.

Every finished training is one line of the file OUT, so that the benchmark can be stopped and started again; --runs ends
it after so many trainings. The last line printed is JSON.
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
from lacer.envs import make, register_env, task_card
from lacer.envs.traffic.demand import CARRIERS
from lacer.envs.traffic.mixed import MixedTrafficEnv
from lacer.envs.traffic.scenes import CONTROLS, SCENES

SCENE: dict[str, Any] = {"scene": "sources"}
ENCODER: dict[str, Any] = {
    "sources": {
        "traffic": {"block": "mlp", "width": 64, "depth": 1},
        "history": {"block": "cnn", "width": 32},
        "sequence": {"block": "deepsets", "width": 32, "depth": 1},
        "camera": {"block": "cnn", "channels": 16, "width": 64},
        "instruction": {"block": "sentence_mlp", "width": 64},
    },
    "fusion": {"block": "concat", "width": 64, "depth": 1},
}
PPO = PPOConfig(n_envs=4, n_steps=96, batch_size=96, n_epochs=8, learning_rate=2e-3, gamma=0.6, gae_lambda=0.9,
                log_std_init=-0.3, head=(64, 64))
"""Rollouts of eight whole episodes in each environment; a short horizon, since lanes clear within a few decisions."""
EVAL_SEED, CHOICE_SEED = 5_000_000, 2_500_000
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
    """One training and its evaluation; ``condition`` is ``all``, a source to blank or ``encoder N``."""
    encoder, blank = ENCODER, "" if condition == "all" else condition
    if condition.startswith("encoder "):
        from lacer.search.space import load_space

        space = load_space("quick", task_card("lacer/MixedTraffic-v0", **SCENE))
        point = space.sample(np.random.default_rng(1000 + int(condition.split()[1])))
        encoder, blank = space.to_spec(point).to_dict(), ""
    protocol = Protocol(steps=steps, eval_episodes=episodes, eval_seed=EVAL_SEED, ppo=PPO)
    request = RunRequest(env=ENV, env_kwargs={**SCENE, "blank": blank}, encoder=encoder, protocol=protocol, seed=seed)
    result = run(request, start_method="fork")  # by the default each environment's process would import torch
    if not result.ok:
        raise SystemExit(f"{condition}, seed {seed}: {result.reason}")
    return {"condition": condition, "seed": seed, "steps": steps, "returns": result.returns,
            "speeds": result.metrics["average_speed"], "curve": result.curve,
            "steps_per_second": result.cost.steps_per_second}


Policy = Callable[[MixedTrafficEnv, dict[str, float]], np.ndarray]
"""Environment and privileged state to action."""


def play(env: MixedTrafficEnv, policy: Policy, first: int, episodes: int) -> dict[str, Any]:
    """Episodes under a scripted policy."""
    out: dict[str, Any] = {"returns": [], "speeds": []}
    for seed in range(first, first + episodes):
        _, info = env.reset(seed=seed)
        total, done = 0.0, False
        while not done:
            _, reward, _, done, info = env.step(policy(env, info["state"]))
            total += float(reward)
        out["returns"].append(total)
        out["speeds"].append(info["metrics"]["average_speed"])
    env.close()
    return out


def controls(episodes: int, scene: dict[str, Any]) -> dict[str, Any]:
    """Scripted policies. Those that give advice have every control, those that act at random the scene's own."""
    rng = np.random.default_rng(0)

    def world(**more: Any) -> MixedTrafficEnv:
        env = make("lacer/MixedTraffic-v0", **scene, **more).unwrapped
        assert isinstance(env, MixedTrafficEnv)
        return env

    def advice(speed: float = 0.0, lane: int | None = None) -> Policy:
        def act(env: MixedTrafficEnv, state: dict[str, float]) -> np.ndarray:
            s, lanes = env.road.segments, np.arange(env.road.lanes)
            return np.concatenate([np.full(s, speed), (lanes == lane) * 1.0, [0.0]])
        return act

    def clear(shift: int) -> Policy:
        def act(env: MixedTrafficEnv, state: dict[str, float]) -> np.ndarray:
            n = env.road.lanes
            blocked = [state[f"incident_lane_{k}"] for k in range(n)]
            return np.concatenate([np.zeros(env.road.segments), np.roll(blocked, shift), [state["ramp_order"] < 0]])
        return act

    def best(choices: dict[str, Policy]) -> tuple[str, Policy]:
        return max(choices.items(),
                   key=lambda c: np.mean(play(world(controls=CONTROLS), c[1], CHOICE_SEED, episodes)["speeds"]))

    lanes = world().road.lanes
    speed, slow = best({f"constant speed advice {-x}": advice(-x) for x in (0.25, 0.5, 0.75, 1.0)})
    lane, always = best({f"always clears lane {k} from the right": advice(lane=k) for k in range(lanes)})
    policies: dict[str, Policy] = {
        "no control": advice(), speed: slow, lane: always, "lane known": clear(0), "a wrong lane": clear(1)}
    out = {name: play(world(controls=CONTROLS), policy, EVAL_SEED, episodes) for name, policy in policies.items()}
    out["random"] = play(world(), lambda env, state: rng.uniform(-1, 1, env.action_space.shape), EVAL_SEED, episodes)
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
    print("scripted                          return  speed, m/s  against no control: return, speed [95 % interval]")
    for name, x in played.items():
        gain = {k: interval(np.array([x[k]]) - np.array([played["no control"][k]])) for k in ("returns", "speeds")}
        out[name] = {"return": round(float(np.mean(x["returns"])), 2), "speed": round(float(np.mean(x["speeds"])), 2),
                     "gain": {k: [round(a, 2) for a in v] for k, v in gain.items()}}
        r, v = gain["returns"], gain["speeds"]
        print(f"{name:33} {out[name]['return']:+.2f}  {out[name]['speed']:.2f}  "
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
        print("PPO with all sources against      return                       speed, m/s")
        for name, x in others.items():
            gain = {key: interval(values("all", key, trained) - np.array(x[key])) for key in ("returns", "speeds")}
            out["gain"][name] = {k: [round(a, 3) for a in v] for k, v in gain.items()}
            r, v = gain["returns"], gain["speeds"]
            print(f"{name:33} {r[0]:+.2f} [{r[1]:+.2f}, {r[2]:+.2f}]   {v[0]:+.2f} [{v[1]:+.2f}, {v[2]:+.2f}]")
        out["speed"] = [round(float(x), 2) for x in values("all", "speeds", trained).mean(1)]
        out["return"] = [round(float(x), 2) for x in values("all", "returns", trained).mean(1)]
    return out


def spread(rows: list[dict[str, Any]], names: list[str], seeds: list[int]) -> dict[str, Any]:
    """Print how far encoders lie apart, and seeds of one encoder: standard deviations of the mean return, the first one
    without the share that the seeds put into it."""
    table = {(r["condition"], r["seed"]): r for r in rows}
    names = [n for n in names if all((n, s) in table for s in seeds)]
    if len(names) < 2 or len(seeds) < 2:
        return {"encoders": len(names)}
    out: dict[str, Any] = {"encoders": len(names), "seeds": len(seeds)}
    for key in ("returns", "speeds"):
        scores = np.array([[np.mean(table[n, s][key]) for s in seeds] for n in names])
        within = float(np.sqrt(scores.var(1, ddof=1).mean()))
        between = float(np.sqrt(max(scores.mean(1).var(ddof=1) - within**2 / len(seeds), 0)))
        means = scores.mean(1)
        out[key] = {"encoders_sd": round(between, 3), "seeds_sd": round(within, 3), "ratio": round(between / within, 2),
                    "best": round(float(means.max()), 2), "worst": round(float(means.min()), 2),
                    "best_to_worst_in_seeds_sd": round(float(np.ptp(means)) / within, 2)}
        print(f"{key}: encoders {means.min():.2f} to {means.max():.2f}, standard deviation {between:.2f}; "
              f"seeds {within:.2f}; ratio {between / within:.2f}")
    return out


def main() -> None:
    """Train what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("source_value.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[51, 52, 53, 54, 55])
    parser.add_argument("--conditions", nargs="+", choices=["all", *CARRIERS], default=["all", *CARRIERS])
    parser.add_argument("--steps", type=int, default=7_680)
    parser.add_argument("--episodes", type=int, default=240)
    parser.add_argument("--encoders", type=int, default=0, help="train so many random encoders instead")
    parser.add_argument("--runs", type=int, default=None, help="train at most so many now")
    parser.add_argument("--controls", choices=sorted(SCENES), help="only play the scripted policies, on this scene")
    args = parser.parse_args()
    if args.controls:
        print(json.dumps({"benchmark": "controls", "scene": args.controls, "episodes": args.episodes,
                          **compare(controls(args.episodes, {"scene": args.controls}))}))
        return
    conditions = [f"encoder {i}" for i in range(args.encoders)] or args.conditions
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    rows = [r for r in rows if r["steps"] == args.steps and len(r["returns"]) == args.episodes]
    done = {(r["condition"], r["seed"]) for r in rows}
    missing = [(c, s) for s in args.seeds for c in conditions if (c, s) not in done]
    for condition, seed in missing[:args.runs]:
        start = time.monotonic()
        row = train(condition, seed, args.steps, args.episodes)
        rows.append(row)
        with args.out.open("a") as f:
            f.write(json.dumps(row) + "\n")
        print(f"seed {seed} {condition:12} return {np.mean(row['returns']):+.2f} "
              f"speed {np.mean(row['speeds']):.2f} in {time.monotonic() - start:.0f} s", flush=True)
    if args.runs is not None and len(missing) > args.runs:
        print(f"{len(missing) - args.runs} trainings are left")
        return
    if args.encoders:
        result = spread(rows, conditions, args.seeds)
    else:
        result = report(rows, controls(args.episodes, SCENE), args.seeds)
    print(json.dumps({"benchmark": "source_value", "steps": args.steps, "episodes": args.episodes, **result}))


if __name__ == "__main__":
    main()
