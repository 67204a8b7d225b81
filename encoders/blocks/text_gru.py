"""Text block: gated recurrent unit over the words."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lacer.encoders.registry import BlockConfig, Features, choice, dropout, register_block


@register_block
class TokenGRUConfig(BlockConfig):
    """Reads the frozen embeddings of the words in order with a gated recurrent unit; word order counts. Slow."""

    modality: ClassVar[str] = "text"
    paper: ClassVar[str] = "arXiv 2512.06982, MiniGrid appendix; Chevalier-Boisvert et al. 2019 (BabyAI)"
    text_level: ClassVar[str] = "token"
    block: Literal["token_gru"] = "token_gru"
    embedding: int = choice(32, (16, 32, 64), "width that the words are brought to")
    width: int = choice(32, (16, 32, 64), "units of the hidden state and of the output")
    depth: int = choice(1, (1, 2), "number of stacked layers")
    dropout: float = dropout()

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return _TokenGRU(shape[0], self)


class _TokenGRU(nn.Module):
    def __init__(self, embedding: int, c: TokenGRUConfig) -> None:
        super().__init__()
        self.dim = c.width
        self.embed = nn.Sequential(nn.LayerNorm(embedding), nn.Linear(embedding, c.embedding), nn.Dropout(c.dropout))
        self.gru = nn.GRU(c.embedding, c.width, c.depth, batch_first=True, dropout=c.dropout if c.depth > 1 else 0.0)

    def forward(self, x: Tensor, mask: Tensor) -> Features:
        steps, _ = self.gru(self.embed(x))
        steps = steps * mask.unsqueeze(-1)
        # The state after the last word; padding comes after it, so it cannot have been read yet. Empty texts give 0.
        place = torch.arange(mask.shape[1], device=mask.device)
        last = (mask * place).amax(1)
        return Features(steps[torch.arange(len(x), device=x.device), last], steps, mask)
