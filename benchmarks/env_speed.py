"""Env steps a second of lacer/MixedTraffic-v0, against the same simulation stepped and steered with nothing read, and
against the same environment through TraCI.

    python benchmarks/env_speed.py [--scene small|full] [--episodes 10] [--options '{"step_length": 0.5}']

All sides play the same episodes with the same actions, in turn. Against the bare simulation processor time is counted,
so that the ratio holds on a busy machine too; with TraCI, where SUMO is a process of its own, time on the clock. The
last line is JSON.

    python benchmarks/env_speed.py --scene sources --scan --episodes 40

looks for the cheapest settings that keep the task's effect: over step length, length of the road and flow, what
clearing the blocked lane, known from the truth, gains against doing nothing on the same episodes (95 % bootstrap
interval over episodes), and what an episode costs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lacer.envs.traffic.demand import CARRIERS
from lacer.envs.traffic.mixed import SCENES, MixedTrafficEnv
from lacer.envs.traffic.simulation import REAPPLY

Clock = Callable[[], float]
STEPS, LENGTHS, FLOWS = (0.5, 1.0), (700.0, 1000.0, 1500.0), (0.8, 1.0, 1.2)
"""Settings of the scan: s, m, shares of the scene's flow on the main road."""
SCAN_SEED = 5_000_000


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


def play(env: MixedTrafficEnv, seeds: Sequence[int], clear: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns, average speeds (m/s) and processor seconds of episodes; ``clear``: the blocked lane is cleared."""
    rows = []
    for seed in seeds:
        start, total, done = time.process_time(), 0.0, False
        _, info = env.reset(seed=seed)
        while not done:
            action = np.zeros(env.action_space.shape or ())
            if clear:
                action[env._slices["lanes"]] = [info["state"][name] for name in env._lane_names]
            _, reward, _, done, info = env.step(action)
            total += reward
        rows.append((total, info["metrics"]["average_speed"], time.process_time() - start))
    env.close()
    returns, speeds, seconds = np.array(rows).T
    return returns, speeds, seconds


def scan(scene: str, episodes: int, flows: Sequence[float], options: dict[str, Any]) -> list[dict[str, Any]]:
    """Print what settings cost and what clearing the blocked lane gains with each; the same as JSON."""
    rng, seeds, out = np.random.default_rng(0), range(SCAN_SEED, SCAN_SEED + episodes), []
    default = MixedTrafficEnv(scene, **options)
    print("step, s  road, m  flow  simulated s/s  episode, ms  gain of the return      gain of the speed, m/s")
    for step, length, flow in itertools.product(STEPS, LENGTHS, flows):
        settings: dict[str, Any] = {
            "step_length": step, "length": length, "main_flow": tuple(flow * x for x in default._p["main_flow"]),
            # A longer road takes longer to fill.
            "warm_up": round(default.warm_up * max(1.0, length / default.road.length) / 10) * 10.0, **options}
        env = MixedTrafficEnv(scene, **settings)
        idle, right = play(env, seeds, False), play(env, seeds, True)
        drawn = rng.integers(episodes, size=(10_000, episodes))
        cost = float(np.median(np.concatenate([idle[2], right[2]])))
        row: dict[str, Any] = {
            "step_length": step, "length": length, "flow": flow, "episode_ms": round(1000 * cost, 1),
            "simulated_s_per_s": round((env.warm_up + env.horizon) / cost)}
        for name, gain in (("return", right[0] - idle[0]), ("speed", right[1] - idle[1])):
            row[name] = [round(float(x), 2) for x in (gain.mean(), *np.percentile(gain[drawn].mean(1), [2.5, 97.5]))]
        out.append(row)
        print(f"{step:7} {length:8.0f} {flow:5.1f} {row['simulated_s_per_s']:14} {row['episode_ms']:12.1f}  "
              + "   ".join("{:+.2f} [{:+.2f}, {:+.2f}]".format(*row[name]) for name in ("return", "speed")), flush=True)
    return out


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scene", choices=sorted(SCENES), default="small")
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--options", type=json.loads, default={}, help="arguments of the environment, as JSON")
    parser.add_argument("--scan", action="store_true", help="cost and effect over a grid of settings instead")
    parser.add_argument("--flows", type=float, nargs="+", default=FLOWS, help="shares of the scene's flow to scan")
    args = parser.parse_args()
    if args.scan:
        rows = scan(args.scene, args.episodes, args.flows, args.options)
        print(json.dumps({"benchmark": "settings", "scene": args.scene, "episodes": args.episodes, "settings": rows}))
        return
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
