"""A fast synthetic task whose truth is known: which sources matter, how, and the best possible return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lacer.envs.errors import LacerError, UnknownNameError
from lacer.envs.sources import Objective, SourceSpec, TaskCard

_WORDS = ("far left", "left", "slightly left", "centre", "slightly right", "right", "far right")
_KINDS = {
    "position": ("vector", "Four readings; the first one is the target of its action dimension."),
    "trend": ("series", "Eight noisy steps of two signals; the slope of the first is the target."),
    "picture": ("image", "A 16x16 picture with one bright blob; its horizontal place is the target."),
    "words": ("text", "A sentence that names the target between far left and far right."),
    "crowd": ("set", "Up to six elements; the mean of their values is the target."),
    "echo": ("vector", "A noisy copy of `position`, redundant with it."),
    "noise": ("vector", "Four numbers of pure noise."),
}


class KnownSourcesEnv(gym.Env):
    """Contextual bandit over several sources.

    Each relevant source j hides a target t_j, uniform on [-1, 1] and drawn anew at every step, and owns one action
    dimension a_j. The reward of a step is ``1 - 3 * mean_j (a_j - t_j)**2``, so in expectation a policy that reads
    every relevant source perfectly gets 1 a step, one that always answers 0 gets 0, and one that ignores a share q
    of the relevant sources gets at best ``1 - q``. ``words`` is rounded to seven levels, of which the best answer, the
    mean of the level, costs ``7/288`` of its share. So the optimal return of an episode of n relevant sources is
    ``horizon * (1 - [words is relevant] * 7 / (288 n))``, :attr:`optimal_return`; the noise in ``trend`` and
    ``picture`` takes less than 0.03 of their share from an ideal reader.

    Args:
        sources: the sources to show, out of position, trend, picture, words, crowd, echo, noise.
        relevant: those that the reward depends on (not echo, not noise); default: all that can be, among ``sources``.
        horizon: steps of an episode.

    Raises:
        LacerError: for unknown, repeated or empty sources or an impossible ``relevant``.
    """

    metadata = {"render_modes": [], "one_per_process": False}  # noqa: RUF012 (Gymnasium's own form)

    def __init__(
        self,
        sources: Sequence[str] = ("position", "trend", "picture", "words", "noise"),
        relevant: Sequence[str] | None = None,
        horizon: int = 16,
        render_mode: str | None = None,
    ) -> None:
        for name in [*sources, *(relevant or ())]:
            if name not in _KINDS:
                raise UnknownNameError("source of lacer/KnownSources-v0", name, _KINDS)
        for names in (sources, relevant or ()):
            if len(set(names)) < len(names):
                raise LacerError(f"a source is named twice: {list(names)}")
        can = [s for s in sources if s not in ("echo", "noise")]
        self.relevant = tuple(can if relevant is None else relevant)
        if not self.relevant or any(r not in can for r in self.relevant):
            raise LacerError(f"relevant={list(self.relevant)} must be a non-empty part of {can}")
        if horizon < 1:
            raise LacerError(f"horizon must be at least 1, not {horizon}")
        if "echo" in sources and "position" not in sources:
            raise LacerError("the source 'echo' is a copy of 'position', so 'position' must be among the sources")
        self.horizon, self.render_mode = horizon, render_mode

        def box(*shape: int) -> spaces.Box:
            return spaces.Box(-3.0, 3.0, shape, np.float32)

        made: dict[str, gym.Space] = {
            "position": box(4), "trend": box(8, 2), "picture": spaces.Box(0, 255, (16, 16, 3), np.uint8),
            "words": spaces.Text(80, charset="abcdefghijklmnopqrstuvwxyzATG .,"), "crowd": box(6, 2),
            "echo": box(4), "noise": box(4),
        }
        self.action_space = spaces.Box(-1.0, 1.0, (len(self.relevant),), np.float32)
        self.task_card = TaskCard(
            env_id="lacer/KnownSources-v0",
            sources={n: SourceSpec(n, _KINDS[n][0], made[n], _KINDS[n][1]) for n in sources},  # type: ignore[arg-type]
            action_space=self.action_space,
            objective=Objective("score"),
            description="Answer, in one action dimension per relevant source, with the value that the source hides. "
            "Score: mean reward of a step; 1 is perfect, 0 is what a constant 0 gets. Not every source need matter.",
            state_names=tuple(f"target_{r}" for r in self.relevant),
            noop=np.zeros(len(self.relevant), np.float32),
        )
        self.observation_space = self.task_card.observation_space

    @property
    def optimal_return(self) -> float:
        """Expected return of a policy that gets all out of the relevant sources, in closed form.

        A target of ``words`` is uniform in its level's interval, of width w = 1/3, or 1/6 at the two ends, so the best
        answer errs by w^2 / 12 on average: 5/6 (1/3)^2 / 12 + 1/6 (1/6)^2 / 12 = 7/864, and thrice that is lost.
        """
        return self.horizon * (1 - ("words" in self.relevant) * 7 / 288 / len(self.relevant))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        self._t, self._total = 0, 0.0
        obs = self._draw()
        return obs, {"state": self._state()}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        a = np.asarray(action, np.float64)
        if a.shape != self.action_space.shape or not np.isfinite(a).all():
            raise LacerError(f"action must be {self.action_space.shape} finite numbers, not {action!r}")
        targets = np.array([self._targets[r] for r in self.relevant])
        reward = float(1 - 3 * np.mean((np.clip(a, -1, 1) - targets) ** 2))
        self._t += 1
        self._total += reward
        done = self._t >= self.horizon
        obs = self._draw()
        info: dict[str, Any] = {"state": self._state()}
        if done:
            info["metrics"] = {"score": self._total / self.horizon}
        return obs, reward, False, done, info

    def _state(self) -> dict[str, float]:
        return {f"target_{r}": self._targets[r] for r in self.relevant}

    def _draw(self) -> dict[str, Any]:
        rng = self.np_random
        t = self._targets = {k: float(v) for k, v in zip(_KINDS, rng.uniform(-1, 1, len(_KINDS)), strict=True)}
        obs: dict[str, Any] = {}
        for name in self.task_card.sources:
            if name == "position":
                obs[name] = np.array([t[name], *rng.normal(0, 1, 3)], np.float32).clip(-3, 3)
            elif name == "trend":
                steps = np.linspace(-1, 1, 8)
                obs[name] = np.stack([t[name] * steps + rng.normal(0, 0.05, 8), rng.normal(0, 1, 8)], 1).astype(
                    np.float32).clip(-3, 3)
            elif name == "picture":
                x = np.arange(16)
                cx, cy = (t[name] + 1) / 2 * 11 + 2, rng.uniform(2, 13)
                blob = np.exp(-((x[None] - cx) ** 2 + (x[:, None] - cy) ** 2) / 3)
                img = 40 * rng.random((16, 16, 3)) + 210 * blob[..., None]
                obs[name] = img.clip(0, 255).astype(np.uint8)
            elif name == "words":
                level = _WORDS[round((t[name] + 1) / 2 * (len(_WORDS) - 1))]
                obs[name] = ("Aim {}.", "The target lies {}.", "Go {}, please.")[rng.integers(3)].format(level)
            elif name == "crowd":
                n = int(rng.integers(2, 7))
                values = rng.normal(0, 0.3, n)
                crowd = np.zeros((6, 2), np.float32)
                crowd[:n, 0], crowd[:n, 1] = 1, values - values.mean() + t[name]
                obs[name] = crowd.clip(-3, 3)
            elif name == "echo":
                obs[name] = np.array([t["position"] + rng.normal(0, 0.1), *rng.normal(0, 1, 3)], np.float32).clip(-3, 3)
            else:
                obs[name] = rng.normal(0, 1, 4).astype(np.float32).clip(-3, 3)
        return obs
