"""Search spaces: decisions, some of them conditional, and the space of composite encoders for a task."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lacer.encoders import FUSION, EncoderSpec, list_blocks, parse_block
from lacer.encoders.registry import FusionConfig
from lacer.envs import LacerError, TaskCard, did_you_mean

Point = dict[str, Any]
"""An architecture: the chosen option of every active decision, by name, in the order of the space."""

UNUSED = "unused"
"""Option of a source's block decision that leaves the source out."""


@dataclass(frozen=True)
class Decision:
    """One choice among options.

    Attributes:
        name: e.g. ``traffic.block`` or ``traffic.mlp.width``.
        options: plain values (str, int, float, bool), all different.
        condition: (name of an earlier decision, its option) under which this one is asked; None: always.
    """

    name: str
    options: tuple[Any, ...]
    condition: tuple[str, Any] | None = None

    def index(self, option: Any) -> int:
        """Position of an option. 1, 1.0 and True are different options."""
        for i, o in enumerate(self.options):
            if o == option and isinstance(o, bool) == isinstance(option, bool):
                return i
        raise LacerError(f"{self.name} = {option!r} is not in this search space; options: "
                         f"{', '.join(map(repr, self.options))}")


class SearchSpace:
    """A list of decisions. Points are dicts of the active ones.

    Sampling draws every active decision uniformly and in order, so encoders whose blocks have many options are not
    drawn more often than others; it is uniform over points only where no decision is conditional.

    Raises:
        LacerError: for empty spaces or options, repeated names, or conditions on unknown or later decisions.
    """

    def __init__(self, decisions: Sequence[Decision]) -> None:
        if not decisions:
            raise LacerError("a search space needs at least one decision")
        seen: dict[str, Decision] = {}
        for d in decisions:
            if d.name in seen:
                raise LacerError(f"the decision {d.name!r} appears twice")
            if not d.options or len({(type(o), o) for o in d.options}) < len(d.options):
                raise LacerError(f"the options of {d.name!r} must be different, and at least one: {d.options}")
            if d.condition is not None:
                if d.condition[0] not in seen:
                    raise LacerError(f"{d.name!r} depends on {d.condition[0]!r}, which does not come before it")
                seen[d.condition[0]].index(d.condition[1])
            seen[d.name] = d
        self.decisions = tuple(decisions)
        self.by_name = seen

    def is_active(self, decision: Decision, point: Mapping[str, Any]) -> bool:
        """Whether a decision is asked, given the decisions before it."""
        if decision.condition is None:
            return True
        parent, option = decision.condition
        return parent in point and point[parent] == option

    def allowed(self, point: Point) -> bool:
        """Constraint over whole points, for subclasses; points that break it are not part of the space."""
        return True

    def check(self, point: Mapping[str, Any]) -> Point:
        """The point in canonical order.

        Raises:
            LacerError: missing, unknown or inactive decisions, options outside the space, or a broken constraint.
        """
        out: Point = {}
        for d in self.decisions:
            if self.is_active(d, out):
                if d.name not in point:
                    raise LacerError(f"the decision {d.name!r} is missing")
                out[d.name] = d.options[d.index(point[d.name])]
        for name in point:
            if name not in self.by_name:
                raise LacerError(f"unknown decision {name!r}{did_you_mean(name, self.by_name)}")
            if name not in out:
                raise LacerError(f"the decision {name!r} has no effect here")
        if not self.allowed(out):
            raise LacerError("this combination is not part of the search space")
        return out

    def sample(self, rng: np.random.Generator) -> Point:
        """A random point."""
        return self._complete({}, rng)

    def mutate(self, point: Point, rng: np.random.Generator) -> Point:
        """A neighbour: one decision with more than one option changes; decisions that this makes active are drawn."""
        names = [n for n in point if len(self.by_name[n].options) > 1]
        if not names:
            return dict(point)
        for _ in range(1000):
            name = names[rng.integers(len(names))]
            d = self.by_name[name]
            i = d.index(point[name])
            j = int(rng.integers(len(d.options) - 1))
            new = self._fill({**point, name: d.options[j + (j >= i)]}, rng)
            if self.allowed(new):
                return new
        raise LacerError("no allowed mutation was found")

    def crossover(self, a: Point, b: Point, rng: np.random.Generator) -> Point:
        """Each decision from one parent or the other; those that neither answers are drawn."""
        mixed = {}
        for d in self.decisions:
            have = [p[d.name] for p in (a, b) if d.name in p]
            if have:
                mixed[d.name] = have[rng.integers(len(have))]
        for _ in range(1000):
            new = self._fill(mixed, rng)
            if self.allowed(new):
                return new
            mixed = dict(a)
        return dict(a)

    def neighbours(self, point: Point) -> Iterator[Point]:
        """All points that differ in one decision (newly active decisions take their first option)."""
        for name in point:
            for option in self.by_name[name].options:
                if option is not point[name] and self.by_name[name].index(option) != self.by_name[name].index(
                        point[name]):
                    new = self._fill({**point, name: option}, None)
                    if self.allowed(new):
                        yield new

    def _fill(self, partial: Mapping[str, Any], rng: np.random.Generator | None) -> Point:
        out: Point = {}
        for d in self.decisions:
            if self.is_active(d, out):
                out[d.name] = (partial[d.name] if d.name in partial
                               else d.options[0 if rng is None else int(rng.integers(len(d.options)))])
        return out

    def _complete(self, partial: Mapping[str, Any], rng: np.random.Generator) -> Point:
        for _ in range(10_000):
            point = self._fill(partial, rng)
            if self.allowed(point):
                return point
        raise LacerError("no allowed point was found in this search space")

    def size(self) -> int:
        """Number of points (for subclasses with a constraint: before it)."""
        children: dict[tuple[str, Any], list[Decision]] = {}
        for d in self.decisions:
            if d.condition is not None:
                children.setdefault(d.condition, []).append(d)

        def count(d: Decision) -> int:
            return sum(math.prod(count(c) for c in children.get((d.name, o), [])) for o in d.options)

        return math.prod(count(d) for d in self.decisions if d.condition is None)

    def points(self, limit: int | None = None) -> Iterator[Point]:
        """All points in order, or the first ``limit``."""
        def grow(out: Point, rest: tuple[Decision, ...]) -> Iterator[Point]:
            if not rest:
                if self.allowed(out):
                    yield dict(out)
                return
            d, rest = rest[0], rest[1:]
            if not self.is_active(d, out):
                yield from grow(out, rest)
                return
            for option in d.options:
                yield from grow({**out, d.name: option}, rest)

        return itertools.islice(grow({}, self.decisions), limit)

    def to_ncode(self, point: Point) -> str:
        """NCode (LM-Searcher, 2509.05657): the index of each decision's option, joined by ``.``; ``_`` where a
        decision is not asked. Unlike the paper's digits it has no limit of ten options."""
        return ".".join(str(d.index(point[d.name])) if d.name in point else "_" for d in self.decisions)

    def from_ncode(self, code: str) -> Point:
        """Inverse of :meth:`to_ncode`. Raises LacerError."""
        parts = code.split(".")
        if len(parts) != len(self.decisions):
            raise LacerError(f"NCode {code!r} has {len(parts)} places, this space has {len(self.decisions)} decisions")
        point: Point = {}
        for d, part in zip(self.decisions, parts, strict=True):
            if part != "_":
                if not part.isdecimal() or int(part) >= len(d.options):
                    raise LacerError(f"NCode {code!r}: {part!r} is no option of {d.name} (0 to {len(d.options) - 1})")
                point[d.name] = d.options[int(part)]
        return self.check(point)


class EncoderSpace(SearchSpace):
    """The composite encoders for a task, derived from the block registry.

    Decisions, per source: ``SOURCE.block``, then ``SOURCE.BLOCK.FIELD`` for the fields of the chosen block; and the
    same for ``fusion``. At least one source is used.

    Args:
        card: the task.
        narrow: options by decision name, to narrow or widen the derived ones; as in a YAML file. A key may use ``*``
            for the source: ``"*.mlp.width": [8, 16]``.
        optional_sources: whether a source may be left out.

    Raises:
        LacerError: unknown decisions in ``narrow`` ("did you mean"), or values that a block does not accept.
    """

    def __init__(self, card: TaskCard, narrow: Mapping[str, Sequence[Any]] | None = None,
                 optional_sources: bool = True) -> None:
        self.card = card
        left = dict(narrow or {})
        parts = [(name, s.modality) for name, s in card.sources.items()] + [(FUSION, FUSION)]
        used: set[str] = set()

        def options(name: str, default: Sequence[Any]) -> tuple[Any, ...]:
            for key in (name, "*." + name.split(".", 1)[1]):
                if key in left and (key == name or not name.startswith(FUSION + ".")):
                    used.add(key)
                    if not isinstance(left[key], Sequence) or isinstance(left[key], str) or not left[key]:
                        raise LacerError(f"space: {key} must be a list of options, not {left[key]!r}")
                    return tuple(left[key])
            return tuple(default)

        decisions: list[Decision] = []
        names: list[str] = []
        for part, modality in parts:
            known = {name: cls for (_, name), cls in list_blocks(modality).items()}
            names += [f"{part}.block"] + [f"{part}.{b}.{f}" for b, cls in known.items() for f in cls.choices()]
            spare = [UNUSED] if optional_sources and part != FUSION and len(card.sources) > 1 else []
            chosen = options(f"{part}.block", [*known, *spare])
            decisions.append(Decision(f"{part}.block", chosen))
            for block in chosen:
                if block == UNUSED and part != FUSION:
                    continue
                if block not in known:
                    raise LacerError(f"space: {part}.block has no option {block!r}{did_you_mean(str(block), known)} "
                                     f"Options: {', '.join(known)}.")
                for field, default in known[block].choices().items():
                    name = f"{part}.{block}.{field}"
                    values = options(name, default)
                    for value in values:
                        parse_block(modality, {"block": block, field: value}, f"space: {part}")
                    decisions.append(Decision(name, values, (f"{part}.block", block)))
        for key in left:
            if key not in used:
                raise LacerError(f"space: unknown decision {key!r}{did_you_mean(key, names)}")
        super().__init__(decisions)

    def allowed(self, point: Point) -> bool:
        return any(point[f"{name}.block"] != UNUSED for name in self.card.sources)

    def size(self) -> int:
        none = all(UNUSED in self.by_name[f"{n}.block"].options for n in self.card.sources)
        if not none:
            return super().size()
        # The points without any source are left out: one for every fusion.
        fusion = SearchSpace([d for d in self.decisions if d.name.startswith(FUSION + ".")])
        return super().size() - fusion.size()

    def to_spec(self, point: Point) -> EncoderSpec:
        """The encoder of a point."""
        def block(part: str) -> dict[str, Any]:
            name = point[f"{part}.block"]
            prefix = f"{part}.{name}."
            return {"block": name, **{k[len(prefix):]: v for k, v in point.items() if k.startswith(prefix)}}

        sources = {name: parse_block(s.modality, block(name), f"sources.{name}")
                   for name, s in self.card.sources.items() if point[f"{name}.block"] != UNUSED}
        fusion = parse_block(FUSION, block(FUSION), FUSION)
        assert isinstance(fusion, FusionConfig)
        return EncoderSpec(sources, fusion)

    def from_spec(self, spec: EncoderSpec) -> Point:
        """The point of an encoder. Raises LacerError if the encoder is not part of the space."""
        point: Point = {}
        for part in [*self.card.sources, FUSION]:
            block = spec.fusion if part == FUSION else spec.sources.get(part)
            point[f"{part}.block"] = UNUSED if block is None else block.block
            if block is not None:
                if block.block not in self.by_name[f"{part}.block"].options:
                    self.by_name[f"{part}.block"].index(block.block)
                for field, value in block.model_dump(exclude={"block"}).items():
                    name = f"{part}.{block.block}.{field}"
                    if name in self.by_name:
                        point[name] = value
        return self.check(point)
