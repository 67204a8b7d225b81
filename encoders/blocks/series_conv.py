"""Series block: dilated causal convolutions."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from lacer.encoders.registry import BlockConfig, Features, choice, register_block


@register_block
class TemporalConvConfig(BlockConfig):
    """Dilated causal convolutions with skip connections; sees far back at little cost, trains faster than a GRU."""

    modality: ClassVar[str] = "series"
    paper: ClassVar[str] = "Bai et al. 2018 (TCN)"
    block: Literal["temporal_conv"] = "temporal_conv"
    width: int = choice(32, (16, 32, 64), "channels and units of the output")
    depth: int = choice(2, (1, 2, 3), "number of layers; the dilation doubles with each")
    kernel: int = choice(3, (2, 3, 5), "steps that a filter spans")

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return _TemporalConv(shape[1], self)


class _TemporalConv(nn.Module):
    def __init__(self, features: int, c: TemporalConvConfig) -> None:
        super().__init__()
        self.dim, self.kernel = c.width, c.kernel
        self.inp = nn.Conv1d(features, c.width, 1)
        self.convs = nn.ModuleList(nn.Conv1d(c.width, c.width, c.kernel, dilation=2**i) for i in range(c.depth))

    def forward(self, x: Tensor) -> Features:
        h = self.inp(x.transpose(1, 2))
        for i, conv in enumerate(self.convs):
            h = h + F.relu(conv(F.pad(h, ((self.kernel - 1) * 2**i, 0))))
        steps = h.transpose(1, 2)
        return Features(steps[:, -1], steps)
