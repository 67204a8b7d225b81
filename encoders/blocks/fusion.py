"""Fusion blocks: concatenation + feed-forward, gated sum, self-attention over all tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from lacer.encoders.layers import Transformer, masked_mean, mlp
from lacer.encoders.registry import Features, FusionConfig, choice, register_block
from lacer.envs import LacerError


@register_block
class ConcatConfig(FusionConfig):
    """Joins the sources' summaries and mixes them by feed-forward layers; the sound default."""

    paper = "arXiv 2512.06982, Table 1"
    block: Literal["concat"] = "concat"
    width: int = choice(64, (16, 32, 64, 128), "units of each layer and of the state")
    depth: int = choice(1, (1, 2, 3), "number of layers")
    activation: Literal["relu", "gelu", "silu", "tanh"] = choice("relu", ("relu", "gelu", "silu"), "non-linearity")

    def build_fusion(self, dims: Mapping[str, int]) -> nn.Module:
        return _Concat(dims, self)


@register_block
class GatedSumConfig(FusionConfig):
    """Every source votes with a learned, input-dependent weight; can turn a useless source down."""

    paper = "Arevalo et al. 2017 (gated multimodal units)"
    block: Literal["gated_sum"] = "gated_sum"
    width: int = choice(64, (16, 32, 64, 128), "units of the state")

    def build_fusion(self, dims: Mapping[str, int]) -> nn.Module:
        return _GatedSum(dims, self)


@register_block
class FusionAttentionConfig(FusionConfig):
    """Self-attention over the tokens of all sources; lets one source's detail be read in the light of another."""

    paper = "Vaswani et al. 2017"
    block: Literal["attention"] = "attention"
    width: int = choice(32, (16, 32, 64), "width of the tokens and of the state")
    heads: int = choice(2, (2, 4), "attention heads; divides the width")
    depth: int = choice(1, (1, 2), "number of layers")

    def build_fusion(self, dims: Mapping[str, int]) -> nn.Module:
        return _Attention(dims, self)


class _Concat(nn.Module):
    def __init__(self, dims: Mapping[str, int], c: ConcatConfig) -> None:
        super().__init__()
        self.dim = c.width
        self.net = mlp(sum(dims.values()), c.width, c.depth, c.activation)

    def forward(self, features: dict[str, Features]) -> Tensor:
        return self.net(torch.cat([f.vector for f in features.values()], 1))


class _GatedSum(nn.Module):
    def __init__(self, dims: Mapping[str, int], c: GatedSumConfig) -> None:
        super().__init__()
        self.dim = c.width
        self.values = nn.ModuleDict({name: nn.Linear(d, c.width) for name, d in dims.items()})
        self.gate = nn.Linear(sum(dims.values()), len(dims))

    def forward(self, features: dict[str, Features]) -> Tensor:
        values = torch.stack([self.values[name](f.vector).tanh() for name, f in features.items()], 1)
        gate = self.gate(torch.cat([f.vector for f in features.values()], 1)).softmax(1)
        return (gate.unsqueeze(-1) * values).sum(1)


class _Attention(nn.Module):
    def __init__(self, dims: Mapping[str, int], c: FusionAttentionConfig) -> None:
        super().__init__()
        if c.width % c.heads:
            raise LacerError(f"fusion attention: width {c.width} is not divisible by heads {c.heads}")
        self.dim = c.width
        self.inp = nn.ModuleDict({name: nn.Linear(d, c.width) for name, d in dims.items()})
        self.kind = nn.Parameter(torch.randn(len(dims), c.width) * 0.02)
        self.net = Transformer(c.width, c.heads, c.depth, 2)

    def forward(self, features: dict[str, Features]) -> Tensor:
        tokens, masks = [], []
        for i, (name, f) in enumerate(features.items()):
            both = torch.cat([f.vector[:, None], f.tokens], 1)
            tokens.append(self.inp[name](both) + self.kind[i])
            mask = torch.ones(f.tokens.shape[:2], dtype=torch.bool, device=both.device) if f.mask is None else f.mask
            masks.append(torch.cat([mask.new_ones(len(mask), 1), mask], 1))
        mask = torch.cat(masks, 1)
        return masked_mean(self.net(torch.cat(tokens, 1), mask), mask)
