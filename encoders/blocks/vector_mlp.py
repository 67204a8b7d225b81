"""Vector blocks: plain and residual MLP, linear."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from lacer.encoders.layers import ResidualFFN, as_features, mlp
from lacer.encoders.registry import BlockConfig, Features, choice, dropout, register_block


@register_block
class MLPConfig(BlockConfig):
    """Multi-layer perceptron; the sound default for vectors."""

    modality: ClassVar[str] = "vector"
    block: Literal["mlp"] = "mlp"
    width: int = choice(64, (16, 32, 64, 128), "units of each layer and of the output")
    depth: int = choice(2, (1, 2, 3), "number of layers")
    activation: Literal["relu", "gelu", "silu", "tanh"] = choice("relu", ("relu", "gelu", "tanh"), "non-linearity")
    norm: bool = choice(False, (False, True), "LayerNorm after every linear layer; steadies training")
    dropout: float = dropout()

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return _Plain(mlp(shape[0], self.width, self.depth, self.activation, self.norm, self.dropout), self.width)


@register_block
class ResidualMLPConfig(BlockConfig):
    """Feed-forward pairs with skip connections and LayerNorm; trains deeper without losing the input."""

    modality: ClassVar[str] = "vector"
    paper: ClassVar[str] = "He et al. 2016; as in Gorishniy et al. 2021, sec. 3.2; the FFN of 2512.06982, Table 1"
    block: Literal["residual_mlp"] = "residual_mlp"
    width: int = choice(64, (16, 32, 64, 128), "units of each layer and of the output")
    depth: int = choice(2, (1, 2, 3), "number of residual blocks")
    ratio: int = choice(1, (1, 2, 4), "units inside a pair over its width")
    activation: Literal["relu", "gelu", "silu", "tanh"] = choice("relu", ("relu", "gelu", "silu"), "non-linearity")
    dropout: float = dropout()

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return _Residual(shape[0], self.width, self.depth, self.ratio, self.activation, self.dropout)


@register_block
class LinearConfig(BlockConfig):
    """One linear map; the cheapest block, enough where the policy needs the values as they are."""

    modality: ClassVar[str] = "vector"
    block: Literal["linear"] = "linear"
    width: int = choice(32, (8, 16, 32, 64), "units of the output")

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return _Plain(nn.Linear(shape[0], self.width), self.width)


class _Plain(nn.Module):
    def __init__(self, net: nn.Module, dim: int) -> None:
        super().__init__()
        self.net, self.dim = net, dim

    def forward(self, x: Tensor) -> Features:
        return as_features(self.net(x))


class _Residual(ResidualFFN):
    def forward(self, x: Tensor) -> Features:  # type: ignore[override]
        return as_features(super().forward(x))
