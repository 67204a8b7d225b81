"""Fusion blocks: concatenation + feed-forward, the paper's feed-forward, gated sum, self-attention over all tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lacer.encoders.layers import ModalityDropout, ResidualFFN, TokenFusion, Transformer, join, masked_mean, mlp
from lacer.encoders.registry import Features, FusionConfig, choice, modality_dropout, register_block


@register_block
class ConcatConfig(FusionConfig):
    """Joins the sources' summaries and mixes them by feed-forward layers; the sound default."""

    paper: ClassVar[str] = "arXiv 2512.06982, Table 1"
    block: Literal["concat"] = "concat"
    width: int = choice(64, (16, 32, 64, 128), "units of each layer and of the state")
    depth: int = choice(1, (1, 2, 3), "number of layers")
    activation: Literal["relu", "gelu", "silu", "tanh"] = choice("relu", ("relu", "gelu", "silu"), "non-linearity")
    norm: bool = choice(False, (False, True), "LayerNorm after every linear layer; steadies training")
    modality_dropout: float = modality_dropout()

    def build_fusion(self, dims: Mapping[str, int]) -> nn.Module:
        return _Concat(dims, self)


@register_block
class MergeConfig(FusionConfig):
    """Joins, adds or multiplies the sources' summaries, then feed-forward pairs with skip connections."""

    paper: ClassVar[str] = "arXiv 2512.06982: the FFN of Table 1 and the merge types of its MiniGrid appendix"
    block: Literal["merge"] = "merge"
    merge: Literal["concat", "sum", "product"] = choice(
        "concat", ("concat", "sum", "product"), "how summaries come together; a product is of 1 + tanh of each")
    width: int = choice(32, (8, 16, 32, 64), "units of the state")
    depth: int = choice(1, (1, 2, 3), "number of pairs")
    ratio: int = choice(2, (1, 2, 4), "units inside a pair over its width")
    activation: Literal["relu", "gelu", "silu", "tanh"] = choice("relu", ("relu", "gelu", "silu"), "non-linearity")
    modality_dropout: float = modality_dropout()

    def build_fusion(self, dims: Mapping[str, int]) -> nn.Module:
        return _Merge(dims, self)


@register_block
class GatedSumConfig(FusionConfig):
    """Every source votes with a learned, input-dependent weight; can turn a useless source down."""

    paper: ClassVar[str] = "Arevalo et al. 2017 (gated multimodal units)"
    block: Literal["gated_sum"] = "gated_sum"
    width: int = choice(64, (16, 32, 64, 128), "units of the state")
    modality_dropout: float = modality_dropout()

    def build_fusion(self, dims: Mapping[str, int]) -> nn.Module:
        return _GatedSum(dims, self)


@register_block
class FusionAttentionConfig(FusionConfig):
    """Self-attention over the tokens of all sources; lets one source's detail be read in the light of another."""

    paper: ClassVar[str] = "Vaswani et al. 2017"
    block: Literal["attention"] = "attention"
    width: int = choice(32, (16, 32, 64), "width of the tokens and of the state")
    heads: int = choice(2, (2, 4), "attention heads; divides the width")
    depth: int = choice(1, (1, 2), "number of layers")
    modality_dropout: float = modality_dropout()

    def build_fusion(self, dims: Mapping[str, int]) -> nn.Module:
        return _Attention(dims, self)


class _Concat(nn.Module):
    def __init__(self, dims: Mapping[str, int], c: ConcatConfig) -> None:
        super().__init__()
        self.dim = c.width
        self.drop = ModalityDropout(c.modality_dropout)
        self.net = mlp(sum(dims.values()), c.width, c.depth, c.activation, c.norm)

    def forward(self, features: dict[str, Features]) -> Tensor:
        return self.net(join(self.drop(features)))


class _Merge(nn.Module):
    def __init__(self, dims: Mapping[str, int], c: MergeConfig) -> None:
        super().__init__()
        self.dim, self.merge = c.width, c.merge
        self.drop = ModalityDropout(c.modality_dropout)
        joined = c.merge == "concat"
        self.inp = nn.ModuleDict({} if joined else {name: nn.Linear(d, c.width) for name, d in dims.items()})
        self.net = ResidualFFN(sum(dims.values()) if joined else c.width, c.width, c.depth, c.ratio, c.activation)

    def forward(self, features: dict[str, Features]) -> Tensor:
        features = self.drop(features)
        if self.merge == "concat":
            return self.net(join(features))
        values = torch.stack([self.inp[name](f.vector) for name, f in features.items()])
        return self.net(values.sum(0) if self.merge == "sum" else (1 + values.tanh()).prod(0))


class _GatedSum(nn.Module):
    def __init__(self, dims: Mapping[str, int], c: GatedSumConfig) -> None:
        super().__init__()
        self.dim = c.width
        self.drop = ModalityDropout(c.modality_dropout)
        self.values = nn.ModuleDict({name: nn.Linear(d, c.width) for name, d in dims.items()})
        self.gate = nn.Linear(sum(dims.values()), len(dims))

    def forward(self, features: dict[str, Features]) -> Tensor:
        features = self.drop(features)
        values = torch.stack([self.values[name](f.vector).tanh() for name, f in features.items()], 1)
        gate = self.gate(join(features)).softmax(1)
        return (gate.unsqueeze(-1) * values).sum(1)


class _Attention(TokenFusion):
    def __init__(self, dims: Mapping[str, int], c: FusionAttentionConfig) -> None:
        super().__init__(dims, c.width)
        self.drop = ModalityDropout(c.modality_dropout)
        self.net = Transformer(c.width, c.heads, c.depth, 2)

    def forward(self, features: dict[str, Features]) -> Tensor:
        tokens, mask = self.sequence(self.drop(features))
        return masked_mean(self.net(tokens, mask), mask)
