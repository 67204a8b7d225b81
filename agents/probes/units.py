"""What the units of a network do: dormant and dead ones, the size of pre-activations."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lacer.agents.probes.base import Layer, Sample, Values, register_probe

ACTIVATIONS = {"relu", "relu6", "leaky_relu", "prelu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish",
               "hardtanh", "softplus", "tanh"}
"""torch functions whose outputs count as units. Sigmoids are left out: they mostly are gates."""
_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
_MIXING = {"matmul", "__matmul__", "bmm", "baddbmm", "einsum", "mm", "addmm", "irfft", "fft_irfft"}
DEAD = 1e-5
"""Largest absolute output of a dead unit: GELU and SiLU get near zero without reaching it."""


class Watch(TorchFunctionMode):
    """Sums up what activation functions give while an encoder runs, by part, whichever way a block calls them.

    It sees modules, functions and methods of torch alike, so any block's activations. Which axis holds the units is
    told by what ran before: after a linear layer the last, after a convolution the channels, after anything else every
    place of a row is a unit of its own. Blocks without an activation are judged by their features. The whole pass may
    come in several batches.

    Args:
        blocks: the source blocks and, as ``fused``, the fusion.

    Attributes:
        features: by part, the rows' features of all batches.
    """

    def __init__(self, blocks: dict[str, nn.Module]) -> None:
        super().__init__()
        self._blocks = blocks
        self._sums: dict[str, list[list[Any]]] = {name: [] for name in blocks}
        self._part: str | None = None
        self._before, self._calls, self._batch = "", 0, 1
        self._hooks: list[Any] = []
        self.features: dict[str, list[Tensor]] = {name: [] for name in blocks}

    def __enter__(self) -> Self:
        for name, block in self._blocks.items():
            self._hooks.append(block.register_forward_pre_hook(self._enter(name)))
            self._hooks.append(block.register_forward_hook(self._leave(name)))
        super().__enter__()
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc_val: BaseException | None,
                 exc_tb: TracebackType | None) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def run(self, encoder: Callable[[Any], Tensor], obs: Any, rows: int) -> None:
        """One pass of the encoder over a batch of ``rows`` observations."""
        self._batch = rows
        encoder(obs)

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self._part, self._before, self._calls = name, "", 0

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            vector = cast(Tensor, out if isinstance(out, Tensor) else out.vector).detach().float()
            self.features[name].append(vector)
            if not self._calls:
                self._add(vector, vector)
            self._part = None

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        before = None
        if name.rstrip("_") in ACTIVATIONS and self._part is not None:
            x = args[0] if args else (kwargs or {}).get("input")
            if isinstance(x, Tensor) and x.dim() > 1 and x.is_floating_point():
                before = x.detach()
                if name.endswith("_") or (kwargs or {}).get("inplace"):
                    before = before.clone()
        out = func(*args, **(kwargs or {}))
        if before is not None and isinstance(out, Tensor):
            self._add(before, out.detach())
        elif name == "linear" or name in _CONVOLUTIONS or name in _MIXING:
            self._before = name
        return out

    def _add(self, before: Tensor, after: Tensor) -> None:
        size = after.abs().float()
        units = _units(tuple(size.shape), self._batch, self._before)
        others = [i for i in range(size.dim()) if i not in units]
        mean = size.mean(others) if others else size
        largest = size.amax(others) if others else size
        number, weight = self._calls, self._batch
        self._calls += 1
        assert self._part is not None
        sums = self._sums[self._part]
        new: list[Any] = [weight * mean.flatten(), largest.flatten(), weight * before.float().square().mean(), weight]
        if number == len(sums):
            sums.append(new)
        elif len(sums[number][0]) == len(new[0]):
            old = sums[number]
            sums[number] = [old[0] + new[0], torch.maximum(old[1], new[1]), old[2] + new[2], old[3] + weight]

    def layers(self) -> dict[str, list[Layer]]:
        """What was seen, by part."""
        return {part: [Layer((mean / n).cpu().numpy().astype(np.float64), largest.cpu().numpy().astype(np.float64),
                             float((square / n).sqrt())) for mean, largest, square, n in sums]
                for part, sums in self._sums.items()}


def _units(shape: tuple[int, ...], batch: int, before: str) -> list[int]:
    """The axes that hold the units of an activation."""
    rows = 0 if shape[0] % batch == 0 else next((i for i, n in enumerate(shape) if n == batch), 0)
    if before in _CONVOLUTIONS and rows == 0 and len(shape) > 2:
        return [1]
    if before == "linear" and rows != len(shape) - 1:
        return [len(shape) - 1]
    return [i for i in range(len(shape)) if i != rows]


def dormant(layers: list[Layer], tau: float) -> float:
    """Share of dormant units (Sokar et al. 2023, 2302.12902): mean absolute output at most ``tau`` times the mean of
    the unit's layer. All units of a layer that gives only zeros are dormant."""
    return _share(layers, lambda x: x.mean <= tau * x.mean.mean())


def dead(layers: list[Layer]) -> float:
    """Share of units that are zero in every row (as in Moalla et al. 2024, 2405.00662)."""
    return _share(layers, lambda x: x.largest <= DEAD)


def _share(layers: list[Layer], of: Callable[[Layer], np.ndarray]) -> float:
    return sum(int(of(x).sum()) for x in layers) / max(1, sum(len(x.mean) for x in layers))


def _all(sample: Sample, value: Callable[[list[Layer]], float]) -> Values:
    return {part: {"": value(layers)} for part, layers in sample.layers.items() if layers}


@register_probe("dead_units", "share of units that are zero in every row (0 to 1); high: they can learn no more; try "
                "normalisation, another activation or less width", needs=("layers",), told=True)
def _dead(sample: Sample) -> Values:
    return _all(sample, dead)


@register_probe("dormant_0.025", "share of units with at most 0.025 of their layer's mean activity (0 to 1); high: "
                "capacity lies idle; try less width, normalisation or another activation", needs=("layers",))
def _dormant(sample: Sample) -> Values:
    return _all(sample, lambda layers: dormant(layers, 0.025))


@register_probe("dormant_0.1", "share of units with at most 0.1 of their layer's mean activity (0 to 1); as "
                "dormant_0.025, but sees units before they fall silent", needs=("layers",))
def _dormant_01(sample: Sample) -> Values:
    return _all(sample, lambda layers: dormant(layers, 0.1))


@register_probe("preactivation_norm", "root mean square of what goes into the last activation; about 1 at the start; "
                "rises before PPO collapses; high: try normalisation or a smaller learning rate", needs=("layers",))
def _preactivation_norm(sample: Sample) -> Values:
    return _all(sample, lambda layers: layers[-1].rms_in)
