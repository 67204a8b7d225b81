"""Small pieces that several blocks share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from lacer.encoders.registry import Features
from lacer.envs import LacerError

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


Layer = TypeVar("Layer", nn.Linear, nn.Conv1d, nn.Conv2d)


def orthogonal(layer: Layer) -> Layer:
    """The layer with orthogonal weights, gain sqrt(2), and no bias: for layers before a ReLU or the like.

    PyTorch's own initialisation lets the signal fade from layer to layer, which short PPO runs do not make up for
    (Saxe et al. 2014; Andrychowicz et al. 2021, section 3.2).
    """
    nn.init.orthogonal_(layer.weight, math.sqrt(2))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def mlp(width_in: int, width: int, depth: int, activation: str, norm: bool = False,
        dropout: float = 0.0) -> nn.Sequential:
    """``depth`` linear layers of ``width`` units, each with an optional LayerNorm, an activation, optional dropout."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers.append(orthogonal(nn.Linear(width_in if i == 0 else width, width)))
        if norm:
            layers.append(nn.LayerNorm(width))
        layers.append(ACTIVATIONS[activation]())
        if dropout:
            layers.append(nn.Dropout(dropout))
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

    def __init__(self, width: int, heads: int, depth: int, ffn_ratio: int, dropout: float = 0.0) -> None:
        super().__init__()
        check_heads(width, heads)
        layer = nn.TransformerEncoderLayer(width, heads, width * ffn_ratio, dropout=dropout, activation="gelu",
                                           batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return self.encoder(tokens)
        # A row with no token at all would softmax over nothing (NaN): let it attend to its zero padding.
        padding = ~mask & mask.any(1, keepdim=True)
        out = self.encoder(tokens, src_key_padding_mask=padding)
        return out * mask.unsqueeze(-1)


def check_heads(width: int, heads: int) -> None:
    """Raises LacerError if the heads do not divide the width."""
    if width % heads:
        raise LacerError(f"width {width} is not divisible by heads {heads}")


class ResidualFFN(nn.Module):
    """A linear layer to ``width``, then ``depth`` feed-forward pairs with LayerNorm before and a skip around each."""

    def __init__(self, width_in: int, width: int, depth: int, ratio: int, activation: str,
                 dropout: float = 0.0) -> None:
        super().__init__()
        act = ACTIVATIONS[activation]
        self.dim = width
        self.inp = nn.Linear(width_in, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, ratio * width), act(),
                          nn.Linear(ratio * width, width), *([nn.Dropout(dropout)] if dropout else []))
            for _ in range(depth))
        self.out = nn.Sequential(nn.LayerNorm(width), act())

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        for block in self.blocks:
            h = h + block(h)
        return self.out(h)


class ModalityDropout(nn.Module):
    """In training, leaves each source out of each sample with probability ``p`` (ModDrop, Neverova et al. 2016).

    Sources are drawn independently, so a sample may lose all of them.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, features: dict[str, Features]) -> dict[str, Features]:
        if not self.training or not self.p:
            return features
        out = {}
        for name, f in features.items():
            keep = (torch.rand(len(f.vector), 1, device=f.vector.device) >= self.p).to(f.vector.dtype)
            out[name] = Features(f.vector * keep, f.tokens * keep.unsqueeze(-1), f.mask)
        return out


def join(features: dict[str, Features]) -> Tensor:
    """The vectors of all sources side by side."""
    return torch.cat([f.vector for f in features.values()], 1)


class TokenFusion(nn.Module):
    """Base of fusions that read tokens: :meth:`sequence` puts the vectors and tokens of all sources into one sequence,
    brought to one width and marked by source."""

    def __init__(self, dims: Mapping[str, int], width: int) -> None:
        super().__init__()
        self.dim = width
        self.inp = nn.ModuleDict({name: nn.Linear(d, width) for name, d in dims.items()})
        self.kind = nn.Parameter(torch.randn(len(dims), width) * 0.02)

    def sequence(self, features: dict[str, Features]) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, width) and their mask (B, N); in every row at least the sources' vectors are there."""
        tokens, masks = [], []
        for i, (name, f) in enumerate(features.items()):
            both = torch.cat([f.vector[:, None], f.tokens], 1)
            tokens.append(self.inp[name](both) + self.kind[i])
            mask = torch.ones(f.tokens.shape[:2], dtype=torch.bool, device=both.device) if f.mask is None else f.mask
            masks.append(torch.cat([mask.new_ones(len(mask), 1), mask], 1))
        return torch.cat(tokens, 1), torch.cat(masks, 1)


class ImageBlock(nn.Module):
    """Convolutions over (B, C, H, W) in [0, 1], a grid of averages as tokens, and a summary by ``head``.

    ``grid``: linear layer over the grid of averages. ``flatten``: over all places. ``spatial_softmax``: over the place
    (x, y) where each channel is active (Levine et al. 2016), and, beyond the paper, how active it is there, so that
    maps of a single place still tell something.

    Args:
        net: maps (B, C, H, W) to feature maps (B, ``channels``, h, w).
        channels: channels of the feature maps.
        width: units of the output.
        grid: the feature maps are averaged to grid x grid places.
        head: grid, flatten or spatial_softmax.
        places: h * w, for ``flatten``.
    """

    def __init__(self, net: nn.Module, channels: int, width: int, grid: int, head: str = "grid",
                 places: int = 0) -> None:
        super().__init__()
        self.dim, self.head, self.grid = width, head, grid
        self.net = net
        self.pool = nn.AdaptiveAvgPool2d(grid)
        self.token = nn.Linear(channels, width)
        self.place = nn.Parameter(torch.zeros(grid * grid, width))
        size = {"grid": grid * grid, "flatten": places, "spatial_softmax": 3}[head]
        self.summary = nn.Sequential(orthogonal(nn.Linear(channels * size, width)), nn.ReLU())

    def forward(self, x: Tensor) -> Features:
        maps = self.net(x)
        # Averages of single places are the places; torch takes as long for them as for a convolution.
        averages = maps if maps.shape[2:] == (self.grid, self.grid) else self.pool(maps)
        if self.head == "grid":
            flat = averages.flatten(1)
        elif self.head == "flatten":
            flat = maps.flatten(1)
        else:
            flat = _keypoints(maps)
        return Features(self.summary(flat), self.token(averages.flatten(2).transpose(1, 2)) + self.place)


def _keypoints(maps: Tensor) -> Tensor:
    """Expected x, y in [-1, 1] and value of each channel under its softmax over places: (B, C, h, w) -> (B, 3C)."""
    h, w = maps.shape[2:]
    weight = maps.flatten(2).softmax(2)
    x = torch.linspace(-1, 1, w, device=maps.device).repeat(h)
    y = torch.linspace(-1, 1, h, device=maps.device).repeat_interleave(w)
    return torch.cat([(weight * x).sum(2), (weight * y).sum(2), (weight * maps.flatten(2)).sum(2)], 1)


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
