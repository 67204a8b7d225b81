"""Set block: DeepSets."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lacer.encoders.layers import SetInput, masked_mean, mlp, orthogonal
from lacer.encoders.registry import BlockConfig, Features, choice, register_block


@register_block
class DeepSetsConfig(BlockConfig):
    """Every element through one MLP, then mean and maximum over the elements; cheap and blind to their order."""

    modality: ClassVar[str] = "set"
    paper: ClassVar[str] = "Zaheer et al. 2017"
    block: Literal["deepsets"] = "deepsets"
    width: int = choice(32, (16, 32, 64), "units of each layer and of the output")
    depth: int = choice(2, (1, 2, 3), "layers of the MLP applied to each element")

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return _DeepSets(shape[1], self)


class _DeepSets(nn.Module):
    def __init__(self, features: int, c: DeepSetsConfig) -> None:
        super().__init__()
        self.dim = c.width
        self.inp = SetInput(features, c.width)
        self.phi = mlp(c.width, c.width, c.depth, "relu")
        self.rho = orthogonal(nn.Linear(2 * c.width, c.width))

    def forward(self, x: Tensor) -> Features:
        tokens, mask = self.inp(x)
        tokens = self.phi(tokens) * mask.unsqueeze(-1)  # ReLU: padding's zeros never exceed the true maximum
        return Features(torch.relu(self.rho(torch.cat([masked_mean(tokens, mask), tokens.amax(1)], 1))), tokens, mask)
