"""Observations as the composite encoder takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from lacer.encoders import TextTable
from lacer.envs import TaskCard
from lacer.envs.vec import decode_text


def encoder_space(card: TaskCard) -> spaces.Dict:
    """Observation space of the policy: images (C, H, W) uint8, text an index (1,) int32, the rest as declared."""
    out: dict[str, spaces.Space] = {}
    for name, s in card.sources.items():
        if s.modality == "image":
            h, w, c = s.shape
            out[name] = spaces.Box(0, 255, (c, h, w), np.uint8)
        elif s.modality == "text":
            out[name] = spaces.Box(0, 2**24, (1,), np.int32)
        else:
            out[name] = s.space
    return spaces.Dict(out)


def encode_batch(obs: Mapping[str, Any], card: TaskCard, table: TextTable) -> dict[str, np.ndarray]:
    """A batch of observations (text as bytes (B, L) or strings) in the layout of :func:`encoder_space`."""
    out: dict[str, np.ndarray] = {}
    for name, s in card.sources.items():
        x = obs[name]
        if s.modality == "image":
            out[name] = np.moveaxis(x, -1, 1)
        elif s.modality == "text":
            out[name] = np.array([[table.index(t if isinstance(t, str) else decode_text(t))] for t in x], np.int32)
        else:
            out[name] = x
    return out


class EncoderVecEnv(VecEnvWrapper):
    """Puts :func:`encode_batch` around the environments that :func:`lacer.envs.vec.make_vec` makes."""

    def __init__(self, venv: VecEnv, card: TaskCard, table: TextTable) -> None:
        super().__init__(venv, observation_space=encoder_space(card))
        self.card, self.table = card, table

    def reset(self) -> dict[str, np.ndarray]:
        obs = self.venv.reset()
        assert isinstance(obs, dict)
        return encode_batch(obs, self.card, self.table)

    def step_wait(self) -> VecEnvStepReturn:
        obs, rewards, dones, infos = self.venv.step_wait()
        assert isinstance(obs, dict)
        for info in infos:
            if "terminal_observation" in info:
                last = {k: np.asarray(v)[None] for k, v in info["terminal_observation"].items()}
                info["terminal_observation"] = {
                    k: v[0] for k, v in encode_batch(last, self.card, self.table).items()}
        return encode_batch(obs, self.card, self.table), rewards, dones, infos
