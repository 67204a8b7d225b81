"""Supernets: many encoders in one network, from the declarations of the blocks.

- :class:`DartsSupernet` runs all options and mixes them by softmax(alpha) (DARTS, Liu et al. 2019, arXiv 1806.09055;
  for RL: RL-DARTS, Miao et al. 2022, arXiv 2106.02229).
- :class:`SharedSupernet` runs one encoder at a time; all of them share one set of weights (ENAS, Pham et al. 2018,
  arXiv 1802.03268), smaller ones taking slices of it (:mod:`lacer.encoders.slicing`).

Both take the observations of a :class:`CompositeEncoder` and give a state of constant width ``dim``, so either can
stand where an encoder stands, and both hand out plain encoders with their weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lacer.encoders.composite import CompositeEncoder, build
from lacer.encoders.registry import FUSION, BlockConfig, Features, FusionConfig, list_blocks
from lacer.encoders.slicing import FAILURES, BlockChoices, Places, SharedWeights
from lacer.encoders.spec import EncoderSpec
from lacer.encoders.text import TextTable
from lacer.envs import LacerError, TaskCard

UNUSED = "unused"
Fusion = tuple[FusionConfig, str | None]
"""A fusion and the source that conditions it, if it needs one."""

CONDITION = "routing.condition"


@dataclass(frozen=True)
class SupernetOptions:
    """What a supernet holds: for every source and the fusion the blocks with the options of their fields.

    Attributes:
        sources: by source; a source that is missing is never used.
        fusion: the fusion blocks.
        optional: sources that may be left out.
        conditions: sources that may condition a fusion that needs one.
    """

    sources: Mapping[str, tuple[BlockChoices, ...]]
    fusion: tuple[BlockChoices, ...]
    optional: frozenset[str]
    conditions: tuple[str, ...]

    @classmethod
    def from_decisions(cls, card: TaskCard, decisions: Mapping[str, Sequence[Any]] | None = None) -> SupernetOptions:
        """Options from those of a search space, given as ``{d.name: d.options for d in space.decisions}``.

        Names are ``PART.block`` (``unused`` leaves a source out), ``PART.BLOCK.FIELD`` and ``routing.condition``; what
        is not named takes all that the registry declares. Other names are no business of a supernet.

        Raises:
            LacerError: for blocks that are not registered.
        """
        given = dict(decisions or {})

        def blocks(part: str, modality: str) -> tuple[BlockChoices, ...]:
            known = {name: block for (_, name), block in list_blocks(modality).items()}
            out = []
            for name in given.get(f"{part}.block", known):
                if name == UNUSED and part != FUSION:
                    continue
                if name not in known:
                    raise LacerError(f"{part}: no {modality} block is called {name!r}")
                out.append(BlockChoices(known[name], {
                    f: tuple(given.get(f"{part}.{name}.{f}", options))
                    for f, options in known[name].choices().items()}))
            return tuple(out)

        sources = {name: blocks(name, s.modality) for name, s in card.sources.items()}
        return cls(
            {name: b for name, b in sources.items() if b}, blocks(FUSION, FUSION),
            frozenset(n for n in sources if UNUSED in given.get(f"{n}.block", (UNUSED,))),
            tuple(s for s in given.get(CONDITION, card.sources) if s in card.sources))

    def candidates(self, card: TaskCard, table: TextTable | None = None, per_block: int | None = 1,
                   per_part: int | None = None) -> tuple[dict[str, list[BlockConfig | None]], list[Fusion]]:
        """Single configs for :class:`DartsSupernet`, whose cost grows with their number.

        Args:
            card, table: the task; configs that cannot be built for it are left out.
            per_block: how many of a block's configs: the default one (if it is an option), then the others evenly
                spaced. None: all of them. A conditioned fusion comes once for every source that may condition it.
            per_part: instead, how many of a source's and of the fusion's, shared equally by its blocks, each of which
                has one at least.
        """
        def some(choices: BlockChoices, place: str | None) -> Iterator[BlockConfig]:
            per_block = each if per_part is None else max(1, per_part // len(
                self.fusion if place is None else self.sources[place]))
            every = list(dict.fromkeys(choices.configs()))
            if per_block is not None:
                default = choices.config()
                rest = [c for c in every if c != default]
                n = per_block - (len(rest) < len(every))
                spaced = [rest[i * len(rest) // n] for i in range(min(n, len(rest)))] if n > 0 else []
                # More than asked: where some cannot be built, the next ones step in.
                every = [c for c in every if c == default] + spaced + [c for c in rest if c not in spaced]
            yield from itertools.islice((c for c in every if self._buildable(c, card, place, table)), per_block)

        each = per_block
        sources: dict[str, list[BlockConfig | None]] = {}
        for name, blocks in self.sources.items():
            sources[name] = [c for b in blocks for c in some(b, name)]
            if name in self.optional:
                sources[name].append(None)
        fusions = [cast(FusionConfig, c) for b in self.fusion for c in some(b, None)]
        conditions = [s for s in self.conditions if s in sources]
        return sources, [(f, c) for f in fusions for c in (conditions if f.conditioned else [None])]

    def _buildable(self, config: BlockConfig, card: TaskCard, place: str | None, table: TextTable | None) -> bool:
        shape = None if place is None else _shape(card, place, table)
        with torch.random.fork_rng(devices=[]):
            try:
                if shape is None:
                    cast(FusionConfig, config).build_routed(dict.fromkeys(self.sources, 8), next(iter(self.sources)))
                else:
                    config.build(shape)
            except FAILURES:
                return False
        return True


def _shape(card: TaskCard, source: str, table: TextTable | None) -> tuple[int, ...]:
    if card.sources[source].modality != "text":
        return card.sources[source].shape
    if table is None:
        raise LacerError(f"the text source {source!r} needs a TextTable")
    return (table.dim,)


class DartsSupernet(nn.Module):
    """All options at once, mixed by softmax(alpha), one alpha per option of every source and of the fusion.

    - An option's vector and tokens are brought to the width of the source's widest option by a linear projection (none
      where the width is right) and normalised without parameters (LayerNorm), so that an option's share of the mixture
      is its probability and not the scale of its numbers.
    - Options with equally many tokens are mixed token by token; different numbers of tokens stand beside each other.
    - "Unused" (None) is an option whose output is zero. Because the others have unit scale, its probability is exactly
      the share by which the source is turned down, and it gains when less of the source serves the task; it is neither
      excluded from the final choice, as in DARTS, nor favoured: all alphas start at zero.
    - Fusion options get all sources; their outputs are projected to the widest and normalised likewise.

    Args:
        card: the task.
        sources: options of every source, None for "unused"; a source that is missing is never used.
        fusion: fusion options, each with the source that conditions it or None.
        table: embeddings of the strings seen; needed with a text source.

    Raises:
        LacerError: if a part has no option or an option cannot be built.
    """

    def __init__(self, card: TaskCard, sources: Mapping[str, Sequence[BlockConfig | None]],
                 fusion: Sequence[Fusion], table: TextTable | None = None) -> None:
        super().__init__()
        self.card, self.table = card, table
        self.sources: dict[str, list[BlockConfig | None]] = {
            n: list(dict.fromkeys(sources[n])) for n in card.sources if n in sources}
        used = [n for n, options in self.sources.items() if any(o is not None for o in options)]
        for name in [n for n in self.sources if n not in used]:
            del self.sources[name]
        if not used or not fusion:
            raise LacerError("a supernet needs at least one block for some source and at least one fusion")
        self.fusions: list[Fusion] = list(dict.fromkeys(fusion))
        # One row of the options after the other is a composite encoder, of which only the blocks are wanted.
        self.rows = nn.ModuleList()
        blocks = {n: [o for o in options if o is not None] for n, options in self.sources.items()}
        for i in range(max(map(len, blocks.values()))):
            row = {n: options[i] for n, options in blocks.items() if i < len(options)}
            encoder = build(EncoderSpec(row, _plain_fusion()), card, table)
            encoder.fusion = nn.Identity()
            self.rows.append(encoder)
        self.widths = {n: max(self._dim(n, i) for i in range(len(o))) for n, o in blocks.items()}
        self.project = nn.ModuleDict({
            n: nn.ModuleList(_projection(self._dim(n, i), self.widths[n]) for i in range(len(o)))
            for n, o in blocks.items()})
        self.fusion = nn.ModuleList()
        for config, condition in self.fusions:
            try:
                self.fusion.append(config.build_routed(self.widths, condition))
            except FAILURES as e:
                raise LacerError(f"fusion: cannot build {config.short()}: {e}") from e
        dims = [int(cast(int, m.dim)) for m in self.fusion]
        self.dim = max(dims)
        self.fusion_project = nn.ModuleList(_projection(d, self.dim) for d in dims)
        self.alphas = nn.ParameterDict({
            **{_alpha(n): nn.Parameter(torch.zeros(len(o))) for n, o in self.sources.items()},
            FUSION: nn.Parameter(torch.zeros(len(self.fusions)))})

    def _dim(self, source: str, i: int) -> int:
        return int(cast(int, cast(CompositeEncoder, self.rows[i]).blocks[source].dim))

    def arch_parameters(self) -> list[nn.Parameter]:
        """The alphas."""
        return list(self.alphas.values())

    def weight_parameters(self) -> list[nn.Parameter]:
        """All parameters but the alphas."""
        alphas = set(map(id, self.arch_parameters()))
        return [p for p in self.parameters() if id(p) not in alphas]

    def probabilities(self) -> dict[str, dict[str, float]]:
        """For every source and the fusion, each option and its probability."""
        names = {**{n: [UNUSED if o is None else o.short() for o in options] for n, options in self.sources.items()},
                 FUSION: [f.short() + (f" by {c}" if c else "") for f, c in self.fusions]}
        return {n: dict(zip(o, self.probability(n).tolist(), strict=True)) for n, o in names.items()}

    def probability(self, part: str) -> Tensor:
        """The probability of every option of a source, or of the fusion (`"fusion"`)."""
        return self.alphas[_alpha(part) if part in self.sources else FUSION].softmax(0)

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        if not len(obs[next(iter(self.sources))]):  # attention and Fourier transforms refuse an empty batch
            return self.fuse(self.encode({n: obs[n].new_zeros(1, *obs[n].shape[1:]) for n in self.sources}))[:0]
        return self.fuse(self.encode(obs))

    def encode(self, obs: Mapping[str, Tensor]) -> dict[str, Features]:
        """The mixed features of every source."""
        rows = [cast(CompositeEncoder, row).encode(obs) for row in self.rows]
        out = {}
        for name, options in self.sources.items():
            p = self.probability(name)[[i for i, o in enumerate(options) if o is not None]]
            parts = [row[name] for row in rows if name in row]
            projections = cast(nn.ModuleList, self.project[name])
            vector = sum((w * _unit(m(f.vector)) for w, m, f in zip(p, projections, parts, strict=True)),
                         start=torch.zeros((), device=p.device))
            groups: dict[int, tuple[Tensor, Tensor | None]] = {}  # by number of tokens
            for w, m, f in zip(p, projections, parts, strict=True):
                tokens, mask = w * _unit(m(f.tokens)), f.mask
                if mask is not None:
                    tokens = tokens.masked_fill(~mask.unsqueeze(-1), 0.0)
                n = tokens.shape[1]
                if n in groups:
                    tokens, mask = groups[n][0] + tokens, _either(groups[n][1], mask)
                groups[n] = (tokens, mask)
            masks = [torch.ones(t.shape[:2], dtype=torch.bool, device=t.device) if m is None else m
                     for t, m in groups.values()]
            out[name] = Features(vector, torch.cat([t for t, _ in groups.values()], 1),
                                 torch.cat(masks, 1) if any(m is not None for _, m in groups.values()) else None)
        return out

    def fuse(self, features: dict[str, Features]) -> Tensor:
        """The mixed state (B, dim)."""
        p = self.probability(FUSION)
        return torch.stack([w * _unit(project(fusion(features)))
                            for w, fusion, project in zip(p, self.fusion, self.fusion_project, strict=True)]).sum(0)

    def argmax_spec(self) -> EncoderSpec:
        """The encoder of the most probable options.

        A fusion conditioned on a source that is not used is passed over. If no source would be used, the one that is
        least surely unused is; likewise among the sources of the fusions if these are all conditioned on unused ones.
        """
        p = {n: self.probability(n).tolist() for n in (*self.sources, FUSION)}
        best = {n: max(zip(p[n], options, strict=True), key=lambda x: x[0])[1] for n, options in self.sources.items()}
        conditions = [c for _, c in self.fusions]
        if not any(c is None or best[c] for c in conditions) or not any(best.values()):
            most = {n: max((q, i) for i, q in enumerate(p[n]) if options[i] is not None)
                    for n, options in self.sources.items() if None in conditions or n in conditions}
            name = max(most, key=lambda n: most[n][0] / max(p[n]))
            best[name] = self.sources[name][most[name][1]]
        used = {n: block for n, block in best.items() if block is not None}
        _, i = max((q, -i) for i, q in enumerate(p[FUSION]) if conditions[i] in (None, *used))
        return EncoderSpec(used, *self.fusions[-i])

    def child(self, spec: EncoderSpec | None = None) -> CompositeEncoder:
        """The plain encoder of a spec whose blocks are options here (default: :meth:`argmax_spec`), with their weights.

        The projections and the mixture are dropped. So the blocks compute what they computed here, while those tensors
        of the fusion that have another shape without projections, its input layers, start anew: a warm start for
        training it further, not the same function.

        Raises:
            LacerError: if the spec has blocks that are no options here.
        """
        spec = spec or self.argmax_spec()
        try:
            places = {n: [o for o in self.sources[n] if o is not None].index(b) for n, b in spec.sources.items()}
            fused = self.fusion[self.fusions.index((spec.fusion, spec.condition))]
        except (ValueError, KeyError):
            raise LacerError(f"the supernet does not hold {spec.short()}") from None
        out = build(spec, self.card, self.table).to(self.alphas[FUSION].device)
        for name, i in places.items():
            out.blocks[name].load_state_dict(cast(CompositeEncoder, self.rows[i]).blocks[name].state_dict())
        old = fused.state_dict()
        out.fusion.load_state_dict({k: old[k] if k in old and old[k].shape == v.shape else v
                                    for k, v in out.fusion.state_dict().items()})
        return out.train(self.training)


def _plain_fusion() -> FusionConfig:
    fusions = (cast(type[FusionConfig], b) for b in list_blocks(FUSION).values())
    return next(b() for b in fusions if not b.conditioned)  # type: ignore[call-arg]


def _alpha(source: str) -> str:
    return f"source_{source}"


def _projection(width: int, to: int) -> nn.Module:
    return nn.Identity() if width == to else nn.Linear(width, to)


def _unit(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def _either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a | b


class SharedSupernet(nn.Module):
    """One encoder at a time, all of them with one set of weights; :meth:`set_active` says which.

    Every (source, block) and every fusion block has weights of its own (a conditioned fusion once per conditioning
    source); all variants of a block share them by slicing, see :mod:`lacer.encoders.slicing`. Encoders that are not
    active cost nothing, and their weights get no gradient. A state narrower than ``dim`` is filled up with zeros, so
    the first layer after it, too, is shared by slicing.

    Buffers belong to each variant: blocks must not keep statistics in them (BatchNorm). The active encoder is not part
    of the ``state_dict``.

    Args:
        card: the task.
        options: the encoders that it holds.
        table: embeddings of the strings seen; needed with a text source.

    Raises:
        LacerError: if some block has no variant that can be built.
    """

    _CACHE = 64

    def __init__(self, card: TaskCard, options: SupernetOptions, table: TextTable | None = None) -> None:
        super().__init__()
        self.card, self.options, self.table = card, options, table
        self.shared = nn.ModuleDict()
        widest: dict[str, int] = {}
        for name, blocks in options.sources.items():
            shape = _shape(card, name, table)
            for choices in blocks:
                weights = SharedWeights(choices, lambda c, _, s=shape: c.build(s))  # type: ignore[misc]
                self.shared[f"sources/{name}/{choices.name}"] = weights
                widest[name] = max(widest.get(name, 0), weights.dim)
        dims = []
        for choices in options.fusion:
            conditioned = cast(type[FusionConfig], choices.cls).conditioned
            for condition in [s for s in options.conditions if s in widest] if conditioned else [None]:
                weights = SharedWeights(choices, lambda c, d, s=condition: c.build_routed(d, s),  # type: ignore[misc]
                                        widest)
                self.shared[_fusion_key(choices.name, condition)] = weights
                dims.append(weights.dim)
        if not widest or not dims:
            raise LacerError("a supernet needs at least one block for some source and at least one fusion")
        self.dim = max(dims)
        self._children: dict[EncoderSpec, _Child] = {}
        self._active: _Child | None = None

    @property
    def active(self) -> EncoderSpec | None:
        """The encoder that forward runs."""
        return None if self._active is None else self._active.spec

    def set_active(self, spec: EncoderSpec) -> None:
        """Chooses the encoder for the next forward passes.

        Raises:
            LacerError: if it cannot be built or is not among the options.
        """
        child = self._children.pop(spec, None) or self._make(spec)
        self._children[spec] = self._active = child
        while len(self._children) > self._CACHE:
            del self._children[next(iter(self._children))]

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        if self._active is None:
            raise LacerError("choose an encoder with set_active() first")
        child = self._active
        child.follow(self.training, next(iter(self.parameters())).device)
        state = functional_call(child.encoder, self._weights(child), (obs,))
        return F.pad(state, (0, self.dim - child.encoder.dim))

    def child(self, spec: EncoderSpec | None = None) -> CompositeEncoder:
        """The plain encoder of a spec (default: the active one) with its weights: it computes what the supernet does
        with that encoder active, without the zeros behind it.

        Raises:
            LacerError: if it cannot be built or is not among the options.
        """
        before = self._active
        if spec is not None:
            self.set_active(spec)
        child, self._active = self._active, before if spec is not None else self._active
        if child is None:
            raise LacerError("choose an encoder with set_active() first")
        out = build(child.spec, self.card, self.table)
        with torch.no_grad():
            weights = self._weights(child)
            for path, p in out.named_parameters():
                p.copy_(weights[path])
        return out.to(next(iter(self.parameters())).device).train(self.training)

    def _weights(self, child: _Child) -> dict[str, Tensor]:
        return {path: cast(SharedWeights, self.shared[part]).take(key, index)
                for path, (part, key, index) in child.slices.items()}

    def _make(self, spec: EncoderSpec) -> _Child:
        with torch.random.fork_rng(devices=[]):
            encoder = build(spec, self.card, self.table)
        parts: dict[str, tuple[str, nn.Module, BlockConfig]] = {
            f"blocks.{n}": (f"sources/{n}/{b.block}", encoder.blocks[n], b) for n, b in spec.sources.items()}
        parts["fusion"] = (_fusion_key(spec.fusion.block, spec.condition), encoder.fusion, spec.fusion)
        dims = {n: int(cast(int, encoder.blocks[n].dim)) for n in spec.sources}
        slices = {}
        for prefix, (part, module, config) in parts.items():
            if part not in self.shared:
                raise LacerError(f"the supernet does not hold {part.replace('/', ' ')}")
            weights = cast(SharedWeights, self.shared[part])
            for path, (key, index) in weights.slices(module, config, dims if part.startswith(FUSION) else {}).items():
                slices[f"{prefix}.{path}"] = (part, key, index)
        left = [n for n, _ in encoder.named_parameters() if n not in slices]
        if left or encoder.dim > self.dim:
            raise LacerError(f"the supernet does not cover {left or encoder.dim} of {spec.short()}")
        return _Child(spec, encoder, slices)


class _Child:
    """A variant: a network without weights, and where the shared ones are."""

    def __init__(self, spec: EncoderSpec, encoder: CompositeEncoder,
                 slices: dict[str, tuple[str, str, list[Places]]]) -> None:
        self.spec, self.encoder, self.slices = spec, encoder, slices
        self.device = torch.device("cpu")
        for module in encoder.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad))

    def follow(self, training: bool, device: torch.device) -> None:
        """Training mode and the device of the buffers as the supernet's."""
        if self.encoder.training != training:
            self.encoder.train(training)
        if self.device != device:
            for module in self.encoder.modules():
                for name, b in module.named_buffers(recurse=False):
                    setattr(module, name, b.to(device))
            self.device = device


def _fusion_key(block: str, condition: str | None) -> str:
    return f"fusion/{block}" + (f"/{condition}" if condition else "")
