"""Patch Transformers: a picture or a series cut into patches, with self-attention over them."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lacer.encoders.layers import Transformer
from lacer.encoders.registry import BlockConfig, Features, choice, dropout, register_block


@register_block
class SeriesPatchConfig(BlockConfig):
    """Self-attention over patches of a few steps each; steadier than single steps where these are noisy."""

    modality: ClassVar[str] = "series"
    paper: ClassVar[str] = "Nie et al. 2023 (PatchTST; here the features of a step share a patch)"
    block: Literal["patch_transformer"] = "patch_transformer"
    width: int = choice(32, (16, 32, 64), "width of the tokens and of the output")
    heads: int = choice(2, (2, 4), "attention heads; divides the width")
    depth: int = choice(1, (1, 2, 3), "number of layers")
    patch: int = choice(2, (2, 4), "steps of a patch")
    dropout: float = dropout()

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return _SeriesPatches(shape, self)


@register_block
class ImagePatchConfig(BlockConfig):
    """Vision Transformer over a grid of patches; relates far-apart places, but needs more training than a CNN."""

    modality: ClassVar[str] = "image"
    paper: ClassVar[str] = "Dosovitskiy et al. 2021 (ViT)"
    block: Literal["patch_transformer"] = "patch_transformer"
    width: int = choice(32, (16, 32, 64), "width of the tokens and of the output")
    heads: int = choice(2, (2, 4), "attention heads; divides the width")
    depth: int = choice(1, (1, 2, 3), "number of layers")
    grid: int = choice(4, (4, 8), "patches along each side of the picture")
    dropout: float = dropout()

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return _ImagePatches(shape, self)


class _SeriesPatches(nn.Module):
    def __init__(self, shape: tuple[int, ...], c: SeriesPatchConfig) -> None:
        super().__init__()
        self.dim, self.patch = c.width, c.patch
        count = -(-shape[0] // c.patch)
        self.missing = count * c.patch - shape[0]
        self.embed = nn.Linear(c.patch * shape[1], c.width)
        self.position = nn.Parameter(torch.randn(count, c.width) * 0.02)
        self.net = Transformer(c.width, c.heads, c.depth, 2, c.dropout)

    def forward(self, x: Tensor) -> Features:
        if self.missing:  # the oldest step is repeated, so that the last patch ends with the latest
            x = torch.cat([x[:, :1].expand(-1, self.missing, -1), x], 1)
        tokens = self.net(self.embed(x.unflatten(1, (-1, self.patch)).flatten(2)) + self.position)
        return Features(tokens.mean(1), tokens)


class _ImagePatches(nn.Module):
    def __init__(self, shape: tuple[int, ...], c: ImagePatchConfig) -> None:
        super().__init__()
        self.dim = c.width
        sides = [-(-s // c.grid) for s in shape[:2]]  # pixels of a patch
        counts = [-(-s // p) for s, p in zip(shape[:2], sides, strict=True)]
        gaps = [n * p - s for n, p, s in zip(counts, sides, shape[:2], strict=True)]
        self.pad = (gaps[1] // 2, gaps[1] - gaps[1] // 2, gaps[0] // 2, gaps[0] - gaps[0] // 2)
        self.embed = nn.Conv2d(shape[2], c.width, (sides[0], sides[1]), stride=(sides[0], sides[1]))
        self.position = nn.Parameter(torch.randn(counts[0] * counts[1], c.width) * 0.02)
        self.net = Transformer(c.width, c.heads, c.depth, 2, c.dropout)

    def forward(self, x: Tensor) -> Features:
        tokens = self.net(self.embed(F.pad(x, self.pad)).flatten(2).transpose(1, 2) + self.position)
        return Features(tokens.mean(1), tokens)
