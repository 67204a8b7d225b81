"""Image block: a small ConvNeXt."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from lacer.encoders.layers import ImageBlock
from lacer.encoders.registry import BlockConfig, choice, register_block


@register_block
class ConvNeXtConfig(BlockConfig):
    """Small ConvNeXt: large per-channel filters and LayerNorm, in two stages; sees wide shapes with few parameters."""

    modality: ClassVar[str] = "image"
    paper: ClassVar[str] = "Liu et al. 2022 (without layer scale, which would slow short trainings)"
    block: Literal["convnext"] = "convnext"
    channels: int = choice(16, (8, 16, 32), "filters of the first stage; the second has twice as many")
    depth: int = choice(1, (1, 2), "residual layers of each stage")
    width: int = choice(64, (32, 64, 128), "units of the output")
    head: Literal["grid", "spatial_softmax"] = choice(
        "grid", ("grid", "spatial_softmax"), "summary of averages by place, or of where each filter is active")
    grid: int = choice(4, (1, 2, 4), "the picture is averaged to grid x grid places; 1 forgets where things are",
                       when=("head", ("grid",)))

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        c = self.channels
        patch = 4 if min(shape[:2]) >= 32 else 2 if min(shape[:2]) >= 12 else 1
        stride = 2 if min(shape[:2]) >= 4 else 1
        net = nn.Sequential(
            nn.Conv2d(shape[2], c, patch, stride=patch), _ChannelNorm(c), *(_Layer(c) for _ in range(self.depth)),
            _ChannelNorm(c), nn.Conv2d(c, 2 * c, stride, stride=stride), *(_Layer(2 * c) for _ in range(self.depth)),
            _ChannelNorm(2 * c))
        return ImageBlock(net, 2 * c, self.width, self.grid, self.head)


class _ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Layer(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, channels, 7, padding=3, groups=channels), _ChannelNorm(channels),
            nn.Conv2d(channels, 4 * channels, 1), nn.GELU(), nn.Conv2d(4 * channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)
