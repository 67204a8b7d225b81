"""Set block: pooling by attention."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lacer.encoders.layers import SetInput, check_heads, mlp, orthogonal
from lacer.encoders.registry import BlockConfig, Features, choice, register_block


@register_block
class AttentionPoolingConfig(BlockConfig):
    """Learned queries pick the elements that matter, instead of averaging over all; good where few of many count."""

    modality: ClassVar[str] = "set"
    paper: ClassVar[str] = "Lee et al. 2019 (Set Transformer, PMA)"
    block: Literal["attention_pooling"] = "attention_pooling"
    width: int = choice(32, (16, 32, 64), "units of each layer and of the output")
    heads: int = choice(2, (2, 4), "attention heads; divides the width")
    queries: int = choice(2, (1, 2, 4), "number of learned queries")
    depth: int = choice(1, (1, 2), "layers of the MLP applied to each element")

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return _AttentionPooling(shape[1], self)


class _AttentionPooling(nn.Module):
    def __init__(self, features: int, c: AttentionPoolingConfig) -> None:
        super().__init__()
        check_heads(c.width, c.heads)
        self.dim = c.width
        self.inp = SetInput(features, c.width)
        self.phi = mlp(c.width, c.width, c.depth, "relu")
        self.queries = nn.Parameter(torch.randn(c.queries, c.width) * c.width**-0.5)
        self.attention = nn.MultiheadAttention(c.width, c.heads, batch_first=True)
        self.out = nn.Sequential(orthogonal(nn.Linear(c.queries * c.width, c.width)), nn.ReLU())

    def forward(self, x: Tensor) -> Features:
        elements, mask = self.inp(x)
        tokens = self.phi(elements) * mask.unsqueeze(-1)
        padding = ~mask & mask.any(1, keepdim=True)  # an empty set attends to its zeros: a softmax needs something
        pooled, _ = self.attention(self.queries.expand(len(x), -1, -1), tokens, tokens, key_padding_mask=padding,
                                   need_weights=False)
        return Features(self.out(pooled.flatten(1)), tokens, mask)
