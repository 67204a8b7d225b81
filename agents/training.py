"""What a designer trains by itself before it proposes: PPO runs with a supernet, in parts that can be resumed.

A training is cut into parts of whole rollouts. Each part begins with random numbers that depend on the seed and its
number alone and with new episodes, and ends with a checkpoint. So a training that was killed goes on from the last
part that was finished, and finds what it would have found in peace.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor, nn
from torch.nn import functional as F

from lacer.agents.calls import find
from lacer.agents.evaluation import Cost, Evaluation, PPOConfig, Training
from lacer.agents.parts import (
    learn_part,
    load_optimizer,
    optimizer_tensors,
    pack,
    part_seed,
    read_state,
    unpack,
    write_state,
)
from lacer.agents.policy import CompositePolicy, SupernetExtractor, supernet_policy_kwargs
from lacer.agents.ppo import Diverged, Progress, Report, attempt, evaluate, make_ppo
from lacer.agents.vec import EncoderVecEnv
from lacer.encoders import TextTable
from lacer.encoders.supernet import DartsSupernet, SharedSupernet
from lacer.envs import LacerError, task_card
from lacer.envs.vec import StartMethod, close_vec, make_vec

Supernet = DartsSupernet | SharedSupernet

PARTS = 20
"""Parts of a supernet's training, each of which ends with a checkpoint."""


class Session:
    """The environment, the steps and the checkpoint of a designer's own training. Use it as a context manager.

    Args:
        job: what is asked.
        report, start_method: see :func:`lacer.agents.run`.

    Attributes:
        card, table: the task and the embedded strings.
        env: the training environments; made when first asked for.
        steps: environment steps taken so far.
        curve: learning curve, as in an Evaluation.
    """

    def __init__(self, job: Training, report: Report = lambda _: None, start_method: StartMethod | None = None) -> None:
        self.job, self.report, self._start_method = job, report, start_method
        self.card = task_card(job.env, **job.env_kwargs)
        self.table = TextTable(job.text_model)
        self.steps = 0
        self.curve: list[tuple[int, float]] = []
        self._env: EncoderVecEnv | None = None
        self._begin = time.monotonic()
        self._identity = json.loads(job.model_dump_json(exclude={"checkpoint"}))

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        if self._env is not None:
            close_vec(self._env)

    @property
    def env(self) -> EncoderVecEnv:
        if self._env is None:
            self._env = EncoderVecEnv(make_vec(self.job.env, self.job.protocol.ppo.n_envs, self.job.env_kwargs,
                                               start_method=self._start_method), self.card, self.table)
        return self._env

    @property
    def rollout(self) -> int:
        """Environment steps of a rollout."""
        return self.job.protocol.ppo.n_envs * self.job.protocol.ppo.n_steps

    def seed(self, *key: int) -> int:
        """A seed that depends on that of the training and on some numbers."""
        return part_seed(self.job.seed, *key)

    def learn(self, model: PPO, rollouts: int, callback: BaseCallback | None = None, *, seed: int) -> None:
        """Trains a model, beginning with new episodes.

        Raises:
            Diverged: a parameter is not finite.
        """
        progress = Progress(self.report, self.job.steps, self.steps - model.num_timesteps)
        before = model.num_timesteps
        callbacks: list[BaseCallback] = [progress] if callback is None else [progress, callback]
        try:
            learn_part(model, rollouts * self.rollout, callbacks, seed)
            progress.check()
        except ValueError as e:
            if "of distribution" in str(e):  # torch's check of the actions' distribution
                raise Diverged("the distribution of the actions is not finite") from None
            raise
        finally:
            self.steps += model.num_timesteps - before
        self.curve += progress.curve

    def evaluate(self, model: PPO, episodes: int, seed: int) -> float:
        """Mean task metric of greedy episodes, whose steps count. ``seed`` is that of the first one."""
        protocol = self.job.protocol.model_copy(update={"eval_episodes": episodes, "eval_seed": seed})
        played = evaluate(model, self.card, self.table, self.job.env,
                          {**self.job.env_kwargs, **self.job.eval_env_kwargs}, protocol,
                          self._start_method)
        self.steps += len(played.rows["reward"])
        return float(np.mean(played.metrics[self.card.objective.metric]))

    def save(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Writes the checkpoint: tensors, and plain data beside them."""
        if self.job.checkpoint is None:
            return
        write_state(Path(self.job.checkpoint), self._identity, tensors,
                    {"steps": self.steps, "curve": self.curve, "state": dict(state)})

    def restore(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and data of the checkpoint; None if there is none of this training, or a damaged one: the training
        then begins anew."""
        kept = None if self.job.checkpoint is None else read_state(Path(self.job.checkpoint), self._identity)
        if kept is None:
            return None
        tensors, about = kept
        try:
            self.steps, self.curve = int(about["steps"]), [(int(n), float(r)) for n, r in about["curve"]]
            return tensors, dict(about["state"])
        except (KeyError, TypeError, ValueError):
            return None

    def result(self, objective: float | None, found: dict[str, Any], parameters: int = 0) -> Evaluation:
        """What the worker sends back."""
        seconds = time.monotonic() - self._begin
        return Evaluation(objective=objective, curve=self.curve, found=found, seed=self.job.seed,
                          cost=Cost(env_steps=self.steps, train_seconds=seconds, parameters=parameters))


def run_training(job: Training, report: Report = lambda _: None, *, start_method: StartMethod | None = None,
                 ) -> Evaluation:
    """What a designer's own training says: its function, found by name, called with a :class:`Session`.

    Whatever goes wrong in it is a failed evaluation with its reason, as with :func:`lacer.agents.run`.

    Raises:
        LacerError: if the request is wrong, or there is no such function.
    """
    function: Callable[[Session], Evaluation] = find(job.function)

    with Session(job, report, start_method) as session:
        try:
            result = attempt(lambda: function(session), job.seed)
        except LacerError as e:  # the environment's, or no encoder of the space can be built
            result = Evaluation.failure(str(e), job.seed)
        if result.status != "ok":
            result.cost.env_steps = session.steps
        return result


class Part(BaseCallback):
    """A callback with a state of its own, which the checkpoints hold."""

    def _on_step(self) -> bool:
        return True

    def tensors(self) -> dict[str, Tensor]:
        """What has to be kept."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what :meth:`tensors` gave."""


class _RatedAdam(torch.optim.Adam):
    """Adam with a ``rate`` by group, for SB3 sets one learning rate for all groups."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] *= group["rate"]
        try:
            return super().step(closure)
        finally:
            for group in self.param_groups:
                group["lr"] /= group["rate"]


class SupernetPolicy(CompositePolicy):
    """Actor and critic over a supernet.

    Args:
        alpha_rate: learning rate of the alphas of a :class:`DartsSupernet` over that of the weights; 0: they are not
            trained with them.
    """

    def __init__(self, *args: Any, alpha_rate: float = 1.0, **kwargs: Any) -> None:
        self._alpha_rate = alpha_rate
        super().__init__(*args, **kwargs)

    @property
    def supernet(self) -> Supernet:
        """The supernet."""
        return cast(SupernetExtractor, self.features_extractor).supernet

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        alphas = self.supernet.arch_parameters() if isinstance(self.supernet, DartsSupernet) else []
        known = set(map(id, alphas))
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.parameters() if id(p) not in known], "rate": 1.0},
            {"params": alphas, "rate": self._alpha_rate}]
        self.optimizer = _RatedAdam(groups[:1 + (bool(alphas) and self._alpha_rate > 0)], lr=lr_schedule(1),
                                    eps=1e-5)  # as SB3's


def train_supernet(session: Session, make: Callable[[], Supernet], part: Part | None = None, *,
                   alpha_rate: float = 1.0, share: float = 1.0) -> PPO:
    """Trains a supernet with PPO, as candidates are trained, for the steps that the session's job grants.

    Args:
        make: builds the supernet.
        part: callback that acts on it.
        alpha_rate: see :class:`SupernetPolicy`.
        share: of the steps.

    Raises:
        Diverged: a parameter is not finite.
    """
    p = session.job.protocol.ppo
    arguments = {**supernet_policy_kwargs(make, p.head, p.log_std_init), "alpha_rate": alpha_rate}
    model = make_ppo(SupernetPolicy, arguments, session.env, p, session.seed(0))
    part = part or Part()
    rollouts = max(1, int(session.job.steps * share) // session.rollout)
    each = -(-rollouts // PARTS)
    done = 0
    kept = session.restore()
    if kept is not None:
        tensors, state = kept
        model.policy.load_state_dict(unpack("policy", tensors))
        load_optimizer(model.policy.optimizer, unpack("optimizer", tensors))
        part.load(unpack("part", tensors))
        done, model.num_timesteps, model._n_updates = (int(state[k]) for k in ("rollouts", "timesteps", "updates"))
    while done < rollouts:
        n = min(each, rollouts - done)
        session.learn(model, n, part, seed=session.seed(1, done))
        done += n
        session.save(
            {**pack("policy", model.policy.state_dict()), **pack("part", part.tensors()),
             **pack("optimizer", optimizer_tensors(model.policy.optimizer))},
            {"rollouts": done, "timesteps": model.num_timesteps, "updates": model._n_updates})
    return model


class Alphas(Part):
    """Trains the alphas of a :class:`DartsSupernet` on every rollout, before the weights see it (DARTS's two levels,
    first order): as many minibatches as PPO takes, PPO's loss, an Adam of their own.

    Args:
        learning_rate: of that Adam; betas 0.5 and 0.999, weight decay 1e-3 as in DARTS.
        ppo: PPO's configuration.
    """

    def __init__(self, learning_rate: float, ppo: PPOConfig) -> None:
        super().__init__()
        self.learning_rate, self.ppo = learning_rate, ppo
        self._optimizer: torch.optim.Optimizer | None = None
        self._kept: dict[str, Tensor] = {}

    def _on_training_start(self) -> None:
        if self._optimizer is None:
            self._alphas = cast(DartsSupernet, cast(SupernetPolicy, self.model.policy).supernet).arch_parameters()
            self._optimizer = torch.optim.Adam(self._alphas, lr=self.learning_rate, betas=(0.5, 0.999),
                                               weight_decay=1e-3)
            load_optimizer(self._optimizer, self._kept)
        for alpha in self._alphas:  # PPO's update neither moves them nor counts them when it clips gradients
            alpha.requires_grad_(False)

    def _on_rollout_end(self) -> None:
        assert self._optimizer is not None
        model, c = self.model, self.ppo
        assert isinstance(model, PPO)
        policy = model.policy
        discrete = isinstance(model.action_space, spaces.Discrete)
        policy.set_training_mode(True)
        for alpha in self._alphas:
            alpha.requires_grad_(True)
        for _ in range(c.n_epochs):
            for batch in model.rollout_buffer.get(model.batch_size):
                actions = batch.actions.long().flatten() if discrete else batch.actions
                values, log_prob, entropy = policy.evaluate_actions(batch.observations, actions)
                advantages = batch.advantages
                if len(advantages) > 1:
                    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
                ratio = (log_prob - batch.old_log_prob).exp()
                gain = torch.min(advantages * ratio, advantages * ratio.clamp(1 - c.clip_range, 1 + c.clip_range))
                bonus = -log_prob if entropy is None else entropy
                loss = (c.vf_coef * F.mse_loss(batch.returns, values.flatten()) - gain.mean()
                        - c.ent_coef * bonus.mean())
                gradients = torch.autograd.grad(loss, self._alphas, allow_unused=True)
                for alpha, gradient in zip(self._alphas, gradients, strict=True):
                    alpha.grad = gradient
                self._optimizer.step()
        self._optimizer.zero_grad()
        for alpha in self._alphas:
            alpha.requires_grad_(False)
        policy.set_training_mode(False)

    def tensors(self) -> dict[str, Tensor]:
        assert self._optimizer is not None
        return optimizer_tensors(self._optimizer)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self._kept = dict(tensors)


def parameters(module: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
