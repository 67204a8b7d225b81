"""Image blocks: strided CNN and IMPALA residual CNN, each with an average-pooled grid as its head."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lacer.encoders.registry import BlockConfig, Features, choice, register_block


@register_block
class CNNConfig(BlockConfig):
    """Three strided convolutions, in the manner of the Nature CNN; fast, the sound default for images."""

    modality: ClassVar[str] = "image"
    paper: ClassVar[str] = "Mnih et al. 2015 (strides 4-2-2, padding so that small images work)"
    block: Literal["cnn"] = "cnn"
    channels: int = choice(16, (8, 16, 32), "filters of the first layer; later layers have twice as many")
    width: int = choice(64, (32, 64, 128), "units of the output")
    grid: int = choice(4, (1, 2, 4), "the picture is averaged to grid x grid places; 1 forgets where things are")

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        c = self.channels
        net = nn.Sequential(
            nn.Conv2d(shape[2], c, 5, stride=4 if min(shape[:2]) >= 32 else 2, padding=2), nn.ReLU(),
            nn.Conv2d(c, 2 * c, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(2 * c, 2 * c, 3, stride=2 if min(shape[:2]) >= 48 else 1, padding=1), nn.ReLU())
        return _Convolutional(net, 2 * c, self.grid, self.width)


@register_block
class ImpalaConfig(BlockConfig):
    """Residual CNN of IMPALA; slower than `cnn`, often stronger."""

    modality: ClassVar[str] = "image"
    paper: ClassVar[str] = "Espeholt et al. 2018"
    block: Literal["impala"] = "impala"
    channels: int = choice(8, (4, 8, 16), "filters of the first stage; the two later stages have twice as many")
    width: int = choice(64, (32, 64, 128), "units of the output")
    grid: int = choice(4, (1, 2, 4), "the picture is averaged to grid x grid places; 1 forgets where things are")

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        stages: list[nn.Module] = []
        c_in = shape[2]
        for c_out in (self.channels, 2 * self.channels, 2 * self.channels):
            stages += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.MaxPool2d(3, stride=2, padding=1),
                       _ResidualConv(c_out), _ResidualConv(c_out)]
            c_in = c_out
        return _Convolutional(nn.Sequential(*stages, nn.ReLU()), c_in, self.grid, self.width)


class _ResidualConv(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(),
                                 nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class _Convolutional(nn.Module):
    """Convolutions over (B, C, H, W) in [0, 1], a grid of averages as tokens, and a linear summary."""

    def __init__(self, net: nn.Module, channels: int, grid: int, width: int) -> None:
        super().__init__()
        self.dim = width
        self.net = net
        self.pool = nn.AdaptiveAvgPool2d(grid)
        self.token = nn.Linear(channels, width)
        self.place = nn.Parameter(torch.zeros(grid * grid, width))
        self.summary = nn.Sequential(nn.Linear(channels * grid * grid, width), nn.ReLU())

    def forward(self, x: Tensor) -> Features:
        h = self.pool(self.net(x))
        return Features(self.summary(h.flatten(1)), self.token(h.flatten(2).transpose(1, 2)) + self.place)
