"""Do PPO's shortcuts cost final return? The same trainings with and without each, paired by seed.

    python benchmarks/ppo_shortcuts.py                                # lacer/KnownSources-v0
    python benchmarks/ppo_shortcuts.py setting=traffic seeds=5        # lacer/MixedTraffic-v0, short
    Options: shortcuts=fused_adam,channels_last,halves,microbatches,overlap,bf16 seeds=8 first=100 steps=... out=FILE

A run's score is the task metric, averaged over held-out episodes that are the same for all runs. For each shortcut:
mean of the paired differences (with minus without) and their 95 % bootstrap interval over seeds, beside the standard
deviation of the plain runs between seeds. `fine` means that the interval contains zero and that its lower end loses no
more than a quarter of what training gains over doing nothing. `microbatches` cuts the minibatches of 64 rows in three.
With out=FILE finished runs are kept there and not repeated. The last line is JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lacer.agents import PPOConfig, Protocol, RunRequest, run
from lacer.agents.stats import bootstrap

ENCODER: dict[str, dict[str, Any]] = {
    "known": {"sources": {"position": {"block": "mlp"}, "trend": {"block": "gru"}, "picture": {"block": "cnn"},
                          "words": {"block": "sentence_mlp"}}, "fusion": {"block": "concat"}},
    "traffic": {"sources": {"traffic": {"block": "mlp"}, "camera": {"block": "cnn"},
                            "instruction": {"block": "sentence_mlp"}}, "fusion": {"block": "concat"}}}
SETTINGS: dict[str, dict[str, Any]] = {
    "known": {"env": "lacer/KnownSources-v0", "env_kwargs": {}, "steps": 4096, "episodes": 20, "ppo": {
        "n_envs": 4, "n_steps": 64, "batch_size": 64, "n_epochs": 4, "learning_rate": 2e-3, "gamma": 0.1}},
    # As configs/quick.yaml, the preset's episodes too.
    "traffic": {"env": "lacer/MixedTraffic-v0", "steps": 2048, "episodes": 10, "env_kwargs": {
        "scene": "small", "news": {"instruction": 0.6, "camera": 0.1, "instruction+camera": 0.3},
        "main_flow": [2400, 2700]}, "ppo": {
        "n_envs": 2, "n_steps": 128, "batch_size": 64, "n_epochs": 8, "learning_rate": 1e-3, "gae_lambda": 0.85,
        "use_sde": True, "sde_sample_freq": 4, "log_std_init": -1.5, "head": (64, 64)}}}


def score(setting: str, shortcut: str, seed: int, steps: int, kept: Path | None) -> float:
    """Final task metric of one run; ``noop`` does nothing."""
    s, key = SETTINGS[setting], f"{setting} {shortcut} {seed} {steps}"
    if kept is not None and kept.exists():
        for line in kept.read_text().splitlines():
            if (row := json.loads(line))["run"] == key:
                return float(row["score"])
    torch.set_num_threads(2 if shortcut == "halves" else 1)
    ppo = PPOConfig(**s["ppo"], microbatch_size=24, shortcuts=(shortcut,) if shortcut not in ("plain", "noop") else ())
    e = run(RunRequest(env=s["env"], env_kwargs=s["env_kwargs"], seed=seed, text_model="hash",
                       encoder=None if shortcut == "noop" else ENCODER[setting],
                       protocol=Protocol(steps=steps, eval_episodes=s["episodes"], ppo=ppo)), start_method="fork")
    assert e.ok, e.reason
    assert e.objective is not None
    print(f"{key}: {e.objective:.4f} in {e.cost.train_seconds:.0f} s", flush=True)
    if kept is not None:
        with kept.open("a") as f:
            f.write(json.dumps({"run": key, "score": e.objective, "seconds": e.cost.train_seconds}) + "\n")
    return e.objective


def main(options: dict[str, str]) -> None:
    setting = options.get("setting", "known")
    shortcuts = options.get("shortcuts", "fused_adam,channels_last,halves,overlap").split(",")
    first, n = int(options.get("first", 100)), int(options.get("seeds", 8))
    steps = int(options.get("steps", SETTINGS[setting]["steps"]))
    kept = Path(options["out"]) if "out" in options else None
    noop = score(setting, "noop", 0, steps, kept)
    by: dict[str, list[float]] = {s: [] for s in ("plain", *shortcuts)}
    for seed in range(first, first + n):
        for s in by:
            by[s].append(score(setting, s, seed, steps, kept))
    plain = np.array(by["plain"])
    gain = float(plain.mean()) - noop
    out: dict[str, Any] = {"benchmark": "ppo_shortcuts", "setting": setting, "steps": steps, "seeds": n, "first": first,
                           "noop": round(noop, 4), "plain": round(float(plain.mean()), 4),
                           "sd_between_seeds": round(float(plain.std(ddof=1)), 4) if n > 1 else None, "shortcuts": {}}
    for s in shortcuts:
        d = np.array(by[s]) - plain
        low, high = map(float, bootstrap(d))
        out["shortcuts"][s] = {"difference": round(float(d.mean()), 4), "low": round(low, 4), "high": round(high, 4),
                               "fine": bool(high >= 0 and low > -gain / 4 and gain > 0)}
        print(f"{s}: {d.mean():+.4f} [{low:+.4f}, {high:+.4f}] of a gain of {gain:.3f} over doing nothing")
    print(json.dumps(out))


if __name__ == "__main__":
    main(dict(a.split("=", 1) for a in sys.argv[1:]))
