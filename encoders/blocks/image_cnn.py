"""Image blocks: strided CNN, the Nature CNN and the IMPALA residual CNN."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from lacer.encoders.layers import ImageBlock, orthogonal
from lacer.encoders.registry import BlockConfig, choice, register_block


@register_block
class CNNConfig(BlockConfig):
    """Three strided convolutions, in the manner of the Nature CNN; fast, the sound default for images."""

    modality: ClassVar[str] = "image"
    paper: ClassVar[str] = "Mnih et al. 2015 (strides 4-2-2, padding so that small images work)"
    block: Literal["cnn"] = "cnn"
    channels: int = choice(16, (8, 16, 32), "filters of the first layer; later layers have twice as many")
    width: int = choice(64, (32, 64, 128), "units of the output")
    head: Literal["grid", "spatial_softmax"] = choice(
        "grid", ("grid", "spatial_softmax"), "summary of averages by place, or of where each filter is active")
    grid: int = choice(4, (1, 2, 4), "the picture is averaged to grid x grid places; 1 forgets where things are",
                       when=("head", ("grid",)))

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        c = self.channels
        net = nn.Sequential(
            orthogonal(nn.Conv2d(shape[2], c, 5, stride=4 if min(shape[:2]) >= 32 else 2, padding=2)), nn.ReLU(),
            orthogonal(nn.Conv2d(c, 2 * c, 3, stride=2, padding=1)), nn.ReLU(),
            orthogonal(nn.Conv2d(2 * c, 2 * c, 3, stride=2 if min(shape[:2]) >= 48 else 1, padding=1)), nn.ReLU())
        return ImageBlock(net, 2 * c, self.width, self.grid, self.head)


@register_block
class NatureConfig(BlockConfig):
    """The CNN of DQN as published (filters 8-4-3, strides 4-2-1, all places to one layer); large, precise in place."""

    modality: ClassVar[str] = "image"
    paper: ClassVar[str] = "Mnih et al. 2015; smaller pictures get a border up to 36x36"
    block: Literal["nature"] = "nature"
    channels: int = choice(32, (16, 32), "filters of the first layer; later layers have twice as many")
    width: int = choice(256, (64, 128, 256, 512), "units of the output")

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        c = self.channels
        sides = [max(s, 36) for s in shape[:2]]  # below 36 nothing is left for the last filter
        gaps = [b - s for b, s in zip(sides, shape[:2], strict=True)]
        border = (gaps[1] // 2, gaps[1] - gaps[1] // 2, gaps[0] // 2, gaps[0] - gaps[0] // 2)
        net = nn.Sequential(
            *([nn.ZeroPad2d(border)] if any(border) else []),
            orthogonal(nn.Conv2d(shape[2], c, 8, stride=4)), nn.ReLU(),
            orthogonal(nn.Conv2d(c, 2 * c, 4, stride=2)), nn.ReLU(),
            orthogonal(nn.Conv2d(2 * c, 2 * c, 3, stride=1)), nn.ReLU())
        for kernel, stride in ((8, 4), (4, 2), (3, 1)):
            sides = [(s - kernel) // stride + 1 for s in sides]
        return ImageBlock(net, 2 * c, self.width, 4, "flatten", sides[0] * sides[1])


@register_block
class ImpalaConfig(BlockConfig):
    """Residual CNN of IMPALA; slower than `cnn`, often stronger."""

    modality: ClassVar[str] = "image"
    paper: ClassVar[str] = "Espeholt et al. 2018"
    block: Literal["impala"] = "impala"
    channels: int = choice(8, (4, 8, 16), "filters of the first stage; the two later stages have twice as many")
    width: int = choice(64, (32, 64, 128), "units of the output")
    head: Literal["grid", "spatial_softmax"] = choice(
        "grid", ("grid", "spatial_softmax"), "summary of averages by place, or of where each filter is active")
    grid: int = choice(4, (1, 2, 4), "the picture is averaged to grid x grid places; 1 forgets where things are",
                       when=("head", ("grid",)))

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        stages: list[nn.Module] = []
        c_in = shape[2]
        for c_out in (self.channels, 2 * self.channels, 2 * self.channels):
            stages += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.MaxPool2d(3, stride=2, padding=1),
                       _ResidualConv(c_out), _ResidualConv(c_out)]
            c_in = c_out
        return ImageBlock(nn.Sequential(*stages, nn.ReLU()), c_in, self.width, self.grid, self.head)


class _ResidualConv(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.ReLU(), orthogonal(nn.Conv2d(channels, channels, 3, padding=1)), nn.ReLU(),
                                 nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)
