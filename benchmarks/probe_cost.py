"""What the probes cost: their share of a run, and the time of each.

One run of the expert's encoder at a normal candidate's protocol, 10,000 steps, all probes: `Cost.probe_seconds` over
`total_seconds`, as the run itself records them. Goal: at most 3 %. Then each probe's CPU time on that run's rows. What
the probes import (scikit-learn, one to two seconds) is loaded before, as a search's workers do when they start.

    python benchmarks/probe_cost.py                                     # KnownSources, five sources
    python benchmarks/probe_cost.py env=lacer/MixedTraffic-v0

The last line is JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any

import numpy as np
import torch

from lacer.agents import PPOConfig, Protocol, RunRequest, probing, run
from lacer.agents.probes import Sample, list_probes
from lacer.agents.worker import PRELOADED
from lacer.envs import task_card
from lacer.search.config import expert_spec


def main(env: str = "lacer/KnownSources-v0", steps: str = "10000", repeats: str = "5") -> None:
    torch.set_num_threads(1)
    for name in PRELOADED:
        importlib.import_module(name)
    spec = expert_spec(task_card(env), None)
    samples: list[Sample] = []
    original = probing.take

    def take(*args: Any) -> Sample:
        samples.append(original(*args))
        return samples[-1]

    probing.take = take
    e = run(RunRequest(env=env, encoder=spec.to_dict(), text_model="hash", protocol=Protocol(
        steps=int(steps), eval_episodes=10, ppo=PPOConfig())))
    if not e.ok:
        sys.exit(e.reason)
    share = e.cost.probe_seconds / e.cost.total_seconds
    print(f"{env}: {e.cost.probe_seconds:.2f} s of {e.cost.total_seconds:.1f} s, {share:.2%}")
    seconds: dict[str, list[float]] = {}
    for _ in range(int(repeats)):
        samples[-1]._known.clear()
        for name, probe in list_probes().items():  # what probes share counts for the first one
            start = time.process_time()
            probe.compute(samples[-1])
            seconds.setdefault(name, []).append(1000 * (time.process_time() - start))
    each = {k: round(float(np.median(v)), 1) for k, v in seconds.items()}
    for name, ms in sorted(each.items(), key=lambda x: -x[1]):
        print(f"{name:20}{ms:8.1f} ms")
    print(json.dumps({"benchmark": "probe_cost", "env": env, "steps": int(steps), "sources": len(spec.sources),
                      "probe_seconds": round(e.cost.probe_seconds, 3), "total_seconds": round(e.cost.total_seconds, 1),
                      "share": round(share, 4), "goal_met": share <= 0.03, "ms": each}))


if __name__ == "__main__":
    main(**dict(a.split("=", 1) for a in sys.argv[1:]))
