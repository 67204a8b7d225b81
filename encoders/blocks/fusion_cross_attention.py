"""Fusion block: learned queries attend to the tokens of all sources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lacer.encoders.layers import ModalityDropout, TokenFusion, check_heads, orthogonal
from lacer.encoders.registry import Features, FusionConfig, choice, modality_dropout, register_block


@register_block
class CrossAttentionConfig(FusionConfig):
    """Learned queries collect what they need from all sources' tokens; cheaper than `attention` with many of them."""

    paper: ClassVar[str] = "Jaegle et al. 2021 (Perceiver)"
    block: Literal["cross_attention"] = "cross_attention"
    width: int = choice(32, (16, 32, 64), "width of the tokens and of the state")
    heads: int = choice(2, (2, 4), "attention heads; divides the width")
    depth: int = choice(1, (1, 2), "number of layers")
    queries: int = choice(4, (1, 2, 4, 8), "number of learned queries")
    modality_dropout: float = modality_dropout()

    def build_fusion(self, dims: Mapping[str, int]) -> nn.Module:
        return _CrossAttention(dims, self)


class _CrossAttention(TokenFusion):
    def __init__(self, dims: Mapping[str, int], c: CrossAttentionConfig) -> None:
        super().__init__(dims, c.width)
        check_heads(c.width, c.heads)
        self.drop = ModalityDropout(c.modality_dropout)
        self.queries = nn.Parameter(torch.randn(c.queries, c.width) * c.width**-0.5)
        layer = nn.TransformerDecoderLayer(c.width, c.heads, 2 * c.width, dropout=0.0, activation="gelu",
                                           batch_first=True, norm_first=True)
        self.net = nn.TransformerDecoder(layer, c.depth, norm=nn.LayerNorm(c.width))
        self.out = nn.Sequential(orthogonal(nn.Linear(c.queries * c.width, c.width)), nn.ReLU())

    def forward(self, features: dict[str, Features]) -> Tensor:
        tokens, mask = self.sequence(self.drop(features))
        queries = self.queries.expand(len(tokens), -1, -1)
        return self.out(self.net(queries, tokens, memory_key_padding_mask=~mask).flatten(1))
