"""A block of another package: learned sine waves of a vector."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lacer.encoders import BlockConfig, Features, choice, register_block


@register_block
class WavesConfig(BlockConfig):
    """Sines of learned mixtures of the numbers; for readings that come round, such as angles."""

    modality: ClassVar[str] = "vector"
    paper: ClassVar[str] = "Sitzmann et al. 2020"
    block: Literal["waves"] = "waves"
    width: int = choice(32, (16, 32), "units of the output")
    pitch: float = choice(1.0, (1.0, 4.0), "factor before the sine")

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return _Waves(shape[0], self)


class _Waves(nn.Module):
    def __init__(self, width_in: int, c: WavesConfig) -> None:
        super().__init__()
        self.dim, self.pitch = c.width, c.pitch
        self.mix = nn.Linear(width_in, c.width)

    def forward(self, x: Tensor) -> Features:
        h = torch.sin(self.pitch * self.mix(x))
        return Features(h, h[:, None])
