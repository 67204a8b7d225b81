"""Search spaces: decisions, some of them conditional; the space of composite encoders for a task; spaces of tables."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from lacer.encoders import FUSION, EncoderSpec, list_blocks, parse_block
from lacer.encoders.registry import FusionConfig
from lacer.envs import LacerError, TaskCard, did_you_mean
from lacer.envs.sources import MODALITIES
from lacer.search.presets import read_yaml

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
        condition: (name of an earlier decision, its option, or a tuple of options) under which this one is asked;
            None: always.
    """

    name: str
    options: tuple[Any, ...]
    condition: tuple[str, Any] | None = None

    @property
    def asked_for(self) -> tuple[Any, ...]:
        """Options of the earlier decision under which this one is asked."""
        if self.condition is None:
            return ()
        return self.condition[1] if isinstance(self.condition[1], tuple) else (self.condition[1],)

    def index(self, option: Any) -> int:
        """Position of an option. 1 and True are different options, 1 and 1.0 the same."""
        for i, o in enumerate(self.options):
            if o == option and isinstance(o, bool) == isinstance(option, bool):
                return i
        raise LacerError(f"{self.name} = {option!r} is not in this search space; options: "
                         f"{', '.join(map(repr, self.options))}")


class SearchSpace:
    """A list of decisions. Points are dicts of the active ones.

    A decision is asked only where it has an effect, so every architecture is one point and has one NCode; a subclass
    keeps that promise by conditions on its decisions.

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
            if not d.options or len({(isinstance(o, bool), o) for o in d.options}) < len(d.options):
                raise LacerError(f"the options of {d.name!r} must be different, and at least one: {d.options}")
            if d.condition is not None:
                if d.condition[0] not in seen:
                    raise LacerError(f"{d.name!r} depends on {d.condition[0]!r}, which does not come before it")
                for option in d.asked_for:
                    seen[d.condition[0]].index(option)
            seen[d.name] = d
        self.decisions = tuple(decisions)
        self.by_name = seen
        self._counts: dict[tuple[str, int], int] = {}

    def is_active(self, decision: Decision, point: Mapping[str, Any]) -> bool:
        """Whether a decision is asked, given the decisions before it."""
        if decision.condition is None:
            return True
        parent = decision.condition[0]
        return parent in point and point[parent] in decision.asked_for

    def options(self, decision: Decision, point: Mapping[str, Any]) -> tuple[Any, ...]:
        """Options of a decision that can be allowed, given the decisions before it; for subclasses with a constraint.
        Not empty."""
        return decision.options

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
        """A random point. Every active decision is drawn uniformly, in order, so a block with many options is not drawn
        more often than others; that is uniform over points only where no decision is conditional, see
        :meth:`sample_uniform`."""
        return self._until_allowed(lambda: self._fill({}, rng))

    def sample_uniform(self, rng: np.random.Generator) -> Point:
        """A random point, each as likely as any other: an option is drawn in proportion to the points below it."""
        def draw() -> Point:
            out: Point = {}
            for d in self.decisions:
                if self.is_active(d, out):
                    counts = [self._count_below(d, o) for o in d.options]
                    total = sum(counts)
                    out[d.name] = d.options[int(rng.choice(len(counts), p=[c / total for c in counts]))]
            return out

        return self._until_allowed(draw)

    def mutate(self, point: Point, rng: np.random.Generator) -> Point:
        """A neighbour: one decision changes; decisions that this makes active are drawn, those that it makes
        inactive are dropped, all others stay. The point itself if it has no neighbour."""
        names = [n for n in point if len(self.by_name[n].options) > 1]
        if not names:
            return dict(point)
        for _ in range(1000):
            name = names[rng.integers(len(names))]
            d = self.by_name[name]
            others = [o for i, o in enumerate(d.options) if i != d.index(point[name])]
            new = self._fill({**point, name: others[rng.integers(len(others))]}, rng)
            if self.allowed(new):
                return new
        near = list(self.neighbours(point))
        return near[rng.integers(len(near))] if near else dict(point)

    def crossover(self, a: Point, b: Point, rng: np.random.Generator) -> Point:
        """Each decision from one parent or the other; those that neither answers are drawn."""
        for _ in range(1000):
            new: Point = {}
            for d in self.decisions:
                if self.is_active(d, new):
                    options = self.options(d, new)
                    have = [p[d.name] for p in (a, b) if d.name in p and p[d.name] in options] or options
                    new[d.name] = have[rng.integers(len(have))]
            if self.allowed(new):
                return new
        return dict(a)

    def neighbours(self, point: Point) -> Iterator[Point]:
        """All points that differ in one decision (newly active decisions take their first allowed options)."""
        for name in point:
            d = self.by_name[name]
            for i, option in enumerate(d.options):
                if i != d.index(point[name]):
                    yield from itertools.islice(self._grow({**point, name: option}), 1)

    def _fill(self, partial: Mapping[str, Any], rng: np.random.Generator) -> Point:
        out: Point = {}
        for d in self.decisions:
            if self.is_active(d, out):
                if d.name in partial:
                    out[d.name] = partial[d.name]
                else:
                    options = self.options(d, out)
                    out[d.name] = options[int(rng.integers(len(options)))]
        return out

    def _until_allowed(self, draw: Callable[[], Point]) -> Point:
        for _ in range(10_000):
            point = draw()
            if self.allowed(point):
                return point
        raise LacerError("no allowed point was found in this search space")

    def _count_below(self, decision: Decision, option: Any) -> int:
        """Number of ways to answer the decisions that an option makes active."""
        key = (decision.name, decision.index(option))
        if key not in self._counts:
            self._counts[key] = math.prod(
                sum(self._count_below(c, o) for o in c.options)
                for c in self.decisions
                if c.condition is not None and c.condition[0] == decision.name and option in c.asked_for)
        return self._counts[key]

    def _count(self, decisions: Iterable[Decision]) -> int:
        """Number of ways to answer some unconditional decisions and all below them."""
        return math.prod(sum(self._count_below(d, o) for o in d.options) for d in decisions)

    def size(self) -> int:
        """Number of points (a subclass with a constraint overrides it)."""
        return self._count(d for d in self.decisions if d.condition is None)

    def points(self, limit: int | None = None) -> Iterator[Point]:
        """All points in order, or the first ``limit``."""
        return itertools.islice(self._grow({}), limit)

    def _grow(self, partial: Mapping[str, Any]) -> Iterator[Point]:
        """All points that answer some decisions as given (where these are active)."""
        def grow(out: Point, i: int) -> Iterator[Point]:
            while i < len(self.decisions) and not self.is_active(self.decisions[i], out):
                i += 1
            if i == len(self.decisions):
                if self.allowed(out):
                    yield dict(out)
                return
            d = self.decisions[i]
            for option in (partial[d.name],) if d.name in partial else self.options(d, out):
                yield from grow({**out, d.name: option}, i + 1)

        return grow({}, 0)

    def to_ncode(self, point: Point) -> str:
        """NCode (LM-Searcher, 2509.05657): the index of each decision's option, joined by ``.``; ``_`` where a
        decision is not asked. Unlike the paper's digits it has no limit of ten options, and it is canonical: a decision
        without effect is not asked, so it has one code, ``_``."""
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

    def to_json(self) -> list[dict[str, Any]]:
        """The decisions as plain data; a constraint of a subclass is not among them."""
        return [{"name": d.name, "options": list(d.options),
                 "condition": None if d.condition is None else [d.condition[0], list(d.asked_for)]}
                for d in self.decisions]

    @staticmethod
    def from_json(decisions: Iterable[Mapping[str, Any]]) -> SearchSpace:
        """The space of decisions as :meth:`to_json` gives them. Raises LacerError."""
        return SearchSpace([Decision(d["name"], tuple(d["options"]), None if d["condition"] is None else
                                     (d["condition"][0], tuple(d["condition"][1]))) for d in decisions])

    @classmethod
    def from_table(cls, strings: Iterable[str]) -> TableSpace:
        """The space of a table of architectures; see :class:`TableSpace`."""
        return TableSpace(strings)


class TableSpace(SearchSpace):
    """The architectures of a table: strings with one decision per character, of one length or of several.

    With several lengths the first decision is ``length``, and a place beyond the shortest length is asked only where
    the string reaches it. Only strings of the table are part of the space. :meth:`sample` is uniform over them.

    Raises:
        LacerError: if there are no strings, or an empty one.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self.strings = tuple(dict.fromkeys(strings))
        if not all(self.strings) or not self.strings:
            raise LacerError("a table of architectures needs at least one string, and none of them empty")
        self._known = set(self.strings)
        lengths = tuple(sorted({len(s) for s in self.strings}))
        decisions = [Decision("length", lengths)] if len(lengths) > 1 else []
        for i in range(lengths[-1]):
            options = tuple(sorted({s[i] for s in self.strings if len(s) > i}))
            reach = tuple(n for n in lengths if n > i)
            decisions.append(Decision(f"place {i + 1}", options, None if reach == lengths else ("length", reach)))
        super().__init__(decisions)

    def to_string(self, point: Mapping[str, Any]) -> str:
        """The string of a point."""
        return "".join(point[d.name] for d in self.decisions if d.name != "length" and d.name in point)

    def from_string(self, string: str) -> Point:
        """The point of a string. Raises LacerError if it is not in the table."""
        if string not in self._known:
            raise LacerError(f"{string[:80]!r} is not in the table{did_you_mean(string[:80], self.strings)}")
        point: Point = {"length": len(string)} if "length" in self.by_name else {}
        return point | {f"place {i + 1}": c for i, c in enumerate(string)}

    def allowed(self, point: Point) -> bool:
        return self.to_string(point) in self._known

    def size(self) -> int:
        return len(self.strings)

    def sample(self, rng: np.random.Generator) -> Point:
        """A row of the table, each as likely as any other."""
        return self.from_string(self.strings[rng.integers(len(self.strings))])

    sample_uniform = sample


CONDITION = "routing.condition"
"""The decision which source conditions the fusion; asked where the fusion block has such a source."""


class EncoderSpace(SearchSpace):
    """The composite encoders for a task, derived from the block registry.

    Decisions, per source: ``SOURCE.block``, then ``SOURCE.BLOCK.FIELD`` for the fields of the chosen block; the same
    for ``fusion``; and ``routing.condition``, one of the used sources, where the fusion block is conditioned on one. At
    least one source is used. Beside the general note on :meth:`sample`: the condition is drawn among the used sources.

    Args:
        card: the task.
        narrow: options by decision, to narrow or widen the derived ones; as in a YAML file. In a key, the source may be
            ``*`` (any source, not the fusion) or ``MODALITY:*`` (any source of that modality), and the block ``*``:
            ``{"series:*.block": ["gru"], "*.mlp.width": [8, 16], "fusion.*.modality_dropout": [0.0]}``. The more exact
            key wins, first by source, then by block. Keys with a ``*`` may match nothing here, if they could elsewhere.
        optional_sources: whether a source may be left out.

    Attributes:
        expert: the first candidate that goes with this space, if :func:`load_space` found one; None: the general one.

    Raises:
        LacerError: unknown decisions in ``narrow`` ("did you mean"), or values that a block does not accept.
    """

    def __init__(self, card: TaskCard, narrow: Mapping[str, Sequence[Any]] | None = None,
                 optional_sources: bool = True) -> None:
        self.card = card
        self.expert: EncoderSpec | None = None
        given = _Narrowing(narrow or {}, card)
        decisions: list[Decision] = []
        for part, modality in [*((name, s.modality) for name, s in card.sources.items()), (FUSION, FUSION)]:
            known = {name: cls for (_, name), cls in list_blocks(modality).items()}
            spare = [UNUSED] if optional_sources and part != FUSION and len(card.sources) > 1 else []
            chosen = given.options(part, modality, "block", [*known, *spare])
            decisions.append(Decision(f"{part}.block", chosen))
            for block in chosen:
                if block == UNUSED and part != FUSION:
                    continue
                if block not in known:
                    raise LacerError(f"space: {part}.block has no option {block!r}{did_you_mean(str(block), known)} "
                                     f"Options: {', '.join(known)}.")
                values = {field: given.options(part, modality, f"{block}.{field}", default)
                          for field, default in known[block].choices().items()}
                conditions = known[block].conditions()
                for field, options in values.items():
                    for value in options:
                        parse_block(modality, {"block": block, field: value}, f"space: {part}")
                    condition: tuple[str, Any] = (f"{part}.block", block)
                    if field in conditions:
                        other, needed = conditions[field]
                        have = tuple(o for o in values[other] if o in needed)
                        if not have:
                            continue  # without effect in all of this space
                        condition = (f"{part}.{block}.{other}", have)
                    decisions.append(Decision(f"{part}.{block}.{field}", options, condition))
        fusions = {name: cls for (_, name), cls in list_blocks(FUSION).items()}
        conditioned = tuple(b for b in _options_of(decisions, f"{FUSION}.block")
                            if cast(type[FusionConfig], fusions[b]).conditioned)
        names = given.condition([n for n in card.sources if _options_of(decisions, f"{n}.block") != (UNUSED,)])
        if conditioned:
            decisions.append(Decision(CONDITION, names, (f"{FUSION}.block", conditioned)))
        given.check_all_used()
        super().__init__(decisions)

    def fields(self, part: str, block: str) -> dict[str, Decision]:
        """Decisions about the fields of a block, by field."""
        prefix = f"{part}.{block}."
        return {d.name[len(prefix):]: d for d in self.decisions if d.name.startswith(prefix)}

    def options(self, decision: Decision, point: Mapping[str, Any]) -> tuple[Any, ...]:
        if decision.name != CONDITION:
            return decision.options
        used = tuple(o for o in decision.options if point.get(f"{o}.block") != UNUSED)
        return used or decision.options  # then nothing is allowed

    def allowed(self, point: Point) -> bool:
        condition = point.get(CONDITION)
        if condition is not None and point[f"{condition}.block"] == UNUSED:
            return False
        return any(point[f"{name}.block"] != UNUSED for name in self.card.sources)

    def size(self) -> int:
        """Number of points, exactly."""
        every, without = {}, {}
        for n in self.card.sources:
            d = self.by_name[f"{n}.block"]
            every[n], without[n] = self._count([d]), int(UNUSED in d.options)
        fusion = self.by_name[f"{FUSION}.block"]
        routing = self.by_name.get(CONDITION)
        conditioned = routing.asked_for if routing is not None else ()
        size = (math.prod(every.values()) - math.prod(without.values())) * sum(
            self._count_below(fusion, o) for o in fusion.options if o not in conditioned)
        if routing is None:
            return size
        # The conditioning source is used, the others are as they like.
        ways = sum((every[c] - without[c]) * math.prod(v for n, v in every.items() if n != c) for c in routing.options)
        return size + ways * (sum(self._count_below(fusion, o) for o in conditioned) // len(routing.options))

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
        return EncoderSpec(sources, fusion, point.get(CONDITION))

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
                    if name in self.by_name and self.is_active(self.by_name[name], point):
                        point[name] = value
        if spec.condition is not None:
            point[CONDITION] = spec.condition
        return self.check(point)


def _options_of(decisions: Iterable[Decision], name: str) -> tuple[Any, ...]:
    """Options of the decision of that name."""
    return next(d.options for d in decisions if d.name == name)


class _Narrowing:
    """Looks up options by the patterns of a user."""

    def __init__(self, narrow: Mapping[str, Sequence[Any]], card: TaskCard) -> None:
        self.narrow, self.card = narrow, card
        self.used: set[str] = set()
        for key, value in narrow.items():
            if not isinstance(value, Sequence) or isinstance(value, str) or not value:
                raise LacerError(f"space: {key} must be a list of options, not {value!r}")

    def options(self, part: str, modality: str, rest: str, default: Sequence[Any]) -> tuple[Any, ...]:
        """Options of ``PART.REST`` by the most exact pattern that matches it."""
        parts = [part] if part == FUSION else [part, f"{modality}:*", "*"]
        rests = [rest] if rest == "block" else [rest, "*." + rest.split(".", 1)[1]]
        keys = [key for key in (f"{p}.{r}" for p in parts for r in rests) if key in self.narrow]
        self.used.update(keys)
        return tuple(self.narrow[keys[0]] if keys else default)

    def condition(self, default: list[str]) -> tuple[str, ...]:
        """Options of the routing."""
        for name in self.narrow.get(CONDITION, ()):
            if name not in default:
                known = ", ".join(default)
                raise LacerError(f"space: {CONDITION} has no option {name!r}{did_you_mean(str(name), default)} "
                                 f"Sources that can be used: {known}.")
        return tuple(self.narrow.get(CONDITION, default))

    def check_all_used(self) -> None:
        """Raises LacerError for keys that mean nothing; a pattern with ``*`` may concern other tasks only."""
        everything = _all_names((name, s.modality) for name, s in self.card.sources.items())
        patterns = _all_names((f"{m}:*", m) for m in MODALITIES) | _all_names(("*", m) for m in MODALITIES)
        patterns |= {f"{n.split('.')[0]}.*.{n.split('.')[2]}" for n in everything | patterns if n.count(".") == 2}
        for key in self.narrow:
            if key in self.used or key == CONDITION or (key in patterns and "*" in key):
                continue
            if key in everything:
                raise LacerError(f"space: {key} has no effect, because the space leaves its block out")
            raise LacerError(f"space: unknown decision {key!r}{did_you_mean(key, [*everything, CONDITION, *patterns])}")


def _all_names(parts: Iterable[tuple[str, str]]) -> set[str]:
    """Every decision that the registry makes for some (part, modality), and for the fusion."""
    return {f"{part}.{rest}" for part, modality in [*parts, (FUSION, FUSION)] for (_, block), cls in
            list_blocks(modality).items() for rest in ("block", *(f"{block}.{f}" for f in cls.choices()))}


def read_space(space: str | Path) -> dict[str, Any]:
    """The content of a preset of ``configs/spaces`` or of a YAML file, as :func:`load_space` takes it.

    Raises:
        LacerError: no such file, or no YAML mapping.
    """
    return read_yaml(space, "spaces", "search space")


_KEYS = {"decisions": dict, "optional_sources": bool, "expert": dict}


def load_space(space: str | Path | Mapping[str, Any], card: TaskCard) -> EncoderSpace:
    """The search space of a preset, of a YAML file, or of what such a file holds.

    That is ``decisions``, options by decision as :class:`EncoderSpace` takes them; ``optional_sources``, whether a
    source may be left out (default: yes); and ``expert``, blocks by source, modality or ``fusion``: the first candidate
    of a search in this space, needed where the general one is not part of it. A mapping without these keys is taken
    for the decisions.

    Raises:
        LacerError: no such file, wrong keys ("did you mean"), options or expert.
    """
    if isinstance(space, str | Path):
        data, where = read_space(space), f"space {space}: "
    else:
        data, where = dict(space) if any(k in _KEYS for k in space) else {"decisions": dict(space)}, ""
    for key, value in data.items():
        if key not in _KEYS:
            raise LacerError(f"{where or 'space: '}unknown key {str(key)[:80]!r}"
                             f"{did_you_mean(str(key)[:80], _KEYS)} Keys: {', '.join(_KEYS)}.")
        if not isinstance(value, _KEYS[key]):
            kind = "true or false" if _KEYS[key] is bool else "a mapping"
            raise LacerError(f"{where or 'space: '}{key} must be {kind}, not {str(value)[:80]!r}")
    try:
        made = EncoderSpace(card, data.get("decisions"), data.get("optional_sources", True))
        if "expert" in data:
            made.expert = expert_by_modality(data["expert"], card)
            made.from_spec(made.expert)
    except LacerError as e:
        raise LacerError(f"{where}{e}") from None
    return made


def expert_by_modality(blocks: Mapping[str, Any], card: TaskCard) -> EncoderSpec:
    """An encoder from blocks by source or, where a source has none of its own, by modality; ``unused`` leaves it out.

    Raises:
        LacerError: a block that does not exist, or none for a source.
    """
    sources = {}
    for name, s in card.sources.items():
        if name not in blocks and s.modality not in blocks:
            raise LacerError(f"expert: no block for the source {name!r}, nor for its modality {s.modality!r}")
        block = blocks.get(name, blocks.get(s.modality))
        if block != UNUSED:
            sources[name] = block
    routing = {"routing": blocks["routing"]} if "routing" in blocks else {}
    return EncoderSpec.parse({"sources": sources, "fusion": blocks.get(FUSION), **routing}, card)
