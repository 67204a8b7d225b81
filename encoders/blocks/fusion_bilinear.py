"""Fusion block: low-rank products of the sources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lacer.encoders.layers import ModalityDropout
from lacer.encoders.registry import Features, FusionConfig, choice, modality_dropout, register_block


@register_block
class BilinearConfig(FusionConfig):
    """Low-rank products of the sources' features; expresses "this, but only if that" in a single layer."""

    paper: ClassVar[str] = "Liu et al. 2018 (low-rank multimodal fusion); Kim et al. 2017"
    block: Literal["bilinear"] = "bilinear"
    width: int = choice(64, (16, 32, 64, 128), "units of the state")
    rank: int = choice(4, (2, 4, 8), "products summed for each unit")
    modality_dropout: float = modality_dropout()

    def build_fusion(self, dims: Mapping[str, int]) -> nn.Module:
        return _Bilinear(dims, self)


class _Bilinear(nn.Module):
    """``sum_r w_r prod_m (1 + tanh(W_m^r z_m))``, LayerNorm, ReLU.

    The paper's factors are ``W_m^r [z_m; 1]``; the tanh bounds the product of many sources, and a source that says
    nothing leaves it as it is.
    """

    def __init__(self, dims: Mapping[str, int], c: BilinearConfig) -> None:
        super().__init__()
        self.dim, self.rank = c.width, c.rank
        self.drop = ModalityDropout(c.modality_dropout)
        self.factors = nn.ModuleDict({name: nn.Linear(d, c.rank * c.width) for name, d in dims.items()})
        self.weight = nn.Parameter(torch.randn(c.rank, c.width) * c.rank**-0.5)
        self.norm = nn.LayerNorm(c.width)

    def forward(self, features: dict[str, Features]) -> Tensor:
        factors = torch.stack([1 + self.factors[name](f.vector).tanh() for name, f in self.drop(features).items()])
        products = factors.prod(0).unflatten(1, (self.rank, self.dim))
        return self.norm((products * self.weight).sum(1)).relu()
