"""Env steps a second of lacer/MixedTraffic-v0, against the same simulation stepped and steered with nothing read.

    python benchmarks/env_speed.py [--scene small|full] [--episodes 6]

Both sides play the same episodes with the same actions, in turn, and processor time is counted, so that the ratio
holds on a busy machine too. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from lacer.envs.traffic.mixed import SCENES, MixedTrafficEnv


def actions(env: MixedTrafficEnv, seed: int) -> np.ndarray:
    """Actions of one episode, spread like those of a policy that explores."""
    steps = round(env.horizon / env.control_interval)
    shape = (steps, *(env.action_space.shape or ()))
    return np.random.default_rng(seed).normal(0, 0.5, shape).clip(-1, 1)


def observed(env: MixedTrafficEnv, seed: int) -> float:
    """Processor seconds of an episode's env steps."""
    env.reset(seed=seed)
    plan = actions(env, seed)
    start = time.process_time()
    for a in plan:
        env.step(a)
    return time.process_time() - start


def bare(env: MixedTrafficEnv, seed: int) -> float:
    """Processor seconds of the same steps and commands, with no observation, reward or tally."""
    env.reset(seed=seed)
    simulation = env._sim
    assert simulation is not None
    commands = [env.command(a) for a in actions(env, seed)]
    steps, every = round(env.control_interval / simulation.step_length), round(2 / simulation.step_length)
    start = time.process_time()
    for command in commands:
        for i in range(steps):
            if simulation._incident:
                simulation._break_down(simulation._incident)
            if i % every == 0:
                simulation._apply(command)
            simulation.sumo.simulationStep()
    return time.process_time() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scene", choices=sorted(SCENES), default="small")
    parser.add_argument("--episodes", type=int, default=6)
    args = parser.parse_args()
    env = MixedTrafficEnv(args.scene)
    observed(env, 0)  # warm up
    full, base, reset, vehicles = [], [], [], []
    for seed in range(args.episodes):
        full.append(observed(env, seed))
        vehicles.append(len(env._seen.ids))
        base.append(bare(env, seed))
        start = time.process_time()
        env.reset(seed=seed)
        reset.append(time.process_time() - start)
    env.close()
    steps = round(env.horizon / env.control_interval)
    result = {
        "scene": args.scene, "env_steps_per_s": steps / float(np.mean(full)),
        "env_steps_per_s_with_reset": steps / float(np.mean(full) + np.mean(reset)),
        "simulated_s_per_s": env.horizon / float(np.mean(full)),
        "ratio_to_bare_simulation": float(np.median(np.array(full) / np.array(base))),
        "reset_ms": 1000 * float(np.mean(reset)), "vehicles_at_end": float(np.mean(vehicles)),
    }
    print(f"scene {args.scene}: {result['env_steps_per_s']:.0f} env steps/s of one core "
          f"({result['env_steps_per_s_with_reset']:.0f} with resets), {result['simulated_s_per_s']:.0f} simulated s/s")
    print(f"time of an env step / time of the same simulation stepped and steered with nothing read: "
          f"{result['ratio_to_bare_simulation']:.2f}")
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()}))


if __name__ == "__main__":
    main()
