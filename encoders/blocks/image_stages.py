"""Image block: a stack of convolution stages, the space of LACER's MiniGrid appendix."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from lacer.encoders.layers import ImageBlock, orthogonal
from lacer.encoders.registry import BlockConfig, choice, register_block

Op = Literal["conv3", "conv5", "separable", "residual"]


@register_block
class StagesConfig(BlockConfig):
    """Stages of one kind of convolution and pooling each, two to five deep; fits small grids as well as pictures."""

    modality: ClassVar[str] = "image"
    paper: ClassVar[str] = "arXiv 2512.06982, MiniGrid appendix (its options are not published: ours)"
    block: Literal["stages"] = "stages"
    op: Op = choice("conv3", ("conv3", "conv5", "separable", "residual"), "the convolution of every stage")
    channels: int = choice(16, (16, 32, 64), "filters of every stage")
    pooling: Literal["max", "average", "stride"] = choice(
        "max", ("max", "average", "stride"), "what halves the picture after each stage, down to one place")
    depth: int = choice(3, (2, 3, 4, 5), "number of stages")
    width: int = choice(64, (32, 64, 128), "units of the output")

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        stages = [_Stage(shape[2] if i == 0 else self.channels, self) for i in range(self.depth)]
        return ImageBlock(nn.Sequential(*stages), self.channels, self.width, 2)


class _Stage(nn.Module):
    def __init__(self, c_in: int, c: StagesConfig) -> None:
        super().__init__()
        self.skip = c.op == "residual" and c_in == c.channels
        stride = 2 if c.pooling == "stride" and not self.skip else 1
        if c.op == "separable":
            self.conv: nn.Module = nn.Sequential(
                nn.Conv2d(c_in, c_in, 3, stride=stride, padding=1, groups=c_in), nn.Conv2d(c_in, c.channels, 1))
        else:
            kernel = 5 if c.op == "conv5" else 3
            self.conv = orthogonal(nn.Conv2d(c_in, c.channels, kernel, stride=stride, padding=kernel // 2))
        self.pool: nn.Module = nn.Identity()
        if c.pooling == "max":
            self.pool = nn.MaxPool2d(2, ceil_mode=True)
        elif c.pooling == "average":
            self.pool = nn.AvgPool2d(2, ceil_mode=True)
        elif self.skip:  # the sum needs both terms at full size, so a convolution without a skip halves them after it
            self.pool = nn.Conv2d(c.channels, c.channels, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).relu()
        return self.pool(x + h if self.skip else h)
