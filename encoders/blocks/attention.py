"""Self-attention + feed-forward over the steps of a series or the elements of a set (LACER, Table 1)."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from lacer.encoders.layers import SetInput, Transformer, masked_mean, sinusoid
from lacer.encoders.registry import BlockConfig, Features, choice, dropout, register_block


class _AttentionFields(BlockConfig):
    width: int = choice(16, (8, 16, 32, 64), "width of the tokens and of the output")
    heads: int = choice(2, (2, 4, 8), "attention heads; divides the width")
    depth: int = choice(1, (1, 2, 3), "number of layers")
    ffn_ratio: int = choice(2, (1, 2, 4), "width of the feed-forward part over that of the tokens")
    dropout: float = dropout()


@register_block
class SeriesAttentionConfig(_AttentionFields):
    """Self-attention and feed-forward layers over the steps, with fixed positions; relates far-apart steps."""

    modality: ClassVar[str] = "series"
    paper: ClassVar[str] = "arXiv 2512.06982, Table 1; Vaswani et al. 2017"
    block: Literal["attention"] = "attention"

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return _SeriesAttention(shape, self)


@register_block
class SetAttentionConfig(_AttentionFields):
    """Self-attention and feed-forward layers over the elements; learns relations between them."""

    modality: ClassVar[str] = "set"
    paper: ClassVar[str] = "arXiv 2512.06982, Table 1; Lee et al. 2019 (Set Transformer)"
    block: Literal["attention"] = "attention"

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return _SetAttention(shape, self)


def _transformer(c: _AttentionFields) -> Transformer:
    return Transformer(c.width, c.heads, c.depth, c.ffn_ratio, c.dropout)


class _SeriesAttention(nn.Module):
    position: Tensor

    def __init__(self, shape: tuple[int, ...], c: _AttentionFields) -> None:
        super().__init__()
        self.dim = c.width
        self.embed = nn.Linear(shape[1], c.width)
        self.register_buffer("position", sinusoid(shape[0], c.width), persistent=False)
        self.net = _transformer(c)

    def forward(self, x: Tensor) -> Features:
        steps = self.net(self.embed(x) + self.position)
        return Features(steps.mean(1), steps)


class _SetAttention(nn.Module):
    def __init__(self, shape: tuple[int, ...], c: _AttentionFields) -> None:
        super().__init__()
        self.dim = c.width
        self.inp = SetInput(shape[1], c.width)
        self.net = _transformer(c)

    def forward(self, x: Tensor) -> Features:
        tokens, mask = self.inp(x)
        out = self.net(tokens, mask)
        return Features(masked_mean(out, mask), out, mask)
