"""Fusion block: mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lacer.encoders.layers import ModalityDropout, join
from lacer.encoders.registry import Features, FusionConfig, choice, modality_dropout, register_block


@register_block
class MixtureConfig(FusionConfig):
    """Several small networks over all sources, weighted by the situation; good where situations differ in kind."""

    paper: ClassVar[str] = "Jacobs et al. 1991; soft weights, as in Obando-Ceron et al. 2024 for RL"
    block: Literal["mixture"] = "mixture"
    width: int = choice(64, (16, 32, 64), "units of each layer and of the state")
    members: int = choice(4, (2, 4, 8), "number of networks")
    depth: int = choice(1, (1, 2), "layers of each network")
    modality_dropout: float = modality_dropout()

    def build_fusion(self, dims: Mapping[str, int]) -> nn.Module:
        return _Mixture(dims, self)


class _Mixture(nn.Module):
    def __init__(self, dims: Mapping[str, int], c: MixtureConfig) -> None:
        super().__init__()
        self.dim = c.width
        self.drop = ModalityDropout(c.modality_dropout)
        total = sum(dims.values())
        self.gate = nn.Linear(total, c.members)
        # All members' layers in one tensor each: (members, in, out), the bias as one more input.
        self.layers = nn.ParameterList(
            torch.empty(c.members, d + 1, c.width).uniform_(-1, 1) * (3 / (d + 1)) ** 0.5
            for d in [total, *[c.width] * (c.depth - 1)])

    def forward(self, features: dict[str, Features]) -> Tensor:
        x = join(self.drop(features))
        h = x.expand(len(self.layers[0]), -1, -1)
        for weight in self.layers:
            h = torch.baddbmm(weight[:, -1:].to(h.dtype), h, weight[:, :-1].to(h.dtype)).relu()
        return torch.einsum("ebw,be->bw", h, self.gate(x).softmax(1).to(h.dtype))
