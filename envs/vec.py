"""Vectorised environments: the right number of processes, numeric observations, episodes with given seeds."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from lacer.envs.errors import LacerError
from lacer.envs.registration import make

StartMethod = Literal["fork", "spawn", "forkserver"]


class TextAsBytes(gym.ObservationWrapper):
    """Turns every Text entry of a Dict observation into a zero-padded UTF-8 array, since vectorised environments and
    rollout buffers hold numbers. :func:`decode_text` is the inverse."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        assert isinstance(env.observation_space, spaces.Dict)
        self._length = {k: 4 * s.max_length for k, s in env.observation_space.items() if isinstance(s, spaces.Text)}
        self.observation_space = spaces.Dict({
            k: spaces.Box(0, 255, (self._length[k],), np.uint8) if k in self._length else s
            for k, s in env.observation_space.items()})

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        out = dict(observation)
        for key, length in self._length.items():
            raw = observation[key].encode()[:length]
            out[key] = np.frombuffer(raw.ljust(length, b"\0"), np.uint8)
        return out


def decode_text(row: np.ndarray) -> str:
    """The string in a zero-padded UTF-8 array."""
    return row.tobytes().rstrip(b"\0").decode(errors="replace")


class SeededEpisodes(gym.Wrapper):
    """Plays episodes with given seeds, in order; ``info["episode_seed"]`` says which one an episode had."""

    def __init__(self, env: gym.Env, seeds: Sequence[int]) -> None:
        super().__init__(env)
        self._seeds, self._next = list(seeds), 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self._seed = self._seeds[self._next % len(self._seeds)]
        self._next += 1
        obs, info = self.env.reset(seed=self._seed, options=options)
        return obs, {**info, "episode_seed": self._seed}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated, truncated, {**info, "episode_seed": self._seed}


class _InProcess(DummyVecEnv):
    """SB3's environments in this process; observations and infos are copied once, not deeply."""

    def step_wait(self) -> VecEnvStepReturn:
        for i, env in enumerate(self.envs):
            obs, self.buf_rews[i], terminated, truncated, info = env.step(self.actions[i])
            self.buf_dones[i] = terminated or truncated
            info["TimeLimit.truncated"] = truncated and not terminated
            if self.buf_dones[i]:
                info["terminal_observation"] = obs
                obs, self.reset_infos[i] = env.reset()
            self.buf_infos[i] = info
            self._save_obs(i, obs)
        return self._obs_from_buf(), self.buf_rews.copy(), self.buf_dones.copy(), list(self.buf_infos)

    def _obs_from_buf(self) -> dict[str, np.ndarray]:
        return {key: buffer.copy() for key, buffer in self.buf_obs.items()}


def die_with(parent: int) -> None:
    """From now on this process ends when its parent is killed (Linux)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # it is gone already
            os._exit(1)


def _owned(make_env: Callable[[], gym.Env], parent: int) -> gym.Env:
    """Makes the environment of a forked process. Each of these holds the ends of all pipes, so that none would see that
    who steps it has been killed."""
    die_with(parent)
    return make_env()


def make_one(env_id: str, kwargs: dict[str, Any], seeds: Sequence[int] | None = None) -> gym.Env:
    """One environment as vectorised ones hold it: numeric observations, SB3's Monitor, given seeds if any."""
    env: gym.Env = TextAsBytes(make(env_id, **kwargs))
    return Monitor(env if seeds is None else SeededEpisodes(env, seeds))


def make_vec(
    env_id: str,
    n: int,
    kwargs: Mapping[str, Any] | None = None,
    *,
    seed: int | None = None,
    episode_seeds: Sequence[int] | None = None,
    start_method: StartMethod | None = None,
) -> VecEnv:
    """``n`` copies of an environment as one SB3 ``VecEnv`` with numeric observations (text as bytes).

    Environments that allow one simulation per process (``metadata["one_per_process"]``) get a process each; others
    share this one.

    Args:
        seed: seeds copy i with ``seed + i``.
        episode_seeds: instead of ``seed``: the seeds of the episodes, dealt out in turn to the copies.
        start_method: how processes are started; default ``forkserver`` where there is one.

    Raises:
        LacerError: if the environment cannot be made.
    """
    if n < 1:
        raise LacerError(f"at least one environment is needed, not {n}")
    if episode_seeds is not None and len(episode_seeds) < n:
        raise LacerError(f"{n} environments need as many episode seeds, not {len(episode_seeds)}")
    kwargs = dict(kwargs or {})
    probe = make(env_id, **kwargs)  # errors in the arguments show here, not in another process
    one_per_process = bool(probe.metadata.get("one_per_process", False))
    probe.close()
    fns: list[Callable[[], gym.Env]] = [
        partial(make_one, env_id, kwargs, None if episode_seeds is None else list(episode_seeds)[i::n])
        for i in range(n)]
    if one_per_process:
        default = "spawn" if sys.platform == "win32" else "forkserver"
        if start_method == "fork":
            fns = [partial(_owned, f, os.getpid()) for f in fns]
        venv: VecEnv = SubprocVecEnv(fns, start_method=start_method or default)
    else:
        venv = _InProcess(fns)
    if seed is not None:
        venv.seed(seed)
    return venv


def close_vec(env: VecEnv) -> None:
    """Closes an environment, also one of whose processes a part has died."""
    try:
        env.close()
    except (EOFError, OSError):
        for process in getattr(env.unwrapped, "processes", []):
            process.kill()
            process.join()
