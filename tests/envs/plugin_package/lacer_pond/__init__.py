"""An ordinary Gymnasium environment, registered with what its spaces do not say."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lacer.envs import register_env


class Frogs(gym.Env):
    """Jump to the frog that quacks."""

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, horizon=6, render_mode=None):
        self.horizon, self.render_mode = horizon, render_mode
        self.observation_space = spaces.Dict({
            "frogs": spaces.Box(-1, 1, (5, 3), np.float32), "water": spaces.Discrete(3),
            "song": spaces.Text(12, charset="quack ")})
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.near = 0, 0
        return self._look(), {}

    def step(self, action):
        hit = float(np.abs(action - self.frogs[0, 1:]).max() < 0.5)
        self.t, self.near = self.t + 1, self.near + hit
        info = {"metrics": {"hits": self.near}} if self.t == self.horizon else {}
        return self._look(), hit, False, self.t == self.horizon, info

    def _look(self):
        n = int(self.np_random.integers(1, 6))
        self.frogs = np.zeros((5, 3), np.float32)
        self.frogs[:n, 0] = 1
        self.frogs[:n, 1:] = self.np_random.uniform(-1, 1, (n, 2))
        return {"frogs": self.frogs, "water": self.np_random.integers(3), "song": "quack " * int(n > 3)+"quack"}


register_env("pond/Frogs-v0", "lacer_pond:Frogs", "jump to the frog that quacks", objective="hits",
             sources={"frogs": {"modality": "set", "description": "Present, x, y of up to five frogs."}},
             history={"water": 3}, noop=[0, 0])
