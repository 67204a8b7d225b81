"""PPO's gradient for a minibatch: as a whole, in pieces one after the other, each in parts side by side or not."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples
from torch import Tensor, nn

from lacer.agents.policy import CompositePolicy
from lacer.agents.rollout import SourceRolloutBuffer


class Figures(NamedTuple):
    """Means over the rows of a minibatch, under SB3's names; NaN if not wanted."""

    loss: float
    approx_kl: float = math.nan
    policy_gradient_loss: float = math.nan
    value_loss: float = math.nan
    entropy_loss: float = math.nan
    clip_fraction: float = math.nan


class Gradient:
    """Puts PPO's gradient for minibatches of the full rollout buffer into the parameters' ``grad``.

    Args:
        ppo: policy, buffer and coefficients; advantages are normalised over the minibatch if it says so.
        microbatch: a minibatch is worked on in pieces of at most so many rows, one after the other, whose gradients are
            added up, so that the rows and activations of one piece are in memory at a time; None: as a whole.
        parts: the encoder works on so many parts of the rows, side by side.
        side_by_side: calls a function with several tuples of arguments, each in a thread of its own.
        told: whether all figures are wanted.
    """

    def __init__(self, ppo: PPO, microbatch: int | None, parts: int,
                 side_by_side: Callable[[Callable[..., Any], list[tuple[Any, ...]]], list[Any]], told: bool) -> None:
        progress = ppo._current_progress_remaining
        self.ppo, self.policy = ppo, cast(CompositePolicy, ppo.policy)
        self.buffer = cast(SourceRolloutBuffer, ppo.rollout_buffer)
        self.clip_range: float = cast(Any, ppo.clip_range)(progress)
        self.clip_range_vf: float | None = None if ppo.clip_range_vf is None else cast(Any, ppo.clip_range_vf)(progress)
        self.microbatch, self.parts, self._side_by_side, self.told = microbatch, parts, side_by_side, told

    def __call__(self, numbers: np.ndarray) -> Figures:
        """Adds the gradient for the rows of those numbers; their figures."""
        n = len(numbers)
        advantages = self.buffer.to_torch(self.buffer.advantages[numbers, 0])
        if self.ppo.normalize_advantage and n > 1:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        pieces = 1 if self.microbatch is None else -(-n // self.microbatch)
        found = []
        for start, end in pairwise(n * i // pieces for i in range(pieces + 1)):
            share = (end - start) / n  # every term of the loss is a mean over rows
            found.append([share * x for x in self._rows(  # no name here keeps the rows while the next ones are fetched
                self.buffer.rows(numbers[start:end])._replace(advantages=advantages[start:end]), share)])
        return Figures(*map(sum, zip(*found, strict=True)))

    def _rows(self, batch: DictRolloutBufferSamples, share: float) -> Figures:
        """Adds the gradient of ``share`` of the rows' loss; the rows' figures."""
        obs, n = batch.observations, len(batch.advantages)
        if self.parts == 1 or n < 2 * self.parts:
            loss, figures = self._loss(self.policy.extract_features(obs), batch)
            (share * loss).backward()
            return figures
        # The encoder works in parts, the small heads and the loss on all rows.
        weights = [p for p in self.policy.features_extractor.parameters() if p.requires_grad]

        def forward(start: int, end: int) -> Tensor:
            return cast(Tensor, self.policy.extract_features({k: v[start:end] for k, v in obs.items()}))

        def backward(part: Tensor, gradient: Tensor) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(part, weights, gradient, allow_unused=True)

        parts = self._side_by_side(forward, list(pairwise(n * i // self.parts for i in range(self.parts + 1))))
        features = torch.cat(parts).detach().requires_grad_()
        loss, figures = self._loss(features, batch)
        (share * loss).backward()
        assert features.grad is not None
        gradients = self._side_by_side(backward, list(zip(parts, features.grad.split([len(p) for p in parts]),
                                                          strict=True)))
        for weight, *terms in zip(weights, *gradients, strict=True):
            for term in terms:
                if term is not None and weight.grad is None:  # laid out as the weight: Adam's fused kernel asks for it
                    weight.grad = term if term.stride() == weight.stride() else torch.empty_like(weight).copy_(term)
                elif term is not None:
                    weight.grad = cast(Tensor, weight.grad).add_(term)
        return figures

    def _loss(self, features: Tensor, batch: DictRolloutBufferSamples) -> tuple[Tensor, Figures]:
        """Eq. 9 of Schulman et al. 2017, in the order of SB3's operations, of advantages as they are; its figures."""
        ppo, clip = self.ppo, self.clip_range
        actions = batch.actions.long().flatten() if isinstance(ppo.action_space, spaces.Discrete) else batch.actions
        values, log_prob, entropy = self.policy.evaluate_features(features, actions)
        values = values.flatten()
        log_ratio = log_prob - batch.old_log_prob
        ratio = torch.exp(log_ratio)
        gain = torch.min(batch.advantages * ratio, batch.advantages * torch.clamp(ratio, 1 - clip, 1 + clip)).mean()
        bonus = torch.mean(-log_prob) if entropy is None else torch.mean(entropy)
        if self.clip_range_vf is not None:
            values = batch.old_values + torch.clamp(values - batch.old_values, -self.clip_range_vf, self.clip_range_vf)
        value_loss = nn.functional.mse_loss(batch.returns, values)
        loss = -gain + ppo.ent_coef * -bonus + ppo.vf_coef * value_loss
        figures = Figures(loss.item())
        with torch.no_grad():
            if self.told or ppo.target_kl is not None:
                figures = figures._replace(approx_kl=((ratio - 1) - log_ratio).mean().item())
            if self.told:
                figures = figures._replace(
                    policy_gradient_loss=-gain.item(), value_loss=value_loss.item(), entropy_loss=-bonus.item(),
                    clip_fraction=((ratio - 1).abs() > clip).float().mean().item())
        return loss, figures
