"""Speed of a PPO run against Stable-Baselines3's own loop, against the limit, side by side, and its memory.

    python benchmarks/ppo_speed.py                     # camera: cheap environment with a camera, the learner counts
    python benchmarks/ppo_speed.py setting=traffic     # lacer/MixedTraffic-v0, scene small: the simulation counts
    python benchmarks/ppo_speed.py parts=pair,memory   # two candidates at once; peak memory
    Options: rounds=5 threads=2 n_envs=8 n_steps=128 batch_size=256 n_epochs=4 microbatch_size=128
             shortcuts=fused_adam+channels_last

Sides that are compared have the same encoder, PPO hyper-parameters, environment and seeds, and take turns, one rollout
with its update each, in a process for each; a ratio is the median over the rounds. `sb3` is SB3's loop, buffer and
vectorised environments with the same policy; `ours` is the loop without shortcuts (the same numbers), further sides are
ours with shortcuts; `defaults` is SB3 with its default hyper-parameters, one environment and a CombinedExtractor whose
CNN is that of the composite (`nature`), to which the ratio is taken on samples a second. `limit` is the forward and
backward passes of the same minibatches, plus as many inferences as steps, plus the environment alone with the actions
of a rollout. `cpu` figures are ratios of processor time, which hold on a busy machine too where nothing runs in other
processes. The last line is JSON.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from lacer.agents import PPOConfig, Protocol, RunRequest, run
from lacer.agents.learner import kept_memory
from lacer.agents.policy import CompositePolicy, policy_kwargs
from lacer.agents.ppo import make_model
from lacer.agents.vec import EncoderVecEnv
from lacer.encoders import EncoderSpec, TextTable
from lacer.envs import SourceSpec, register_env, task_card
from lacer.envs.known_sources import KnownSourcesEnv
from lacer.envs.vec import close_vec, make_one, make_vec

CAMERA = "ppo_speed:bench/Camera-v0"
SIDE = 64


class Camera(KnownSourcesEnv):
    """KnownSources whose picture is as large as a camera's, 64x64x3."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        old = self.task_card.sources["picture"]
        picture = SourceSpec("picture", "image", spaces.Box(0, 255, (SIDE, SIDE, 3), np.uint8), old.description)
        self.task_card = replace(self.task_card, env_id="bench/Camera-v0",
                                 sources={**self.task_card.sources, "picture": picture})
        self.observation_space = self.task_card.observation_space

    def _draw(self) -> dict[str, Any]:
        obs = super()._draw()
        obs["picture"] = obs["picture"].repeat(SIDE // 16, 0).repeat(SIDE // 16, 1)
        return obs


if __name__ != "__main__":  # a second registration would be another class
    register_env("bench/Camera-v0", "ppo_speed:Camera", "KnownSources with a camera.")

SETTINGS: dict[str, dict[str, Any]] = {
    "camera": {"env": CAMERA, "kwargs": {}, "ppo": {"n_envs": 8, "n_steps": 128, "batch_size": 256, "n_epochs": 4}},
    "traffic": {"env": "lacer/MixedTraffic-v0", "kwargs": {"scene": "small"},
                "ppo": {"n_envs": 4, "n_steps": 64, "batch_size": 256, "n_epochs": 4, "use_sde": True,
                        "sde_sample_freq": 4, "head": (64, 64)}},
}
BLOCKS: dict[str, dict[str, Any]] = {  # as in configs/expert.yaml
    "vector": {"block": "mlp", "width": 64, "depth": 2}, "series": {"block": "gru", "width": 32},
    "set": {"block": "deepsets", "width": 32, "depth": 2}, "image": {"block": "cnn", "channels": 16, "width": 64},
    "text": {"block": "sentence_mlp", "width": 32}}


class Setting:
    """An environment and PPO's configuration."""

    def __init__(self, name: str, **ppo: Any) -> None:
        data = SETTINGS[name]
        self.name, self.env, self.kwargs = name, data["env"], data["kwargs"]
        self.ppo = PPOConfig(**{**data["ppo"], **ppo})
        self.card = task_card(self.env, **self.kwargs)

    @property
    def rollout(self) -> int:
        return self.ppo.n_envs * self.ppo.n_steps

    def spec(self, image: dict[str, Any] | None = None) -> EncoderSpec:
        blocks = {**BLOCKS, **({} if image is None else {"image": image})}
        return EncoderSpec.parse({"sources": {n: blocks[s.modality] for n, s in self.card.sources.items()},
                                  "fusion": {"block": "concat", "width": 64}}, self.card)

    def envs(self, n: int, sb3: bool = False) -> Any:
        if not sb3:
            return make_vec(self.env, n, self.kwargs, seed=0)
        fns = [lambda: make_one(self.env, self.kwargs)] * n
        return DummyVecEnv(fns) if self.name == "camera" else SubprocVecEnv(fns)

    def ours(self, shortcuts: tuple[str, ...] = (), spec: EncoderSpec | None = None) -> PPO:
        table = TextTable("hash")
        config = self.ppo.model_copy(update={"shortcuts": shortcuts})
        env = EncoderVecEnv(self.envs(config.n_envs), self.card, table)
        return make_model(spec or self.spec(), self.card, table, env, Protocol(ppo=config), 0)

    def sb3(self) -> PPO:
        p, table = self.ppo, TextTable("hash")
        env = EncoderVecEnv(self.envs(p.n_envs, sb3=True), self.card, table)
        model = PPO(CompositePolicy, env, n_steps=p.n_steps, batch_size=p.batch_size, n_epochs=p.n_epochs,
                    learning_rate=p.learning_rate, gamma=p.gamma, gae_lambda=p.gae_lambda, ent_coef=p.ent_coef,
                    use_sde=p.use_sde, sde_sample_freq=p.sde_sample_freq, seed=0,
                    policy_kwargs=policy_kwargs(self.spec(), self.card, table, p.head, p.log_std_init))
        model.set_logger(Logger(None, []))
        return model

    def defaults(self) -> PPO:
        model = PPO("MultiInputPolicy", self.envs(1, sb3=True), seed=0)
        model.set_logger(Logger(None, []))
        return model


def clocked(f: Callable[[], Any]) -> tuple[float, float]:
    """Wall and processor time, of this process with its threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    f()
    return time.perf_counter() - wall, time.process_time() - cpu


def limit(setting: Setting) -> Callable[[], Any]:
    """What cannot be left out of a rollout and its update: see the head of this file."""
    model = setting.ours()
    model.learn(setting.rollout)
    policy, buffer, venv = model.policy, model.rollout_buffer, model.env.venv  # type: ignore[union-attr]
    batches = list(buffer.get(model.batch_size))  # type: ignore[arg-type]
    obs = obs_as_tensor(model._last_obs, model.device)  # type: ignore[arg-type]
    space = setting.card.action_space
    assert isinstance(space, spaces.Box)
    played = buffer.actions.reshape(setting.ppo.n_envs, setting.ppo.n_steps, -1).swapaxes(0, 1)  # laid out for batches
    actions = played.clip(space.low, space.high)

    def once() -> None:
        policy.set_training_mode(False)
        with torch.no_grad():
            for _ in range(setting.ppo.n_steps):
                policy(obs)
        for a in actions:
            venv.step(a)
        policy.set_training_mode(True)
        with kept_memory():
            update()

    def update() -> None:
        for _ in range(setting.ppo.n_epochs):
            for b in batches:
                values, log_prob, _ = policy.evaluate_actions(b.observations, b.actions)
                policy.optimizer.zero_grad()
                (values.mean() + log_prob.mean()).backward()

    return once


class Side:
    """One of the sides that are compared, in a process of its own: what a side asks of the memory allocator would help
    the others."""

    def __init__(self, make: Callable[[], PPO | Callable[[], Any]], steps: int, threads: int) -> None:
        context = multiprocessing.get_context("fork")
        self.steps = steps
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=self._work, args=(make, threads, theirs))
        self._process.start()
        self._pipe.recv()

    def _work(self, make: Callable[[], PPO | Callable[[], Any]], threads: int, pipe: Any) -> None:
        torch.set_num_threads(threads)
        made = make()

        def once() -> None:
            if isinstance(made, PPO):
                made.learn(self.steps)
            else:
                made()

        once()  # warm up
        pipe.send(None)
        while pipe.recv():
            wall, cpu = clocked(once)
            pipe.send((wall / self.steps, cpu / self.steps))
        if isinstance(made, PPO):
            close_vec(made.env)  # type: ignore[arg-type]

    def __call__(self) -> tuple[float, float]:
        """Seconds a sample: wall time, processor time."""
        self._pipe.send(True)
        return self._pipe.recv()  # type: ignore[no-any-return]

    def close(self) -> None:
        self._pipe.send(False)
        self._process.join()


def speed(setting: Setting, rounds: int, threads: int, shortcuts: tuple[str, ...], with_defaults: bool,
          ) -> dict[str, Any]:
    names = ["sb3", "ours"]
    rollout = setting.rollout
    sides = {"sb3": Side(setting.sb3, rollout, threads), "ours": Side(setting.ours, rollout, threads)}
    if shortcuts:  # overlap pays from the second rollout on
        names.append("+".join(shortcuts))
        steps = rollout * (4 if "overlap" in shortcuts else 1)
        sides[names[-1]] = Side(lambda: setting.ours(shortcuts), steps, threads)
    if with_defaults:
        nature = setting.spec({"block": "nature", "width": 256})
        sides["ours, nature"] = Side(lambda: setting.ours(shortcuts, nature), rollout, threads)
        sides["defaults"] = Side(setting.defaults, 2048, threads)
    sides["limit"] = Side(lambda: limit(setting), rollout, threads)
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for r in range(rounds):
        for name in list(sides)[:: 1 if r % 2 == 0 else -1]:
            took[name].append(sides[name]())
        print(f"round {r + 1}: " + ", ".join(f"{n} {1 / t[-1][0]:.0f}" for n, t in took.items()) + " samples/s",
              flush=True)
    for side in sides.values():
        side.close()

    def ratio(a: str, b: str, clock: int) -> float:
        """Samples a second of a over those of b."""
        return round(median(y[clock] / x[clock] for x, y in zip(took[a], took[b], strict=True)), 3)

    out: dict[str, Any] = {"samples_per_s": {n: round(1 / median(x[0] for x in t)) for n, t in took.items()}}
    for name in names[1:]:
        out[name] = {"to_sb3": ratio(name, "sb3", 0), "to_sb3_cpu": ratio(name, "sb3", 1),
                     "of_limit": ratio(name, "limit", 0), "of_limit_cpu": ratio(name, "limit", 1)}
    if with_defaults:
        out["ours, nature"] = {"to_defaults": ratio("ours, nature", "defaults", 0),
                               "to_defaults_cpu": ratio("ours, nature", "defaults", 1)}
    out["sb3"] = {"of_limit": ratio("sb3", "limit", 0), "of_limit_cpu": ratio("sb3", "limit", 1)}
    out["load"] = os.getloadavg()[0]
    return out


def pair(setting: Setting, rounds: int, shortcuts: tuple[str, ...]) -> dict[str, Any]:
    """Two candidates at once, in worker processes with one thread each, against one after the other with one thread and
    with two. ``cpu``: the processor time of the two one after the other, twice over that of the two at once: what the
    ratio would be on two cores that do nothing else."""
    from lacer.search.executors import ProcessPool

    folder = Path(tempfile.mkdtemp())
    pools = {}
    for name, workers, threads in (("one", 1, "1"), ("one, 2 threads", 1, "2"), ("two", 2, "1")):
        os.environ["LACER_THREADS"] = threads
        pools[name] = ProcessPool(workers, folder / "log", 3600)
    del os.environ["LACER_THREADS"]
    protocol = Protocol(steps=6 * setting.rollout, eval_episodes=1,
                        ppo=setting.ppo.model_copy(update={"shortcuts": shortcuts}))
    request = RunRequest(env=setting.env, env_kwargs=setting.kwargs, encoder=setting.spec().to_dict(),
                         protocol=protocol, text_model="hash")

    def both(pool: ProcessPool, steps: int) -> tuple[float, float]:
        """Wall time, and processor time of the runs, which their workers have waited for."""
        waiting = [request.model_copy(update={
            "seed": s, "protocol": protocol.model_copy(update={"steps": steps})}) for s in (0, 1)]
        ended, start, cpu = 0, time.perf_counter(), _children_cpu(pool)
        while ended < 2:
            while waiting and pool.free:
                pool.submit(str(len(waiting)), waiting.pop())
            for event in pool.poll(1.0):
                if event.evaluation is not None:
                    assert event.evaluation.ok, event.evaluation.reason
                    ended += 1
        wall = time.perf_counter() - start
        time.sleep(0.2)  # the workers see the ends
        return wall, _children_cpu(pool) - cpu

    took: dict[str, list[tuple[float, float]]] = {name: [] for name in pools}
    for pool in pools.values():
        both(pool, setting.rollout)
    for r in range(rounds):
        for name in list(pools)[:: 1 if r % 2 == 0 else -1]:
            took[name].append(both(pools[name], protocol.steps))
        print("two candidates, wall and processor time: " + ", ".join(
            f"{n} {t[-1][0]:.1f} s, {t[-1][1]:.1f} s" for n, t in took.items()), flush=True)
    for pool in pools.values():
        pool.close()

    def ratio(name: str, clock: int) -> float:
        return round(median(a[clock] / b[clock] for a, b in zip(took[name], took["two"], strict=True)), 3)

    return {"at_once_to_one_after_the_other": ratio("one", 0), "cpu": round(2 * ratio("one", 1), 3),
            "at_once_to_one_after_the_other_with_two_threads": ratio("one, 2 threads", 0), "load": os.getloadavg()[0]}


def _children_cpu(pool: Any) -> float:
    """Seconds of processor time of ended processes below the workers."""
    total = 0.0
    for slot in pool._slots:
        fields = Path(f"/proc/{slot.process.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")
    return total


def _kb(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def _memory(make: Callable[[Setting], PPO], setting: Setting, queue: Any) -> None:
    torch.set_num_threads(1)
    small = make(Setting(setting.name, n_steps=8, n_envs=2, batch_size=16))
    small.learn(16)  # libraries, kernels
    model = make(setting)
    seen: Any = model.env.reset()  # type: ignore[union-attr]
    obs = {k: torch.as_tensor(np.resize(v, (model.batch_size, *v.shape[1:]))) for k, v in seen.items()}
    del seen
    before = _watched()
    with kept_memory():
        model.policy.extract_features(obs).sum().backward()  # type: ignore[arg-type, union-attr]
    batch = _kb("VmHWM") - before
    model.policy.zero_grad()
    del model
    before = _watched()
    model = make(setting)
    model.learn(2 * setting.rollout)
    peak = _kb("VmHWM") - before
    parameters = sum(p.numel() * p.element_size() for p in model.policy.parameters())
    used = setting.spec().sources
    space = model.observation_space
    assert isinstance(space, spaces.Dict)
    per_step = sum(int(np.prod(s.shape)) * s.dtype.itemsize for k, s in space.items() if k in used)  # type: ignore
    queue.put((1024 * peak, 3 * parameters + setting.rollout * per_step, 1024 * batch))


def _run_memory(setting: Setting, shortcuts: tuple[str, ...], probe_at: tuple[float, ...], queue: Any) -> None:
    torch.set_num_threads(1)

    def once(s: Setting, episodes: int) -> None:
        ppo = s.ppo.model_copy(update={"shortcuts": shortcuts})
        protocol = Protocol(steps=2 * s.rollout, eval_episodes=episodes, probe_at=probe_at, ppo=ppo)
        result = run(RunRequest(env=s.env, env_kwargs=s.kwargs, encoder=s.spec().to_dict(), protocol=protocol,
                                text_model="hash"))
        assert result.ok, result.reason

    once(Setting(setting.name, n_steps=8, n_envs=2, batch_size=16), 2)  # libraries, kernels
    before = _watched()
    once(setting, 10)
    queue.put(1024 * (_kb("VmHWM") - before))


def run_memory(setting: Setting, shortcuts: tuple[str, ...]) -> dict[str, float]:
    """Peak memory in MB of whole runs: two rollouts with updates, evaluation, probes; and with mid-training probes."""
    out: dict[str, float] = {}
    context = multiprocessing.get_context("fork")
    for name, used in (("ours", ()), ("+".join(shortcuts), shortcuts)):
        for label, at in (("", ()), (", probe_at", (0.3,))):
            queue = context.Queue()
            process = context.Process(target=_run_memory, args=(setting, used, at, queue))
            process.start()
            out[name + label] = round(queue.get() / 1e6, 1)
            process.join()
            print(f"peak memory of a run, {name}{label}: {out[name + label]} MB", flush=True)
    return out


def _watched() -> int:
    """Memory in kB from which the peak counts."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _kb("VmRSS")


def memory(setting: Setting, shortcuts: tuple[str, ...]) -> dict[str, Any]:
    """Peak memory of building and two rollouts with updates, over what model, Adam's two moments and the observations
    of one rollout take in their own dtypes; and over that with one minibatch's forward and backward passes
    (``with_batch``)."""
    out: dict[str, Any] = {}
    context = multiprocessing.get_context("fork")
    sides: dict[str, Callable[[Setting], PPO]] = {
        "sb3": Setting.sb3, "ours": Setting.ours, "+".join(shortcuts): lambda s: s.ours(shortcuts)}
    for name, make in sides.items():
        queue = context.Queue()
        process = context.Process(target=_memory, args=(make, setting, queue))
        process.start()
        peak, need, batch = queue.get()
        process.join()
        out[name] = {"peak_mb": round(peak / 1e6, 1), "need_mb": round(need / 1e6, 1), "ratio": round(peak / need, 3),
                     "batch_mb": round(batch / 1e6, 1), "with_batch": round(peak / (need + batch), 3)}
        print(f"peak memory, {name}: {out[name]}", flush=True)
    return out


def main(options: dict[str, str]) -> None:
    name = options.pop("setting", "camera")
    parts = options.pop("parts", "speed").split(",")
    rounds, threads = int(options.pop("rounds", 5)), int(options.pop("threads", os.cpu_count() or 1))
    shortcuts = tuple(filter(None, options.pop("shortcuts", "fused_adam+channels_last+batched_ends+halves").split("+")))
    with_defaults = options.pop("defaults", "1") != "0"
    setting = Setting(name, **{k: int(v) for k, v in options.items()})
    out: dict[str, Any] = {"benchmark": "ppo_speed", "setting": name, "threads": threads, "rounds": rounds,
                           "ppo": {k: getattr(setting.ppo, k) for k in ("n_envs", "n_steps", "batch_size", "n_epochs",
                                                                       "microbatch_size")}}
    if "memory" in parts:
        large = Setting(name, **{"n_steps": 512, **{k: int(v) for k, v in options.items()}})
        out["memory"] = {"n_steps": large.ppo.n_steps, **memory(large, shortcuts),
                         "run_mb": run_memory(large, shortcuts)}
    if "speed" in parts:
        out["speed"] = speed(setting, rounds, threads, shortcuts, with_defaults and name == "camera")
    if "pair" in parts:
        out["pair"] = pair(setting, rounds, shortcuts)
    print(json.dumps(out))


if __name__ == "__main__":
    main(dict(a.split("=", 1) for a in sys.argv[1:]))
