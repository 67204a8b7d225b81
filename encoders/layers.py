"""Small pieces that several blocks share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lacer.encoders.registry import Features

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


def mlp(width_in: int, width: int, depth: int, activation: str, norm: bool = False) -> nn.Sequential:
    """``depth`` linear layers of ``width`` units, each with an optional LayerNorm and an activation."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers.append(nn.Linear(width_in if i == 0 else width, width))
        if norm:
            layers.append(nn.LayerNorm(width))
        layers.append(ACTIVATIONS[activation]())
    return nn.Sequential(*layers)


def as_features(vector: Tensor) -> Features:
    """Features of a block that has a single token."""
    return Features(vector, vector[:, None])


def masked_mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens that are there; zero where none is. tokens (B, N, D), mask (B, N) -> (B, D)."""
    if mask is None:
        return tokens.mean(1)
    m = mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * m).sum(1) / m.sum(1).clamp(min=1)


class Transformer(nn.Module):
    """Pre-norm self-attention + feed-forward layers over tokens (B, N, width) with an optional mask (B, N)."""

    def __init__(self, width: int, heads: int, depth: int, ffn_ratio: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, heads, width * ffn_ratio, dropout=0.0, activation="gelu",
                                           batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return self.encoder(tokens)
        # A row with no token at all would softmax over nothing (NaN): let it attend to its zero padding.
        padding = ~mask & mask.any(1, keepdim=True)
        out = self.encoder(tokens, src_key_padding_mask=padding)
        return out * mask.unsqueeze(-1)


class SetInput(nn.Module):
    """Splits a set (B, N, F) into its mask (column 0) and embedded elements (B, N, width)."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(features - 1, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mask = x[..., 0] > 0.5
        return self.embed(x[..., 1:]) * mask.unsqueeze(-1), mask


def sinusoid(length: int, width: int) -> Tensor:
    """Fixed sinusoidal positions (length, width) (Vaswani et al. 2017, sec. 3.5)."""
    position = torch.arange(length, dtype=torch.float32)[:, None]
    scale = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * (-torch.log(torch.tensor(10000.0)) / width))
    out = torch.zeros(length, width)
    out[:, 0::2] = torch.sin(position * scale)
    out[:, 1::2] = torch.cos(position * scale)[:, : width // 2]
    return out
