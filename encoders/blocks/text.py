"""Text blocks over a frozen text model: sentence embedding + MLP, attention pooling over the words."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from lacer.encoders.layers import as_features, mlp, orthogonal
from lacer.encoders.registry import BlockConfig, Features, choice, dropout, register_block


@register_block
class SentenceMLPConfig(BlockConfig):
    """Frozen sentence embedding, then an MLP; cheap, understands paraphrases."""

    modality: ClassVar[str] = "text"
    paper: ClassVar[str] = "Reimers & Gurevych 2019 (embedding)"
    block: Literal["sentence_mlp"] = "sentence_mlp"
    width: int = choice(32, (16, 32, 64), "units of each layer and of the output")
    depth: int = choice(1, (1, 2), "number of layers")
    dropout: float = dropout()

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return _SentenceMLP(shape[0], self)


@register_block
class TokenAttentionConfig(BlockConfig):
    """Learned queries attend to the frozen embeddings of the single words; finds details such as numbers and lanes."""

    modality: ClassVar[str] = "text"
    paper: ClassVar[str] = "Lee et al. 2019 (pooling by attention)"
    text_level: ClassVar[str] = "token"
    block: Literal["token_attention"] = "token_attention"
    width: int = choice(32, (16, 32, 64), "width of the words and of the output")
    queries: int = choice(2, (1, 2, 4), "number of learned queries")

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return _TokenAttention(shape[0], self)


class _SentenceMLP(nn.Module):
    def __init__(self, embedding: int, c: SentenceMLPConfig) -> None:
        super().__init__()
        self.dim = c.width
        # Sentence embeddings have unit length, so single numbers are near 0.05: normalise before the first layer.
        net = mlp(embedding, c.width, c.depth, "relu", dropout=c.dropout)
        self.net = nn.Sequential(nn.LayerNorm(embedding), net)

    def forward(self, x: Tensor) -> Features:
        return as_features(self.net(x))


class _TokenAttention(nn.Module):
    def __init__(self, embedding: int, c: TokenAttentionConfig) -> None:
        super().__init__()
        self.dim = c.width
        self.embed = nn.Sequential(nn.LayerNorm(embedding), nn.Linear(embedding, c.width))
        self.score = nn.Linear(c.width, c.queries)
        self.out = nn.Sequential(orthogonal(nn.Linear(c.queries * c.width, c.width)), nn.ReLU())

    def forward(self, x: Tensor, mask: Tensor) -> Features:
        words = self.embed(x) * mask.unsqueeze(-1)
        # A large finite score instead of -inf: an empty text gives even weights over zeros, not NaN.
        weights = self.score(words).masked_fill(~mask.unsqueeze(-1), -1e9).softmax(1)
        pooled = weights.transpose(1, 2) @ words
        return Features(self.out(pooled.flatten(1)), words, mask)
