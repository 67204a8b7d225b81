"""Vector block: Transformer over the single numbers."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lacer.encoders.layers import Transformer
from lacer.encoders.registry import BlockConfig, Features, choice, dropout, register_block


@register_block
class FeatureTokensConfig(BlockConfig):
    """Each number becomes a token, with self-attention among them; learns which belong together. Slow if many."""

    modality: ClassVar[str] = "vector"
    paper: ClassVar[str] = "Gorishniy et al. 2021 (2106.11959, FT-Transformer)"
    block: Literal["feature_tokens"] = "feature_tokens"
    width: int = choice(16, (8, 16, 32), "width of the tokens and of the output")
    heads: int = choice(2, (2, 4), "attention heads; divides the width")
    depth: int = choice(1, (1, 2), "number of layers")
    dropout: float = dropout()

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return _FeatureTokens(shape[0], self)


class _FeatureTokens(nn.Module):
    def __init__(self, features: int, c: FeatureTokensConfig) -> None:
        super().__init__()
        self.dim = c.width
        bound = c.width**-0.5
        self.weight = nn.Parameter(torch.empty(features, c.width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(features + 1, c.width).uniform_(-bound, bound))  # the first: summary
        self.net = Transformer(c.width, c.heads, c.depth, 2, c.dropout)

    def forward(self, x: Tensor) -> Features:
        tokens = x.unsqueeze(-1) * self.weight
        out = self.net(nn.functional.pad(tokens, (0, 0, 1, 0)) + self.bias)
        return Features(out[:, 0], out[:, 1:])
