"""Env steps a second of lacer/MixedTraffic-v0, against the same simulation stepped and steered with nothing read, and
against the same environment through TraCI.

    python benchmarks/env_speed.py [--scene small|full] [--episodes 10] [--options '{"step_length": 0.5}']

All sides play the same episodes with the same actions, in turn. Against the bare simulation processor time is counted,
so that the ratio holds on a busy machine too; with TraCI, where SUMO is a process of its own, time on the clock. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np

from lacer.envs.traffic.demand import CARRIERS
from lacer.envs.traffic.mixed import SCENES, MixedTrafficEnv
from lacer.envs.traffic.simulation import REAPPLY

Clock = Callable[[], float]


def actions(env: MixedTrafficEnv, seed: int) -> np.ndarray:
    """Actions of one episode, spread like those of a policy that explores."""
    steps = round(env.horizon / env.control_interval)
    shape = (steps, *(env.action_space.shape or ()))
    return np.random.default_rng(seed).normal(0, 0.5, shape).clip(-1, 1)


def observed(env: MixedTrafficEnv, seed: int, clock: Clock) -> float:
    """Seconds of an episode's env steps."""
    env.reset(seed=seed)
    plan = actions(env, seed)
    start = clock()
    for a in plan:
        env.step(a)
    return clock() - start


def bare(env: MixedTrafficEnv, seed: int) -> float:
    """Processor seconds of the same steps and commands, with no observation, reward or tally."""
    env.reset(seed=seed)
    simulation = env._sim
    assert simulation is not None
    commands = [env.command(a) for a in actions(env, seed)]
    steps, every = round(env.control_interval / simulation.step_length), round(REAPPLY / simulation.step_length)
    start = time.process_time()
    for command in commands:
        for i in range(steps):
            if simulation.now >= simulation._due:
                simulation._break_down()
            if i % every == 0:
                simulation._apply(command)
            simulation.sumo.simulationStep()
            simulation.now += simulation.step_length
    return time.process_time() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scene", choices=sorted(SCENES), default="small")
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--options", type=json.loads, default={}, help="arguments of the environment, as JSON")
    args = parser.parse_args()
    # Drawing which source tells would make episodes unlike in cost: all do, which is the dearest.
    options = {"news": {"+".join(CARRIERS): 1.0}, **args.options}
    env = MixedTrafficEnv(args.scene, **options)
    observed(env, 0, time.process_time)  # warm up
    full, base, reset, updates, local = [], [], [], 0.0, []
    for seed in range(args.episodes):
        full.append(observed(env, seed, time.process_time))
        updates += env._total.driving / env._p["step_length"]
        base.append(bare(env, seed))
        local.append(observed(env, seed, time.perf_counter))
        start = time.process_time()
        env.reset(seed=seed)
        reset.append(time.process_time() - start)
    env.close()
    remote_env = MixedTrafficEnv(args.scene, client="traci", **options)
    remote = [observed(remote_env, seed, time.perf_counter) for seed in range(args.episodes)]
    remote_env.close()
    steps, total = round(env.horizon / env.control_interval), float(np.sum(full))
    result = {
        "scene": args.scene, **args.options, "env_steps_per_s": steps * args.episodes / total,
        "env_steps_per_s_with_reset": steps * args.episodes / (total + float(np.sum(reset))),
        "simulated_s_per_s": env.horizon * args.episodes / total, "vehicle_updates_per_s": updates / total,
        "speed_to_bare_simulation": float(np.median(np.array(base) / np.array(full))),
        "with_resets_in_both": float(np.median((np.array(base) + reset) / (np.array(full) + reset))),
        "speed_to_traci": float(np.median(np.array(remote) / np.array(local))),
        "reset_ms": 1000 * float(np.mean(reset)),
    }
    print(f"scene {args.scene}: {result['env_steps_per_s']:.0f} env steps/s of one core "
          f"({result['env_steps_per_s_with_reset']:.0f} with resets), {result['simulated_s_per_s']:.0f} simulated s/s, "
          f"{result['vehicle_updates_per_s']:.0f} vehicle updates/s")
    print(f"env steps/s, to the same simulation stepped and steered with nothing read: "
          f"{result['speed_to_bare_simulation']:.2f} ({result['with_resets_in_both']:.2f} with resets in both); "
          f"to the same environment through TraCI: "
          f"{result['speed_to_traci']:.1f}")
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()}))


if __name__ == "__main__":
    main()
