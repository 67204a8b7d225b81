"""Weights shared by all variants of a block: which part of the largest variant's tensors a smaller one takes.

Everything is read off the shapes that a block's networks have, so it holds for any registered block. Options that are
not whole numbers and change the network (a norm, the kind of a convolution) have weights of their own; those that do
not (an activation, dropout) share them. Within such a family, numbers vary: they are changed one at a time from the
largest network, and each axis of each parameter is looked at:

- An axis that grows in proportion to fields (a width, ``width * ffn_ratio``) is sliced: a smaller variant takes its
  leading part (slimmable networks, Yu et al. 2019; Once-for-all, Cai et al. 2020).
- If a constant factor is left, as in the gates of a GRU (``3 * width``), in fused query-key-value weights or behind a
  concatenation of two summaries, the axis is that many chunks, and the leading part of each is taken.
- Where a field acts in another way (positions of a ``grid * grid``, patches that divide a series, more than MAX_CHUNKS
  chunks as in a flattened picture; fewer places are taken for chunks) or changes the kernel of a convolution, a part
  would mean something else: each value of the field has a tensor of its own.
- In a fusion, an axis as long as the widths of several sources together is one segment per source, and an axis as
  long as the number of sources one row per source: a source keeps its part whichever other sources are used.

Depth needs nothing: a shallower variant has fewer tensors. Tensors are shared if family, name, type of their layer and
rank agree. Buffers are constants of a variant and not shared.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lacer.encoders.registry import BlockConfig
from lacer.envs import LacerError

Shape = tuple[int, ...]
Dims = Mapping[str, int]
Build = Callable[[BlockConfig, Dims], nn.Module]
"""Network of a config; for a fusion with these widths of the sources, for a source block they are empty."""

Places = Tensor | int | None
"""Places along an axis: these, as many from the start, or all."""

MAX_CHUNKS = 8
FAILURES = (LacerError, ValueError, RuntimeError, KeyError, TypeError)


@dataclass(frozen=True)
class BlockChoices:
    """A block and the options of its fields; fields that are not named keep their default."""

    cls: type[BlockConfig]
    fields: Mapping[str, tuple[Any, ...]]

    @property
    def name(self) -> str:
        """The block's name."""
        return str(self.cls.model_fields["block"].default)

    def config(self, **values: Any) -> BlockConfig | None:
        """The config with these values, or None if the block does not accept them together."""
        try:
            return self.cls(**values)
        except ValidationError:
            return None

    def configs(self, largest_first: bool = False) -> Iterator[BlockConfig]:
        """All configs; in the order of the options, or those with the largest numbers first."""
        options = [sorted(o, reverse=True) if largest_first and _numeric(o) else o for o in self.fields.values()]
        for values in itertools.product(*options):
            config = self.config(**dict(zip(self.fields, values, strict=True)))
            if config is not None:
                yield config


def _numeric(options: tuple[Any, ...]) -> bool:
    return all(isinstance(o, int) and not isinstance(o, bool) for o in options)


def identify(module: nn.Module) -> dict[str, tuple[str, nn.Parameter, bool]]:
    """Parameters by path: what they are called among all variants, and whether they belong to a convolution."""
    paths = [path.split(".") for path, _ in module.named_parameters()]
    # Modules by number are counted without those that have no parameters, so that a Dropout moves no name.
    numbers: dict[tuple[str, ...], set[int]] = {}
    for parts in paths:
        for i, part in enumerate(parts[:-1]):
            if part.isdecimal():
                numbers.setdefault(tuple(parts[:i]), set()).add(int(part))
    rank = {at: {n: i for i, n in enumerate(sorted(ns))} for at, ns in numbers.items()}
    out = {}
    for parts, (path, p) in zip(paths, module.named_parameters(), strict=True):
        owner = module.get_submodule(".".join(parts[:-1]))
        name = "/".join(str(rank[tuple(parts[:i])][int(part)]) if part.isdecimal() and i < len(parts) - 1 else part
                        for i, part in enumerate(parts))
        out[path] = (f"{name}:{type(owner).__name__}{p.ndim}", p, isinstance(owner, _ConvNd))
    return out


@dataclass(frozen=True)
class _Network:
    """A variant that was built: names and shapes of its parameters."""

    config: BlockConfig
    dims: Dims
    shapes: Mapping[str, Shape]
    convs: frozenset[str]

    def size(self, name: str, axis: int) -> int | None:
        return self.shapes[name][axis] if name in self.shapes else None


@dataclass(frozen=True)
class _Axis:
    """How an axis of a tensor is shared; see the module's text."""

    chunks: int = 1
    pins: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    rows: bool = False

    def index(self, size: int, shared: int, dims: Dims, widest: Dims) -> Places:
        """Places of the shared axis that a variant with an axis of ``size`` takes."""
        total = sum(widest[s] for s in self.sources)
        used = [s for s in dims if s in self.sources]
        if self.sources and size == shared // total * sum(dims[s] for s in used) + shared % total:
            start = dict(zip(self.sources, itertools.accumulate((widest[s] for s in self.sources), initial=0),
                             strict=False))
            end = shared - shared % total  # what does not belong to a source, such as a bias, comes last
            places = [r + start[s] + i for r in range(0, end, total) for s in used for i in range(dims[s])]
            return torch.tensor([*places, *range(end, shared)], dtype=torch.long)
        if self.rows and size == len(dims):
            return torch.tensor([list(widest).index(s) for s in dims])
        if size == shared:
            return None
        k = self.chunks if size % self.chunks == 0 and shared % self.chunks == 0 else 1
        if k == 1:
            return size
        return (torch.arange(k)[:, None] * (shared // k) + torch.arange(size // k)).flatten()


class SharedWeights(nn.Module):
    """One set of parameters for all variants of a block.

    Args:
        choices: the block and its options.
        build: network of a config.
        widest: for a fusion, the largest width of every source.

    Attributes:
        dim: the largest width of a variant's output.

    Raises:
        LacerError: if no variant can be built.
    """

    def __init__(self, choices: BlockChoices, build: Build, widest: Dims | None = None) -> None:
        super().__init__()
        self.choices, self.widest, self.dim = choices, dict(widest or {}), 0
        self._numbers = {f: o for f, o in choices.fields.items() if _numeric(o)}
        self._families: dict[tuple[Any, ...], str] = {}
        self._axes: dict[str, list[_Axis]] = {}
        probe = _Probe(choices, build)
        shapes: dict[str, Shape] = {}
        origin: dict[str, _Network] = {}
        with torch.random.fork_rng(devices=[]):
            for family, networks in self._find_families(probe).items():
                for net in self._explore(family, networks, probe):
                    for name, shape in net.shapes.items():
                        key = self._key(family, name, net.config)
                        if key not in origin or math.prod(shape) > math.prod(origin[key].shapes[name]):
                            origin[key] = net
                        shapes[key] = tuple(map(max, shape, shapes.get(key, shape)))
        if not shapes:
            raise LacerError(f"no variant of {choices.name} can be built here: {probe.why}")
        self.dim = probe.dim
        self.weights = nn.ParameterDict(_initial(shapes, origin, build))

    def slices(self, module: nn.Module, config: BlockConfig, dims: Dims) -> dict[str, tuple[str, list[Places]]]:
        """For every parameter of a variant, by path: the shared tensor and the places of it that the variant takes.

        Raises:
            LacerError: if the variant is not among the options that were declared.
        """
        family = self._families.get(self._kind(config), "?")
        out: dict[str, tuple[str, list[Places]]] = {}
        for path, (name, p, _) in identify(module).items():
            axes = self._axes.get(f"{family}{name}")
            key = "" if axes is None else self._key(family, name, config)
            if axes is None or key not in self.weights or any(map(int.__gt__, p.shape, self.weights[key].shape)):
                raise LacerError(f"the shared weights of {self.choices.name} do not cover {path} {tuple(p.shape)} of "
                                 f"{config.short()}: it is not among the options that the supernet was built with")
            out[path] = (key, [a.index(n, m, dims, self.widest)
                               for a, n, m in zip(axes, p.shape, self.weights[key].shape, strict=True)])
        return out

    def take(self, key: str, index: list[Places]) -> Tensor:
        """A variant's tensor, as a function of the shared one."""
        w: Tensor = self.weights[key]
        for axis, places in enumerate(index):
            if isinstance(places, int):
                w = w.narrow(axis, 0, places)
            elif places is not None:
                w = w.index_select(axis, places.to(w.device))
        return w

    def _kind(self, config: BlockConfig) -> tuple[Any, ...]:
        """The options that are not whole numbers."""
        return tuple(getattr(config, f) for f in self.choices.fields if f not in self._numbers)

    def _key(self, family: str, name: str, config: BlockConfig) -> str:
        pins = dict.fromkeys(f for a in self._axes[f"{family}{name}"] for f in a.pins)
        return f"{family}{name}" + "".join(f"|{f}={getattr(config, f)}" for f in pins).replace(".", "_")

    def _find_families(self, probe: _Probe) -> dict[str, list[_Network]]:
        """The largest network of every combination of other options; those with equal shapes are one family."""
        largest: dict[tuple[Any, ...], _Network] = {}
        others = {f: o for f, o in self.choices.fields.items() if f not in self._numbers}
        for values in itertools.product(*others.values()):
            fixed = BlockChoices(self.choices.cls, {**self._numbers, **{
                f: (v,) for f, v in zip(others, values, strict=True)}})
            net = next((r for c in fixed.configs(largest_first=True) if (r := probe(c, self.widest))), None)
            if net is not None:
                largest.setdefault(self._kind(net.config), net)
        families: dict[tuple[Any, ...], str] = {}
        out: dict[str, list[_Network]] = {}
        for kind, net in largest.items():
            family = families.setdefault(tuple(sorted(net.shapes.items())), f"{len(families)}/")
            self._families[kind] = family
            out.setdefault(family, []).append(net)
        return out

    def _explore(self, family: str, tops: list[_Network], probe: _Probe) -> list[_Network]:
        """Networks that show all tensors of a family at their largest, one for every pinned value."""
        found = [tops[0]]
        for net in found:  # grows: tensors that only smaller variants have are looked at from there
            if all(f"{family}{name}" in self._axes for name in net.shapes):
                continue
            by_field = {f: [r for o in options if (r := probe.vary(net, f, o))] for f, options in self._numbers.items()}
            by_width = {s: probe(net.config, {**net.dims, s: 2 * d}) for s, d in net.dims.items()}
            by_use = [r for s in net.dims if len(net.dims) > 1 and (r := probe(
                net.config, {k: d for k, d in net.dims.items() if k != s}))]
            for name, shape in net.shapes.items():
                self._axes.setdefault(f"{family}{name}", [
                    _axis(name, i, net, by_field, by_width, by_use) for i in range(len(shape))])
            found += [*itertools.chain(*by_field.values()), *by_use]
            pins = {f for name in net.shapes for a in self._axes[f"{family}{name}"] for f in a.pins}
            for values in itertools.product(*(self._numbers[f] for f in pins)) if len(pins) > 1 else ():
                r = probe(self.choices.config(**{**net.config.model_dump(), **dict(zip(pins, values, strict=True))}),
                          net.dims)
                found += [r] if r else []
            # Modules listed by place rather than by name: every source may come to stand at every place before its own.
            names = list(net.dims)
            for i, j in itertools.combinations(range(len(names)), 2):
                r = probe(net.config, {s: net.dims[s] for s in [*names[:i], names[j]]})
                found += [r] if r else []
        return found


class _Probe:
    """Builds variants and remembers their shapes."""

    def __init__(self, choices: BlockChoices, build: Build) -> None:
        self.choices, self.build = choices, build
        self.built: dict[Any, _Network | None] = {}
        self.dim, self.why = 0, ""

    def __call__(self, config: BlockConfig | None, dims: Dims) -> _Network | None:
        if config is None:
            return None
        at = (config, tuple(dims.items()))
        if at not in self.built:
            try:
                module = self.build(config, dims)
            except FAILURES as e:  # widths that heads do not divide, and the like: not a variant
                self.built[at], self.why = None, str(e)
            else:
                self.dim = max(self.dim, int(module.dim))  # type: ignore[arg-type]
                found = identify(module).values()
                self.built[at] = _Network(config, dims, {n: tuple(p.shape) for n, p, _ in found},
                                          frozenset(n for n, _, conv in found if conv))
        return self.built[at]

    def vary(self, net: _Network, field: str, value: Any) -> _Network | None:
        return self(self.choices.config(**{**net.config.model_dump(), field: value}), net.dims)


def _axis(name: str, i: int, net: _Network, by_field: Mapping[str, list[_Network]],
          by_width: Mapping[str, _Network | None], by_use: list[_Network]) -> _Axis:
    """What an axis of a tensor depends on."""
    n = net.shapes[name][i]
    sources = tuple(s for s, r in by_width.items() if r and r.size(name, i) not in (n, None))
    if sources:
        return _Axis(sources=sources)
    rows = n == len(by_width) > 1 and all(r.size(name, i) == n - 1 for r in by_use)
    factor, fields, pins = 1, [], []
    for f, networks in by_field.items():
        most = getattr(net.config, f)
        sizes = {getattr(r.config, f): m for r in networks if (m := r.size(name, i)) is not None}
        if all(m == n for m in sizes.values()):
            continue
        fields.append(f)
        power = next((p for p in (1, 2) if all(m * most**p == n * v**p for v, m in sizes.items())), 0)
        if power != 1 or (name in net.convs and i >= 2):
            pins.append(f)
        factor *= most**power if power else 0
    chunks = n // factor if factor > 1 and n % factor == 0 else 1
    return _Axis(1, tuple(fields)) if chunks > MAX_CHUNKS else _Axis(chunks, tuple(pins), rows=rows)


def _initial(shapes: Mapping[str, Shape], origin: Mapping[str, _Network], build: Build) -> dict[str, nn.Parameter]:
    """Each tensor starts as in the largest variant that has it, by the block's own initialisation."""
    out: dict[str, nn.Parameter] = {}
    modules: dict[int, dict[str, nn.Parameter]] = {}
    for key, shape in shapes.items():
        net = origin[key]
        if id(net) not in modules:
            modules[id(net)] = {n: p for n, p, _ in identify(build(net.config, net.dims)).values()}
        p = modules[id(net)][key.split("|")[0].split("/", 1)[1]]
        value = p.detach().clone()
        if value.shape != shape:  # no single variant is the largest along every axis: the rest is drawn from this one
            value = p.detach().flatten()[torch.randint(p.numel(), shape)]
            value[tuple(slice(n) for n in p.shape)] = p.detach()
        out[key] = nn.Parameter(value, requires_grad=p.requires_grad)
    return out
