"""Series blocks: gated recurrent unit and LSTM."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lacer.encoders.registry import BlockConfig, Features, choice, register_block


@register_block
class GRUConfig(BlockConfig):
    """Gated recurrent unit over the steps; its last state is the summary. Good for short histories."""

    modality: ClassVar[str] = "series"
    paper: ClassVar[str] = "Cho et al. 2014"
    block: Literal["gru"] = "gru"
    width: int = choice(32, (16, 32, 64), "units of the hidden state and of the output")
    depth: int = choice(1, (1, 2), "number of stacked layers")

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return _GRU(shape[1], self)


@register_block
class LSTMConfig(BlockConfig):
    """LSTM over the steps; its last state is the summary. Holds on to things longer than `gru`, at more parameters."""

    modality: ClassVar[str] = "series"
    paper: ClassVar[str] = "Hochreiter & Schmidhuber 1997"
    block: Literal["lstm"] = "lstm"
    width: int = choice(32, (16, 32, 64), "units of the hidden state and of the output")
    depth: int = choice(1, (1, 2), "number of stacked layers")

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return _LSTM(shape[1], self)


class _GRU(nn.Module):
    def __init__(self, features: int, c: GRUConfig) -> None:
        super().__init__()
        self.dim = c.width
        self.gru = nn.GRU(features, c.width, c.depth, batch_first=True)

    def forward(self, x: Tensor) -> Features:
        steps, _ = self.gru(x)
        return Features(steps[:, -1], steps)


class _LSTM(nn.Module):
    def __init__(self, features: int, c: LSTMConfig) -> None:
        super().__init__()
        self.dim = c.width
        self.lstm = nn.LSTM(features, c.width, c.depth, batch_first=True)

    def forward(self, x: Tensor) -> Features:
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):  # oneDNN: no bfloat16
            steps, _ = self.lstm(x.float())
        return Features(steps[:, -1], steps)
