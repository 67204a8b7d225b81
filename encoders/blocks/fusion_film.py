"""Fusion block: feature-wise linear modulation by one chosen source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor, nn

from lacer.encoders.layers import ACTIVATIONS, ModalityDropout, join
from lacer.encoders.registry import Features, FusionConfig, choice, modality_dropout, register_block
from lacer.envs import LacerError


@register_block
class FiLMConfig(FusionConfig):
    """One source, named in routing.condition, scales and shifts the layers that join the sources; for commands."""

    paper: ClassVar[str] = "Perez et al. 2018 (FiLM)"
    conditioned: ClassVar[bool] = True
    block: Literal["film"] = "film"
    width: int = choice(64, (16, 32, 64, 128), "units of each layer and of the state")
    depth: int = choice(1, (1, 2, 3), "number of layers")
    activation: Literal["relu", "gelu", "silu", "tanh"] = choice("relu", ("relu", "gelu", "silu"), "non-linearity")
    modality_dropout: float = modality_dropout()

    def build_routed(self, dims: Mapping[str, int], condition: str | None) -> nn.Module:
        if condition is None:
            raise LacerError("film needs routing.condition, the source that conditions it")
        return _FiLM(dims, condition, self)


class _FiLM(nn.Module):
    """Each layer: linear, LayerNorm, ``(1 + scale) * h + shift`` from the conditioning source, activation.

    The layers read all sources, the conditioning one too, so the fusion is well defined with a single source.
    """

    def __init__(self, dims: Mapping[str, int], condition: str, c: FiLMConfig) -> None:
        super().__init__()
        self.dim, self.condition = c.width, condition
        self.drop = ModalityDropout(c.modality_dropout)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(c.width if i else sum(dims.values()), c.width),
                          nn.LayerNorm(c.width, elementwise_affine=False)) for i in range(c.depth))
        self.modulation = nn.Linear(dims[condition], 2 * c.depth * c.width)
        self.activation = ACTIVATIONS[c.activation]()

    def forward(self, features: dict[str, Features]) -> Tensor:
        features = self.drop(features)
        h = join(features)
        modulation = self.modulation(features[self.condition].vector).chunk(2 * len(self.layers), 1)
        for i, layer in enumerate(self.layers):
            h = self.activation((1 + modulation[2 * i]) * layer(h) + modulation[2 * i + 1])
        return h
