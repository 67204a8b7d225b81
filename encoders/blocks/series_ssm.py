"""Series block: diagonal state-space layers."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lacer.encoders.registry import BlockConfig, Features, choice, register_block


@register_block
class SSMConfig(BlockConfig):
    """Diagonal linear state-space layers (S4D); remembers long histories smoothly and trains in parallel over steps."""

    modality: ClassVar[str] = "series"
    paper: ClassVar[str] = "Gu et al. 2022 (2206.11893, S4D-Lin)"
    block: Literal["ssm"] = "ssm"
    width: int = choice(32, (16, 32, 64), "channels and units of the output")
    depth: int = choice(1, (1, 2, 3), "number of layers")
    state: int = choice(8, (4, 8, 16), "complex states per channel")

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return _SSM(shape, self)


class _SSM(nn.Module):
    def __init__(self, shape: tuple[int, ...], c: SSMConfig) -> None:
        super().__init__()
        self.dim = c.width
        self.inp = nn.Linear(shape[1], c.width)
        self.layers = nn.ModuleList(_Layer(shape[0], c.width, c.state) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width)

    def forward(self, x: Tensor) -> Features:
        h = self.inp(x)
        for layer in self.layers:
            h = h + layer(h)
        steps = self.norm(h)
        return Features(steps[:, -1], steps)


class _Layer(nn.Module):
    """LayerNorm, causal convolution with the kernel of a diagonal state space, GELU, linear layer.

    ``x_t = exp(dt A) x_{t-1} + (exp(dt A) - 1) / A u_t``, ``y_t = 2 Re(C x_t) + D u_t``, so the kernel is
    ``K_l = 2 Re sum_n C_n (exp(dt A_n) - 1) / A_n exp(l dt A_n)``. A starts as -1/2 + i pi n (S4D-Lin); the time steps
    dt start between 1/2 of a step of the series and 1/2 of 1/length, since histories are short here.
    """

    def __init__(self, length: int, width: int, state: int) -> None:
        super().__init__()
        self.length = length
        self.norm = nn.LayerNorm(width)
        low, high = math.log(0.5 / length), math.log(0.5)
        self.log_dt = nn.Parameter(low + (high - low) * torch.rand(width))
        self.log_decay = nn.Parameter(torch.full((width, state), math.log(0.5)))
        self.frequency = nn.Parameter(math.pi * torch.arange(state, dtype=torch.float32).repeat(width, 1))
        self.c = nn.Parameter(torch.randn(width, state, 2) / math.sqrt(2 * state))
        self.d = nn.Parameter(torch.ones(width))
        self.out = nn.Linear(width, width)

    def kernel(self) -> Tensor:
        """(width, length)"""
        a = torch.complex(-self.log_decay.exp(), self.frequency)
        dta = a * self.log_dt.exp().unsqueeze(1)
        c = torch.view_as_complex(self.c) * (dta.exp() - 1) / a
        steps = torch.arange(self.length, device=dta.device)
        return 2 * (c.unsqueeze(1) * (dta.unsqueeze(1) * steps[:, None]).exp()).real.sum(2)

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm(x).transpose(1, 2)
        with torch.autocast("cpu" if u.is_meta else u.device.type, enabled=False):  # complex numbers: single precision
            u = u.float()
            n = 2 * self.length  # twice the length: the convolution must not wrap around
            y = torch.fft.irfft(torch.fft.rfft(u, n) * torch.fft.rfft(self.kernel(), n), n)[..., :self.length]
            y = y + self.d[:, None] * u
        return self.out(nn.functional.gelu(y).transpose(1, 2))
