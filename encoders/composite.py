"""Building a spec into a network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from lacer.encoders.registry import Features
from lacer.encoders.spec import EncoderSpec
from lacer.encoders.text import TextTable
from lacer.envs import LacerError, SourceSpec, TaskCard


class CompositeEncoder(nn.Module):
    """One block per used source and a fusion block.

    Input: a dict of float tensors by source: vector (B, D), series (B, T, F), set (B, N, F), image (B, C, H, W) in
    0..255, text (B, 1), indices into ``table``. Output: the state (B, :attr:`dim`). Sources that the spec does not
    use are ignored.

    Args:
        spec: the encoder.
        card: the task, for shapes and bounds.
        table: embeddings of the strings seen; needed if a text source is used.

    In evaluation mode, in which SB3 collects and evaluates, inputs are checked to be finite numbers; in training mode,
    where the same observations come again in every epoch, and on the meta device they are not. ``check_inputs = False``
    turns the check off, e.g. to trace the network.

    ``bf16 = True`` has the blocks of images compute in bfloat16 (torch's autocast). It pays on processors with AVX-512
    BF16 or AMX and on GPUs; others are many times slower with it. The other blocks are so small that conversions take
    longer than they save.

    Raises:
        LacerError: if a block cannot be built for its source; in forward: NaN or infinite input, naming the source.
    """

    check_inputs = True
    bf16 = False

    def __init__(self, spec: EncoderSpec, card: TaskCard, table: TextTable | None = None) -> None:
        super().__init__()
        self.spec, self.table = spec, table
        self.scale = nn.ModuleDict()
        self.blocks = nn.ModuleDict()
        for name, config in spec.sources.items():
            source = card.sources[name]
            shape = source.shape
            if source.modality == "text":
                if table is None:
                    raise LacerError(f"the encoder uses the text source {name!r} and needs a TextTable")
                shape = (table.dim,)
            try:
                if source.modality != "text":
                    self.scale[name] = InputScale(source)
                self.blocks[name] = config.build(shape)
            except (LacerError, ValueError, RuntimeError, KeyError) as e:
                raise LacerError(f"sources.{name}: cannot build {config.short()}: {e}") from e
        try:
            self.fusion = spec.fusion.build_routed({n: int(cast(int, b.dim)) for n, b in self.blocks.items()},
                                                   spec.condition)
        except (LacerError, ValueError, RuntimeError, KeyError) as e:
            raise LacerError(f"fusion: cannot build {spec.fusion.short()}: {e}") from e
        self.dim = int(cast(int, self.fusion.dim))

    def encode(self, obs: Mapping[str, Tensor]) -> dict[str, Features]:
        """Features of every used source."""
        out: dict[str, Features] = {}
        check = self.check_inputs and not self.training
        for name, config in self.spec.sources.items():
            x = obs[name]
            if name in self.scale:
                scaled = self.scale[name](x)
                if check:
                    _check_finite(name, scaled)
                if self.bf16 and scaled.dim() == 4:
                    with torch.autocast(scaled.device.type, torch.bfloat16):
                        vector, tokens, mask = self.blocks[name](scaled)
                    out[name] = Features(vector.float(), tokens.float(), mask)
                else:
                    out[name] = self.blocks[name](scaled)
            else:
                assert self.table is not None
                if check:
                    _check_finite(name, x)
                index = x.reshape(len(x)).long()
                if config.text_level == "token":
                    out[name] = self.blocks[name](*self.table.tokens(index))
                else:
                    out[name] = self.blocks[name](self.table.sentence(index))
        return out

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        if not len(obs[next(iter(self.spec.sources))]):  # attention and Fourier transforms refuse an empty batch
            return self.fusion(self.encode({n: obs[n].new_zeros(1, *obs[n].shape[1:]) for n in self.spec.sources}))[:0]
        return self.fusion(self.encode(obs))

    def parameters_by_module(self) -> dict[str, int]:
        """Number of trainable parameters of every source's block and of the fusion."""
        parts = {**dict(self.blocks.items()), "fusion": self.fusion}
        return {name: sum(p.numel() for p in m.parameters() if p.requires_grad) for name, m in parts.items()}


class InputScale(nn.Module):
    """Brings a source to about [-1, 1]: images by 1/255, finite bounds linearly, the rest by symlog.

    symlog(x) = sign(x) log(1 + |x|) (Hafner et al. 2023) needs no running statistics, so an observation always means
    the same to the policy. Column 0 of a set (its mask) is left as it is.
    """

    shift: Tensor
    factor: Tensor
    bounded: Tensor

    def __init__(self, source: SourceSpec) -> None:
        super().__init__()
        space = source.space
        assert isinstance(space, spaces.Box)
        self.modality = source.modality
        if self.modality == "image":
            low, high = np.zeros(()), np.full((), 255.0)
        else:
            low, high = space.low.astype(np.float64), space.high.astype(np.float64)
        bounded = np.isfinite(low) & np.isfinite(high) & (high > low) & (np.abs(high) < 1e6) & (np.abs(low) < 1e6)
        centre, factor = np.zeros_like(low), np.ones_like(low)
        centre[bounded] = (low[bounded] + high[bounded]) / 2
        factor[bounded] = 2 / (high[bounded] - low[bounded])
        if self.modality == "image":
            centre, factor = np.zeros(()), np.full((), 1 / 255)
        if self.modality == "set":
            centre[:, 0], factor[:, 0], bounded[:, 0] = 0, 1, True
        self.all_bounded = bool(bounded.all())
        for name, value in (("shift", -centre * factor), ("factor", factor)):
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32), persistent=False)
        self.register_buffer("bounded", torch.as_tensor(bounded), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.modality == "image":  # in place: a minibatch of images is the largest thing in memory
            return x.to(self.factor.dtype, copy=True).mul_(self.factor)
        x = x.to(self.shift.dtype)
        scaled = torch.addcmul(self.shift, x, self.factor)
        if not self.all_bounded:
            scaled = torch.where(self.bounded, scaled, x.sign() * x.abs().log1p())
        if self.modality == "set":
            scaled = scaled.masked_fill(~(x[..., :1] > 0.5), 0.0)  # not a product: padding may hold NaN
        return scaled


def _check_finite(name: str, x: Tensor) -> None:
    if not x.is_floating_point() or x.is_meta:
        return
    # One sum is cheaper than asking every number; it is asked again because a sum of finite numbers can overflow.
    if not math.isfinite(float(x.detach().sum())) and not bool(x.isfinite().all()):
        kind = "NaN" if bool(x.isnan().any()) else "infinite"
        rows = (~x.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        raise LacerError(f"the source {name!r} holds {kind} values in {len(rows)} of {len(x)} observations "
                         f"(the first: {rows[0]})")


def build(spec: EncoderSpec, card: TaskCard, table: TextTable | None = None) -> CompositeEncoder:
    """The network of a spec; see :class:`CompositeEncoder`."""
    return CompositeEncoder(spec, card, table)
