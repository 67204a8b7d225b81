"""PPO as in Stable-Baselines3, without what a run does not need, and with shortcuts that can be switched on."""

from __future__ import annotations

import ctypes
import math
import platform
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import explained_variance, obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lacer.agents.gradient import Figures, Gradient
from lacer.agents.rollout import SourceRolloutBuffer
from lacer.envs import LacerError

T = TypeVar("T")


class Diverged(Exception):
    """Training produced NaN or infinite numbers."""


class CompositePPO(PPO):
    """SB3's PPO, extended at its two hooks, ``collect_rollouts`` and ``train``.

    Without shortcuts every number is that of SB3's own loop: the same operations in the same order, without copies of
    observations, checks of distributions and, where nobody reads the log, its figures. It ends at the first loss,
    gradient or action that is not finite.

    Args:
        parts: the encoder works on minibatches in so many parts, side by side, in threads of their own, and the parts'
            gradients are added up: sums are taken in another order. Encoders that draw random numbers or count
            statistics while they train (dropout, batch normalisation) work on whole minibatches.
        overlap: the next rollout is played while the parameters are updated, with those from before the update, so the
            data is one update old (Huang et al. 2023, arXiv 2310.00036, section 3.2). Not for encoders that draw random
            numbers while they train; those play in turn.
        batched_ends: the values of all episodes that are cut off at the same step are asked for at once.
        microbatch: a minibatch is worked on in pieces of at most so many rows, one after the other, whose gradients are
            added up, so that the activations of one piece are in memory at a time; None: as a whole. Advantages are
            normalised over the minibatch and every figure is its mean, but sums are taken in another order. Dropout
            draws other numbers; encoders with batch normalisation work on whole minibatches.
        others: see SB3's ``PPO``.

    Raises:
        Diverged: in ``learn``, as soon as a loss, a gradient or an action is not finite.
        LacerError: in ``learn``, for a reward that is not finite.
    """

    def __init__(self, *args: Any, parts: int = 1, overlap: bool = False, batched_ends: bool = False,
                 microbatch: int | None = None, **kwargs: Any) -> None:
        self.parts, self.overlap, self.batched_ends, self.microbatch = parts, overlap, batched_ends, microbatch
        self._plain: bool | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: Future[list[dict[str, Any]]] | None = None
        self._actor: ActorCriticPolicy | None = None
        kwargs.setdefault("rollout_buffer_class", SourceRolloutBuffer)
        super().__init__(*args, **kwargs)

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        """Nothing is wrapped: SB3 would turn pictures with more channels than rows or columns round."""
        return cast(VecEnv, env)

    def _setup_model(self) -> None:
        super()._setup_model()
        self._parameters = [p for p in self.policy.parameters() if p.requires_grad]
        self._spare: RolloutBuffer | None = None

    def learn(self, *args: Any, **kwargs: Any) -> Any:
        with _unchecked_distributions(), kept_memory(), _threads_each(1 if self.parts > 1 else None):
            try:
                return super().learn(*args, **kwargs)
            finally:
                self._finish()

    def free(self) -> None:
        """Gives the rollouts' memory back; learning anew takes it again."""
        for buffer in (self.rollout_buffer, self._spare):
            if isinstance(buffer, SourceRolloutBuffer):
                buffer.free()

    # -- rollouts -----------------------------------------------------------------------------------------------------

    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer,
                         n_rollout_steps: int) -> bool:
        if self._ahead is not None:
            callback.on_rollout_start()
            steps = self._ahead.result()
            self._ahead = None
            self.rollout_buffer, self._spare = cast(RolloutBuffer, self._spare), self.rollout_buffer
            for step in steps:
                if not self._count(env, callback, step):
                    return False
        else:
            self._begin(self.policy, env, rollout_buffer)
            callback.on_rollout_start()
            for n in range(n_rollout_steps):
                if not self._step(self.policy, env, rollout_buffer, n, lambda step: self._count(env, callback, step)):
                    return False
            self._end(self.policy, rollout_buffer)
        callback.update_locals(locals())
        callback.on_rollout_end()
        if self.overlap and self.num_timesteps < self._total_timesteps and self.plain:
            self._play_ahead(env, n_rollout_steps)
        return True

    def _count(self, env: VecEnv, callback: BaseCallback, step: Mapping[str, Any]) -> bool:
        self.num_timesteps += env.num_envs
        callback.update_locals({**step, "env": env, "self": self})
        if not callback.on_step():
            return False
        self._update_info_buffer(step["infos"], step["dones"])
        return True

    def _begin(self, policy: ActorCriticPolicy, env: VecEnv, buffer: RolloutBuffer) -> None:
        assert self._last_obs is not None
        policy.set_training_mode(False)
        buffer.reset()
        if self.use_sde:
            policy.reset_noise(env.num_envs)

    def _step(self, policy: ActorCriticPolicy, env: VecEnv, buffer: RolloutBuffer, n_steps: int,
              tell: Callable[[dict[str, Any]], bool]) -> bool:
        """One step of all environments. ``tell`` gets what SB3's callbacks see, under SB3's names, and says whether to
        go on."""
        if self.use_sde and self.sde_sample_freq > 0 and n_steps % self.sde_sample_freq == 0:
            policy.reset_noise(env.num_envs)
        with torch.no_grad():
            drawn, values, log_probs = policy(obs_as_tensor(cast(Any, self._last_obs), self.device))
        actions = clipped_actions = drawn.cpu().numpy()
        if not math.isfinite(float(log_probs.sum())):
            raise Diverged(f"the distribution of the actions is not finite after {self.num_timesteps} steps")
        if isinstance(self.action_space, spaces.Box):
            clipped_actions = np.clip(actions, self.action_space.low, self.action_space.high)
        new_obs, rewards, dones, infos = env.step(clipped_actions)
        if not math.isfinite(float(rewards.sum())):
            raise LacerError(f"the environment gave the reward {rewards[~np.isfinite(rewards)][0]:g} (after "
                             f"{self.num_timesteps:,} steps)")
        if not tell({"actions": actions, "clipped_actions": clipped_actions, "values": values, "log_probs": log_probs,
                     "new_obs": new_obs, "rewards": rewards, "dones": dones, "infos": infos, "n_steps": n_steps}):
            return False
        # A truncated episode would have gone on: its value stands for the rest.
        cut = [i for i in np.flatnonzero(dones) if infos[i].get("TimeLimit.truncated", False)
               and infos[i].get("terminal_observation") is not None]
        if cut and self.batched_ends:
            last = [infos[i]["terminal_observation"] for i in cut]
            with torch.no_grad():
                rest = policy.predict_values(obs_as_tensor({k: np.stack([o[k] for o in last]) for k in last[0]},
                                                           self.device))
            rewards[cut] += self.gamma * rest.flatten().cpu().numpy()
        else:
            for i in cut:
                with torch.no_grad():
                    rest = policy.predict_values(policy.obs_to_tensor(infos[i]["terminal_observation"])[0])
                rewards[i] = (rewards[i] + self.gamma * rest[0, 0]).item()  # in SB3's precision, also for 64 bits
        buffer.add(cast(Any, self._last_obs), actions, rewards, cast(Any, self._last_episode_starts), values, log_probs)
        self._last_obs, self._last_episode_starts = cast(Any, new_obs), dones
        return True

    def _end(self, policy: ActorCriticPolicy, buffer: RolloutBuffer) -> None:
        with torch.no_grad():
            values = policy.predict_values(obs_as_tensor(cast(Any, self._last_obs), self.device))
        buffer.compute_returns_and_advantage(last_values=values, dones=cast(Any, self._last_episode_starts))

    def _play_ahead(self, env: VecEnv, n_steps: int) -> None:
        """Starts the next rollout in a thread, with a copy of the policy as it is now."""
        if self._actor is None:
            state = torch.get_rng_state()
            self._actor = cast(ActorCriticPolicy, self.policy_class(
                self.observation_space, self.action_space, self.lr_schedule, use_sde=self.use_sde,
                **self.policy_kwargs).to(self.device))
            torch.set_rng_state(state)
            self._spare = self.rollout_buffer_class(  # type: ignore[misc]
                self.n_steps, cast(Any, self.observation_space), self.action_space, device=self.device,
                gamma=self.gamma, gae_lambda=self.gae_lambda, n_envs=self.n_envs, **self.rollout_buffer_kwargs)
        actor, buffer = self._actor, cast(RolloutBuffer, self._spare)
        with torch.no_grad():
            for mine, theirs in zip(actor.state_dict().values(), self.policy.state_dict().values(), strict=True):
                mine.copy_(theirs)

        def play() -> list[dict[str, Any]]:
            steps: list[dict[str, Any]] = []

            def keep(step: dict[str, Any]) -> bool:
                steps.append({**step, "rewards": step["rewards"].copy(), "new_obs": None})  # the buffer has them
                return True

            self._begin(actor, env, buffer)
            for n in range(n_steps):
                self._step(actor, env, buffer, n, keep)
            self._end(actor, buffer)
            return steps

        self._ahead = self._threads(1).submit(play)

    # -- updates ------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        self.policy.set_training_mode(True)
        optimizer = self.policy.optimizer
        self._update_learning_rate(optimizer)
        threads = self.parts if self.parts > 1 and self.device.type == "cpu" and self.plain else 1
        told = bool(self.logger.output_formats)
        gradient = Gradient(self, None if self._statistics else self.microbatch, threads, self._side_by_side, told)
        epochs: list[list[Figures]] = []
        with _threads_each(self.parts if threads < self.parts else None):
            for _ in range(self.n_epochs):
                epochs.append([])
                for rows in gradient.buffer.draw(self.batch_size):
                    optimizer.zero_grad()
                    epochs[-1].append(gradient(rows))
                    loss = epochs[-1][-1].loss
                    norm = nn.utils.clip_grad_norm_(self._parameters, self.max_grad_norm)
                    if not math.isfinite(loss) or not math.isfinite(float(norm)):
                        what = "gradient" if math.isfinite(loss) else "loss"
                        raise Diverged(f"NaN or infinite {what} in an update after {self.num_timesteps} steps")
                    if self._too_far(epochs[-1][-1]):
                        break
                    optimizer.step()
                self._n_updates += 1
                if self._too_far(epochs[-1][-1]):
                    break
        self.logger.record("train/loss", loss)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if told:
            self._tell(epochs, gradient)

    def _too_far(self, figures: Figures) -> bool:
        """Whether the policy has gone too far from that of the rollout, as SB3 judges it."""
        return self.target_kl is not None and figures.approx_kl > 1.5 * self.target_kl

    def _tell(self, epochs: list[list[Figures]], gradient: Gradient) -> None:
        """SB3's figures for the log."""
        for name in ("entropy_loss", "policy_gradient_loss", "value_loss", "clip_fraction"):
            self.logger.record(f"train/{name}", np.mean([getattr(f, name) for epoch in epochs for f in epoch]))
        self.logger.record("train/approx_kl", np.mean([f.approx_kl for f in epochs[-1]]))
        buffer = gradient.buffer
        self.logger.record("train/explained_variance",
                           explained_variance(buffer.values.flatten(), buffer.returns.flatten()))
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", torch.exp(self.policy.log_std).mean().item())
        self.logger.record("train/clip_range", gradient.clip_range)
        if gradient.clip_range_vf is not None:
            self.logger.record("train/clip_range_vf", gradient.clip_range_vf)

    # -- threads ------------------------------------------------------------------------------------------------------

    @property
    def _statistics(self) -> bool:
        """Whether the network counts statistics of minibatches."""
        return any(isinstance(m, _BatchNorm) for m in self.policy.modules())

    @property
    def plain(self) -> bool:
        """Whether the network in training is a function of its input alone, row by row: no dropout, no statistics."""
        if self._plain is None:
            self._plain = not self._statistics
            if self._plain:
                obs = obs_as_tensor(cast(Any, self._last_obs), self.device)
                devices = [self.device] if self.device.type == "cuda" else []
                self.policy.set_training_mode(True)
                with torch.random.fork_rng(devices), torch.no_grad():
                    state = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
                    self.policy.extract_features(cast(Any, obs))
                    drawn = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
                self._plain = all(map(torch.equal, state, drawn))
        return self._plain

    def _side_by_side(self, f: Callable[..., T], arguments: list[tuple[Any, ...]]) -> list[T]:
        """``f`` of each tuple of arguments, the first one in this thread, the others in threads of their own."""
        others = [self._threads(len(arguments)).submit(f, *a) for a in arguments[1:]]
        return [f(*arguments[0]), *(o.result() for o in others)]

    def _threads(self, n: int) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(n + 1, initializer=torch.set_num_threads, initargs=(1,))
        return self._pool

    def _finish(self) -> None:
        if self._ahead is not None:
            self._ahead.exception()
            self._ahead = None
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


@contextmanager
def _unchecked_distributions() -> Iterator[None]:
    """torch checks the parameters and values of every distribution; a sum tells the same."""
    before = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(before)


@contextmanager
def kept_memory() -> Iterator[None]:
    """glibc keeps freed memory meanwhile. By default it gives large blocks back to the system and asks for them anew in
    every minibatch; the page faults of that take up to a quarter of an update. Elsewhere it does nothing."""
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_threshold = -1, -3
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(mmap_threshold, 2**30) or libc.mallopt(mmap_threshold, 2**25)  # which older ones allow at most
    try:
        yield
    finally:  # to where glibc itself moves the two when large blocks are freed
        libc.mallopt(trim_threshold, 2**26)
        libc.mallopt(mmap_threshold, 2**25)
        libc.malloc_trim(0)


@contextmanager
def _threads_each(n: int | None) -> Iterator[None]:
    """torch works with so many threads meanwhile; None: as it does."""
    before = torch.get_num_threads()
    if n is not None:
        torch.set_num_threads(n)
    try:
        yield
    finally:
        if n is not None:
            torch.set_num_threads(before)
