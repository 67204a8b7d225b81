"""How candidates a minute grow with workers: one against two processes on two cores, and Ray against the pool.

Real PPO runs on KnownSources of about ten seconds each, the same ones for every executor, after one short run each to
warm up. Orders alternate, so that a machine that slows down does not favour one.

    python benchmarks/parallel.py                  # ray=0: without Ray

The last line is JSON. Goals: two workers at least 1.85 times one; Ray at least 0.9 times the pool.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from lacer.agents import PPOConfig, Protocol, RunRequest
from lacer.search.executors import Executor, ProcessPool

ENCODER = {"sources": {"position": {"block": "mlp", "width": 32}, "picture": {"block": "cnn"},
                       "trend": {"block": "gru"}}, "fusion": {"block": "concat", "width": 64}}


def request(steps: int, seed: int) -> RunRequest:
    ppo = PPOConfig(n_envs=4, n_steps=64, batch_size=64, n_epochs=4)
    return RunRequest(env="lacer/KnownSources-v0", encoder=ENCODER, seed=seed, text_model="hash",
                      protocol=Protocol(steps=steps, eval_episodes=4, ppo=ppo))


def seconds(executor: Executor, jobs: list[RunRequest]) -> tuple[float, float]:
    """Wall time of all jobs, and the mean time of one."""
    start, waiting, running, took = time.perf_counter(), list(enumerate(jobs)), 0, []
    while waiting or running:
        while waiting and executor.free:
            i, job = waiting.pop(0)
            executor.submit(str(i), job)
            running += 1
        for event in executor.poll(1.0):
            if event.evaluation is not None:
                assert event.evaluation.ok, event.evaluation.reason
                took.append(event.evaluation.cost.total_seconds)
                running -= 1
    return time.perf_counter() - start, sum(took) / len(took)


def main(steps: int, candidates: int, rounds: int, ray: bool) -> None:
    log = Path(tempfile.mkdtemp()) / "workers.log"
    executors: dict[str, Executor] = {"one": ProcessPool(1, log, 3600), "two": ProcessPool(2, log, 3600)}
    if ray:
        from lacer.search.ray_executor import RayExecutor

        executors["ray"] = RayExecutor(2, 3600, None)
    for executor in executors.values():
        seconds(executor, [request(256, 0)] * 2)
    wall: dict[str, list[float]] = {name: [] for name in executors}
    each: dict[str, list[float]] = {name: [] for name in executors}
    for r in range(rounds):
        jobs = [request(steps, 100 * r + i) for i in range(candidates)]
        for name in list(executors)[::1 if r % 2 == 0 else -1]:
            total, one = seconds(executors[name], jobs)
            wall[name].append(total)
            each[name].append(one)
            print(f"round {r + 1}: {name:>3}: {candidates} candidates in {total:.1f} s, {one:.1f} s each", flush=True)
    for executor in executors.values():
        executor.close()
    ratio = sum(wall["one"]) / sum(wall["two"])
    out = {"benchmark": "parallel", "candidates": candidates, "steps": steps, "rounds": rounds,
           "seconds_each": {k: round(sum(v) / len(v), 2) for k, v in each.items()}, "two_to_one": round(ratio, 3)}
    print(f"two workers: {ratio:.2f} times one")
    if ray:
        out["ray_to_pool"] = round(sum(wall["two"]) / sum(wall["ray"]), 3)
        print(f"Ray: {out['ray_to_pool']:.2f} times the pool")
    print(json.dumps(out))


if __name__ == "__main__":
    options = dict(a.split("=", 1) for a in sys.argv[1:])
    main(int(options.get("steps", 6000)), int(options.get("candidates", 6)), int(options.get("rounds", 2)),
         options.get("ray", "1") != "0")
