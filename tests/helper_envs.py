"""Small environments with one peculiarity each, for ``module:Id``; processes of their own import them too."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lacer.envs import Objective, SourceSpec, TaskCard, register_env
from lacer.envs.known_sources import KnownSourcesEnv


class Tiny(gym.Env):
    """One vector and one text; the reward is the action's first number; the state counts the steps."""

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, horizon: int = 4, actions: str = "Box", texts: tuple[str, ...] = ("go", "")) -> None:
        self.horizon, self.texts = horizon, texts
        self.action_space: gym.Space = {
            "Box": spaces.Box(-1.0, 1.0, (1,), np.float32), "Box far from 0": spaces.Box(5.0, 9.0, (2,), np.float32),
            "Discrete": spaces.Discrete(3), "MultiDiscrete": spaces.MultiDiscrete([2, 3]),
            "MultiBinary": spaces.MultiBinary(4)}[actions]
        self.task_card = TaskCard(
            env_id="helper/Tiny-v0",
            sources={"numbers": SourceSpec("numbers", "vector", spaces.Box(-np.inf, np.inf, (2,), np.float32), "Two."),
                     "words": SourceSpec("words", "text", spaces.Text(16, min_length=0), "A word.")},
            action_space=self.action_space, objective=Objective("sum"), description="Answer 1.", state_names=("step",))
        self.observation_space = self.task_card.observation_space

    def _obs(self) -> dict[str, Any]:
        return {"numbers": self.np_random.normal(size=2).astype(np.float32),
                "words": self.texts[self._t % len(self.texts)]}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        self._t, self._sum = 0, 0.0
        return self._obs(), {"state": {"step": 0.0}, "pid": os.getpid()}

    def step(self, action: Any) -> tuple[dict, float, bool, bool, dict]:
        self._t += 1
        reward = float(np.asarray(action).reshape(-1)[0])
        self._sum += reward
        info: dict[str, Any] = {"state": {"step": float(self._t)}, "pid": os.getpid()}
        done = self._t >= self.horizon
        if done:
            info["metrics"] = {"sum": self._sum}
        return self._obs(), reward, False, done, info


class OnePerProcess(Tiny):
    """Refuses a second simulation in its process, as SUMO does not."""

    metadata = {"render_modes": [], "one_per_process": True}  # noqa: RUF012
    running = 0

    def reset(self, **kwargs: Any) -> tuple[dict, dict]:
        if not getattr(self, "_mine", False):
            if OnePerProcess.running:
                raise RuntimeError("a second simulation in one process")
            OnePerProcess.running += 1
            self._mine = True
        return super().reset(**kwargs)


class NoMetrics(Tiny):
    """Forgets the objective."""

    def step(self, action: Any) -> tuple[dict, float, bool, bool, dict]:
        *rest, info = super().step(action)
        info.pop("metrics", None)
        return (*rest, info)


class Raises(Tiny):
    """Fails in its third step, with an error of the kind that a bug gives."""

    def step(self, action: Any) -> tuple[dict, float, bool, bool, dict]:
        if self._t == 2:
            raise {"KeyError": KeyError, "RuntimeError": RuntimeError, "AssertionError": AssertionError,
                   "ValueError": ValueError}[self.error]("broken sensor")
        return super().step(action)

    def __init__(self, error: str = "KeyError") -> None:
        super().__init__()
        self.error = error


class RaisesInItsProcess(Raises):
    """The same in a process of its own."""

    metadata = {"render_modes": [], "one_per_process": True}  # noqa: RUF012


class NotFinite(Tiny):
    """Pays NaN."""

    def step(self, action: Any) -> tuple[dict, float, bool, bool, dict]:
        obs, _, *rest = super().step(action)
        return (obs, float("nan"), *rest)  # type: ignore[return-value]


class Slow(KnownSourcesEnv):
    """KnownSources whose steps take 50 ms."""

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        time.sleep(0.05)
        return super().step(action)


class Leaks(Tiny):
    """Takes 16 MB more in every step, in a process of its own."""

    metadata = {"render_modes": [], "one_per_process": True}  # noqa: RUF012

    def step(self, action: Any) -> tuple[dict, float, bool, bool, dict]:
        self._kept = [*getattr(self, "_kept", []), np.ones(2_000_000)]
        time.sleep(0.05)
        return super().step(action)


class Hangs(Tiny):
    """Its third step never ends, in a process of its own."""

    metadata = {"render_modes": [], "one_per_process": True}  # noqa: RUF012

    def step(self, action: Any) -> tuple[dict, float, bool, bool, dict]:
        if self._t == 2:
            time.sleep(3600)
        return super().step(action)


class LeavesProcess(Tiny):
    """Starts a program in a session of its own and does not end it."""

    def __init__(self, seconds: int = 3607) -> None:
        super().__init__()
        self.seconds = seconds

    def reset(self, **kwargs: Any) -> tuple[dict, dict]:
        if not hasattr(self, "_program"):
            self._program = subprocess.Popen(["sleep", str(self.seconds)], start_new_session=True)
        return super().reset(**kwargs)


class ReusesState(Tiny):
    """Has one dict for its state, which it changes; and a picture with more channels than rows."""

    def __init__(self) -> None:
        super().__init__()
        self._state: dict[str, float] = {}
        picture = SourceSpec("picture", "image", spaces.Box(0, 255, (8, 8, 12), np.uint8), "Many channels.")
        self.task_card = replace(self.task_card, sources={**self.task_card.sources, "picture": picture})
        self.observation_space = self.task_card.observation_space

    def _obs(self) -> dict[str, Any]:
        return {**super()._obs(), "picture": np.full((8, 8, 12), self._t, np.uint8)}

    def reset(self, **kwargs: Any) -> tuple[dict, dict]:
        obs, info = super().reset(**kwargs)
        self._state["step"] = 0.0
        return obs, {**info, "state": self._state}

    def step(self, action: Any) -> tuple[dict, float, bool, bool, dict]:
        *rest, info = super().step(action)
        self._state["step"] = float(self._t)
        return (*rest, {**info, "state": self._state})


class SeesNothing(Tiny):
    """NaN in an observation."""

    def _obs(self) -> dict[str, Any]:
        return {**super()._obs(), "numbers": np.full(2, np.nan, np.float32)}


class Prints(Tiny):
    """Prints, and asks whoever started it."""

    def step(self, action: Any) -> tuple[dict, float, bool, bool, dict]:
        print("seen in the log")
        input()
        return super().step(action)


class NoCard(gym.Env):
    """An ordinary Gymnasium environment."""

    observation_space = spaces.Box(0, 1, (1,))
    action_space = spaces.Discrete(2)


class BadConstructor(Tiny):
    """Its constructor fails, but not for its arguments' names."""

    def __init__(self) -> None:
        raise OSError("no licence for the simulator")


for _cls in (Tiny, OnePerProcess, NoMetrics, Raises, RaisesInItsProcess, NotFinite, Slow, Leaks, Hangs,
             LeavesProcess, ReusesState, SeesNothing, Prints, NoCard, BadConstructor):
    register_env(f"helper/{_cls.__name__}-v0", f"helper_envs:{_cls.__name__}", (_cls.__doc__ or "").split("\n")[0])
