"""Vector block: numerical embeddings and an MLP."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lacer.encoders.layers import as_features, mlp
from lacer.encoders.registry import BlockConfig, Features, choice, register_block


@register_block
class NumericMLPConfig(BlockConfig):
    """Spreads each number over several units before an MLP; learns sharp thresholds and wiggly dependence faster."""

    modality: ClassVar[str] = "vector"
    paper: ClassVar[str] = "Gorishniy et al. 2022 (2203.05556): PLR and Q-LR, the latter with even bins"
    block: Literal["numeric_mlp"] = "numeric_mlp"
    embedding: Literal["periodic", "piecewise"] = choice(
        "piecewise", ("periodic", "piecewise"), "sines and cosines with learned frequencies, or linear pieces")
    pieces: int = choice(8, (8, 16), "frequencies or pieces of each number")
    sigma: float = choice(1.0, (0.3, 1.0, 3.0), "spread of the first frequencies", when=("embedding", ("periodic",)))
    width: int = choice(64, (16, 32, 64, 128), "units of each layer and of the output")
    depth: int = choice(2, (1, 2, 3), "number of layers")

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return _NumericMLP(shape[0], self)


class _NumericMLP(nn.Module):
    units = 8
    """Each number becomes this many units: a linear layer of its own over its embedding, then ReLU."""

    def __init__(self, features: int, c: NumericMLPConfig) -> None:
        super().__init__()
        self.dim = c.width
        self.embed: nn.Module = (_Periodic(features, c.pieces, c.sigma) if c.embedding == "periodic"
                                 else _Piecewise(c.pieces))
        size = 2 * c.pieces if c.embedding == "periodic" else c.pieces
        self.weight = nn.Parameter(torch.empty(features, size, self.units).uniform_(-1, 1) * size**-0.5)
        self.bias = nn.Parameter(torch.empty(features, self.units).uniform_(-1, 1) * size**-0.5)
        self.net = mlp(features * self.units, c.width, c.depth, "relu")

    def forward(self, x: Tensor) -> Features:
        units = torch.einsum("bfe,feu->bfu", self.embed(x), self.weight) + self.bias
        return as_features(self.net(units.relu().flatten(1)))


class _Periodic(nn.Module):
    def __init__(self, features: int, pieces: int, sigma: float) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.randn(features, pieces) * sigma)

    def forward(self, x: Tensor) -> Tensor:
        angle = 2 * math.pi * x.unsqueeze(-1) * self.frequency
        return torch.cat([angle.sin(), angle.cos()], -1)


class _Piecewise(nn.Module):
    """Eq. 1 of the paper with even bins on [-1, 1], where inputs are scaled to; quantiles would need data before
    training. The outer pieces go on beyond the edges."""

    edges: Tensor

    def __init__(self, pieces: int) -> None:
        super().__init__()
        self.pieces = pieces
        self.register_buffer("edges", torch.linspace(-1, 1, pieces + 1)[:-1], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        part = (x.unsqueeze(-1) - self.edges) * (self.pieces / 2)
        return torch.cat([part[..., :1].clamp(max=1), part[..., 1:-1].clamp(0, 1), part[..., -1:].clamp(min=0)], -1)
