"""The composite encoder inside SB3's actor-critic policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.policies import MultiInputActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor

from lacer.encoders import CompositeEncoder, EncoderSpec, TextTable, build
from lacer.encoders.supernet import DartsSupernet, SharedSupernet
from lacer.envs import TaskCard


class CompositeExtractor(BaseFeaturesExtractor):
    """SB3 features extractor around a :class:`CompositeEncoder`.

    Args:
        observation_space: of the policy.
        spec, card, table: see :class:`CompositeEncoder`.
        bf16: as :attr:`CompositeEncoder.bf16`.
    """

    def __init__(self, observation_space: spaces.Space, spec: EncoderSpec, card: TaskCard, table: TextTable,
                 bf16: bool = False) -> None:
        encoder = build(spec, card, table)
        super().__init__(observation_space, features_dim=encoder.dim)
        self.encoder: CompositeEncoder = encoder
        encoder.bf16 = bf16

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        return self.encoder(observations)


class SupernetExtractor(BaseFeaturesExtractor):
    """SB3 features extractor around a supernet (:mod:`lacer.encoders.supernet`).

    Args:
        observation_space: of the policy.
        make: builds the supernet; called when the policy is built, that is after SB3 has seeded torch.
    """

    def __init__(self, observation_space: spaces.Space, make: Callable[[], DartsSupernet | SharedSupernet]) -> None:
        supernet = make()
        super().__init__(observation_space, features_dim=supernet.dim)
        self.supernet = supernet

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        return self.supernet(observations)


class CompositePolicy(MultiInputActorCriticPolicy):
    """Actor and critic over one shared composite encoder.

    SB3's orthogonal initialisation goes to the heads only: the blocks keep the initialisation that suits them.
    """

    def _build(self, lr_schedule: Any) -> None:
        self.ortho_init = False
        super()._build(lr_schedule)
        for module, gain in ((self.mlp_extractor, np.sqrt(2)), (self.action_net, 0.01), (self.value_net, 1.0)):
            module.apply(lambda m, g=gain: self.init_weights(m, g))  # type: ignore[misc]


    def extract_features(self, obs: Any, features_extractor: BaseFeaturesExtractor | None = None) -> Any:
        """The encoder takes observations as they are: SB3 would first turn all of them into floats."""
        return self.features_extractor(obs)

    def evaluate_features(self, features: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """SB3's ``evaluate_actions`` from the encoder's output (B, D) on: values, log likelihoods and entropies."""
        latent_pi, latent_vf = self.mlp_extractor(features)
        distribution = self._get_action_dist_from_latent(latent_pi)
        log_prob = distribution.log_prob(actions)
        return self.value_net(latent_vf), log_prob, distribution.entropy()


def policy_kwargs(spec: EncoderSpec, card: TaskCard, table: TextTable, head: tuple[int, ...],
                  log_std_init: float) -> dict[str, Any]:
    """Arguments of :class:`CompositePolicy` for a spec."""
    return _kwargs(CompositeExtractor, {"spec": spec, "card": card, "table": table}, head, log_std_init)


def supernet_policy_kwargs(make: Callable[[], DartsSupernet | SharedSupernet], head: tuple[int, ...],
                           log_std_init: float) -> dict[str, Any]:
    """Arguments of :class:`CompositePolicy` for a supernet; see :class:`SupernetExtractor`."""
    return _kwargs(SupernetExtractor, {"make": make}, head, log_std_init)


def _kwargs(extractor: type[BaseFeaturesExtractor], arguments: dict[str, Any], head: tuple[int, ...],
            log_std_init: float) -> dict[str, Any]:
    return {
        "features_extractor_class": extractor,
        "features_extractor_kwargs": arguments,
        "net_arch": {"pi": list(head), "vf": list(head)},
        "normalize_images": False,  # the encoder scales every source by its declared modality
        "log_std_init": log_std_init,
    }
