"""Do the probes find the truth where it is known? KnownSources with a redundant pair, noise and a bottleneck.

Per seed one training of an encoder of six sources: `position`, `trend`, `picture` and `words` matter, `echo` is a
noisy copy of `position`, `noise` is noise. The probes are then asked:

- which sources matter: does every relevant source rank above `noise`? (Goal: in at least 19 of 20 seeds.) By each probe
  that speaks of use; `unique_r2` is asked of trend, picture and words only, since position and echo replace each other.
- which pair is redundant: is position with echo the pair with the highest redundancy?
- which encoder is bottlenecked: a second encoder is the same with a trend block whose features pass through two units;
  is its trend's rank the lower one, and the lowest of all its sources?

    python benchmarks/probe_truth.py
    python benchmarks/probe_truth.py seeds=3 steps=2048

The last line is JSON.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lacer.agents import PPOConfig, Protocol, RunRequest, run
from lacer.agents.probes import FUSED
from lacer.encoders import BlockConfig, Features, register_block

RELEVANT = ("position", "trend", "picture", "words")
ENV: dict[str, Any] = {"env": "lacer/KnownSources-v0", "text_model": "hash",
                       "env_kwargs": {"sources": [*RELEVANT, "echo", "noise"], "relevant": list(RELEVANT)}}
ENCODER: dict[str, Any] = {"sources": {
    "position": {"block": "mlp", "width": 32}, "trend": {"block": "cnn", "width": 16},
    "picture": {"block": "cnn", "channels": 8, "width": 32, "head": "spatial_softmax"},
    "words": {"block": "sentence_mlp", "width": 32}, "echo": {"block": "mlp", "width": 32},
    "noise": {"block": "mlp", "width": 32}}, "fusion": {"block": "concat", "width": 64}}
PROBES = ("linear_probe", "mi_action", "permuted_action", "permuted_value", "gradient_share", "unique_r2")


@register_block
class BottleneckConfig(BlockConfig):
    """An MLP over all steps that passes through two units."""

    modality: ClassVar[str] = "series"
    block: Literal["bottleneck"] = "bottleneck"

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return _Bottleneck(shape[0] * shape[1])


class _Bottleneck(nn.Module):
    dim = 16

    def __init__(self, width_in: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(width_in, 2), nn.Linear(2, self.dim))

    def forward(self, x: Tensor) -> Features:
        vector = self.net(x)
        return Features(vector, vector[:, None])


def protocol(steps: int) -> Protocol:
    """Steps do not depend on each other here, so gamma is near 0: PPO then learns ten times as fast."""
    return Protocol(steps=steps, eval_episodes=32, ppo=PPOConfig(
        n_envs=16, n_steps=16, batch_size=128, n_epochs=4, learning_rate=0.003, gamma=0.01, gae_lambda=0.0,
        log_std_init=-1.0))


def judge(seed: int, steps: int) -> dict[str, bool]:
    """One seed: which questions the probes answer rightly."""
    out: dict[str, bool] = {}
    e = run(RunRequest(**ENV, encoder=ENCODER, protocol=protocol(steps), seed=seed))
    assert e.ok, e.reason
    p = e.probes
    for name in PROBES:
        asked = [s for s in RELEVANT if name != "unique_r2" or s != "position"]
        out[name] = min(p[s].get(name, 0.0) for s in asked) > p["noise"].get(name, 0.0)
    for name in ("redundancy", "mi_redundancy"):
        pairs = {frozenset((s, k.split("/")[1])): v for s, values in p.items() for k, v in values.items()
                 if k.startswith(f"{name}/")}
        out[name] = max(pairs, key=lambda k: pairs[k]) == {"position", "echo"}
    narrow = {**ENCODER, "sources": {**ENCODER["sources"], "trend": {"block": "bottleneck"}}}
    q = run(RunRequest(**ENV, encoder=narrow, protocol=protocol(steps), seed=seed)).probes
    for name in ("effective_rank", "srank"):
        ranks = {k: v[name] for k, v in q.items() if k != FUSED}
        out[name] = min(ranks, key=lambda k: ranks[k]) == "trend" and ranks["trend"] < p["trend"][name]
    print(f"seed {seed}: score {e.objective:.3f}; wrong: {', '.join(k for k, v in out.items() if not v) or 'none'}",
          file=sys.stderr, flush=True)
    return out


def main(seeds: str = "20", steps: str = "2048", first: str = "0") -> None:
    torch.set_num_threads(1)
    start = time.monotonic()
    results = [judge(int(first) + i, int(steps)) for i in range(int(seeds))]
    right = {name: sum(r[name] for r in results) for name in results[0]}
    for name, n in right.items():
        print(f"{name:20}{n:4} of {len(results)}")
    print(json.dumps({"benchmark": "probe_truth", "seeds": len(results), "first": int(first), "steps": int(steps),
                      "right": right, "seconds": round(time.monotonic() - start)}))


if __name__ == "__main__":
    main(**dict(a.split("=", 1) for a in sys.argv[1:]))
