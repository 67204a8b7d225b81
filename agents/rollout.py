"""The rollout buffer: observations once, in their own dtypes, laid out as the minibatches are drawn."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples
from torch import Tensor


class SourceRolloutBuffer(DictRolloutBuffer):
    """SB3's buffer for Dict observations, which gives the same minibatches in the same order, with three differences.

    The memory is taken once and not anew for every rollout; it is laid out environment by environment, so nothing is
    copied to flatten it; sources that the encoder does not use are not kept.

    Args:
        sources: those to keep; None: all.
        channels_last: images are kept, and minibatches of them given, with the channels innermost in memory. Shapes
            stay (C, H, W); convolutions then take other kernels, whose results differ in the last bits.
        others: see SB3's ``DictRolloutBuffer``.
    """

    def __init__(self, *args: Any, sources: Collection[str] | None = None, channels_last: bool = False,
                 **kwargs: Any) -> None:
        self._kept = None if sources is None else frozenset(sources)
        self._channels_last = channels_last
        self._memory: dict[str, np.ndarray] = {}
        super().__init__(*args, **kwargs)

    def reset(self) -> None:
        if not self._memory:
            for key, shape in self.obs_shape.items():
                if self._kept is None or key in self._kept:
                    dtype = self.observation_space[key].dtype
                    memory = np.zeros((self.n_envs, self.buffer_size, *self._stored(shape)), dtype)
                    self._memory[key] = np.moveaxis(memory, -1, 2) if self._turned(shape) else memory
        rows, envs = self.buffer_size, self.n_envs
        self.observations = {k: m.swapaxes(0, 1) for k, m in self._memory.items()}
        self.actions = np.zeros((rows, envs, self.action_dim), self.action_space.dtype)
        for name in ("rewards", "returns", "episode_starts", "values", "log_probs", "advantages"):
            setattr(self, name, np.zeros((rows, envs), np.float32))
        self.generator_ready = False
        self.pos, self.full = 0, False

    def free(self) -> None:
        """Gives the observations' memory back; the next :meth:`reset` takes it anew."""
        self._memory, self.observations = {}, {}

    def _turned(self, shape: tuple[int, ...]) -> bool:
        return self._channels_last and len(shape) == 3

    def _stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[1:], shape[0]) if self._turned(shape) else shape

    def add(self, obs: dict[str, np.ndarray], action: np.ndarray, reward: np.ndarray,  # type: ignore[override]
            episode_start: np.ndarray, value: Tensor, log_prob: Tensor) -> None:
        i = self.pos
        for key, memory in self.observations.items():
            memory[i] = obs[key]
        self.actions[i] = action.reshape(self.n_envs, self.action_dim)
        self.rewards[i], self.episode_starts[i] = reward, episode_start
        self.values[i], self.log_probs[i] = value.cpu().numpy().reshape(-1), log_prob.cpu().numpy().reshape(-1)
        self.pos += 1
        self.full = self.pos == self.buffer_size

    def draw(self, batch_size: int) -> Iterator[np.ndarray]:
        """Numbers of the rows of SB3's minibatches, in its order, for :meth:`rows`."""
        assert self.full
        drawn = np.random.permutation(self.buffer_size * self.n_envs)
        if not self.generator_ready:
            self.observations = {k: self.swap_and_flatten(v) for k, v in self.observations.items()}
            for name in ("actions", "values", "log_probs", "advantages", "returns"):
                setattr(self, name, self.swap_and_flatten(getattr(self, name)))
            self.generator_ready = True
        for start in range(0, len(drawn), batch_size):
            yield drawn[start:start + batch_size]

    def rows(self, numbers: np.ndarray) -> DictRolloutBufferSamples:
        """Those rows on the device, after :meth:`draw`."""
        return DictRolloutBufferSamples(
            observations={k: self._images(v, numbers) for k, v in self.observations.items()},
            actions=self.to_torch(self.actions[numbers].astype(np.float32, copy=False)),
            old_values=self.to_torch(self.values[numbers, 0]),
            old_log_prob=self.to_torch(self.log_probs[numbers, 0]),
            advantages=self.to_torch(self.advantages[numbers, 0]),
            returns=self.to_torch(self.returns[numbers, 0]))

    def get(self, batch_size: int | None = None) -> Generator[DictRolloutBufferSamples, None, None]:  # type: ignore[override]
        for numbers in self.draw(batch_size or self.buffer_size * self.n_envs):
            yield self.rows(numbers)

    def _images(self, flat: np.ndarray, rows: np.ndarray) -> Tensor:
        if self._turned(flat.shape[1:]):
            return self.to_torch(np.moveaxis(flat, 1, -1)[rows]).permute(0, 3, 1, 2)
        return self.to_torch(flat[rows])

    def to_torch(self, array: np.ndarray, copy: bool = False) -> Tensor:
        """A tensor on the device; without a copy where the array lies there already."""
        return torch.tensor(array, device=self.device) if copy else torch.as_tensor(array, device=self.device)
