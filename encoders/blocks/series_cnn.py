"""Series block: one-dimensional convolutions with pooling."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from lacer.encoders.layers import orthogonal
from lacer.encoders.registry import BlockConfig, Features, choice, register_block


@register_block
class SeriesCNNConfig(BlockConfig):
    """Convolutions over the steps, halved by max-pooling after each; finds patterns wherever they are in time."""

    modality: ClassVar[str] = "series"
    paper: ClassVar[str] = "Wang et al. 2017 (1611.06455), with pooling"
    block: Literal["cnn"] = "cnn"
    width: int = choice(32, (16, 32, 64), "channels and units of the output")
    depth: int = choice(2, (1, 2, 3), "number of convolutions")
    kernel: int = choice(3, (3, 5), "steps that a filter spans")

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return _SeriesCNN(shape[1], self)


class _SeriesCNN(nn.Module):
    def __init__(self, features: int, c: SeriesCNNConfig) -> None:
        super().__init__()
        self.dim = c.width
        layers: list[nn.Module] = []
        for i in range(c.depth):
            layers += [orthogonal(nn.Conv1d(c.width if i else features, c.width, c.kernel, padding="same")), nn.ReLU()]
            if i < c.depth - 1:
                layers.append(nn.MaxPool1d(2, ceil_mode=True))  # a single step stays a single step
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Features:
        steps = self.net(x.transpose(1, 2)).transpose(1, 2)
        return Features(steps.mean(1), steps)
