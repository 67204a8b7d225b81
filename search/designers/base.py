"""The designer contract and registry. A designer is one file in this package."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, get_type_hints

import numpy as np
from pydantic import TypeAdapter, ValidationError

from lacer.envs import LacerError, UnknownNameError, did_you_mean
from lacer.search.space import Point, SearchSpace
from lacer.search.study import Proposal, Study, Trial


class Designer(ABC):
    """Proposes encoders.

    Contract: a designer keeps no state that it cannot rebuild from the study, so a search resumes from the study
    alone; it is deterministic by its seed and the study; it does not propose an encoder that is in the study already
    unless the space is exhausted; it copes with failed, rejected and missing results. `propose` may be called from a
    thread other than the driver's, never twice at once.

    Args:
        seed: seed of all its random numbers.
    """

    name: ClassVar[str]
    needs_llm: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    """Whether it trains on the environment by itself, see :mod:`lacer.search.designers.training`."""
    paper: ClassVar[str] = ""
    any_space: ClassVar[bool] = True
    """Whether it searches spaces that are not of encoders, too."""
    variants: ClassVar[tuple[str, ...]] = ()
    """Names by which ``NAME:VARIANT`` makes the designer with the argument ``variant``."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    @abstractmethod
    def propose(self, study: Study, n: int) -> list[Proposal]:
        """Up to ``n`` new proposals, at least one (a rejected one counts), given all trials so far."""

    def check_space(self, space: SearchSpace) -> None:  # noqa: B027 (optional)
        """Raises LacerError for a space that the designer cannot search; called before anything starts."""

    def observe(self, trial: Trial) -> None:  # noqa: B027 (optional)
        """Called once with every finished, failed or pruned trial, between two calls of `propose`; those of an earlier
        session come again."""

    def close(self) -> None:  # noqa: B027 (optional)
        """Ends what it has running; called once, when the search ends, perhaps while `propose` is at work."""

    def rng(self, study: Study) -> np.random.Generator:
        """Random numbers that depend on the seed and on how far the study is, on nothing else."""
        return np.random.default_rng([self.seed, len(study)])

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring."""
        return (cls.__doc__ or "").strip().split("\n")[0]


def unseen(study: Study, batch: list[Proposal], point: Point) -> bool:
    """Whether a point is neither in the study nor in the batch being made."""
    code = study.space.to_ncode(point)
    return study.seen(code) is None and all(
        p.point is None or study.space.to_ncode(p.point) != code for p in batch)


def fresh_sample(study: Study, batch: list[Proposal], rng: np.random.Generator) -> Point:
    """A random point that is not in the study yet; any random point if none was found (small, exhausted spaces)."""
    for _ in range(200):
        point = study.space.sample(rng)
        if unseen(study, batch, point):
            return point
    for point in study.space.points(limit=20_000):
        if unseen(study, batch, point):
            return point
    return study.space.sample(rng)


def random_start(study: Study, n: int, start: int, rng: np.random.Generator, name: str) -> list[Proposal]:
    """Random proposals of a designer, at most n, until ``start`` have been tried and two have finished."""
    out: list[Proposal] = []
    tried = len(study) - study.count("rejected")
    while len(out) < n and (tried + len(out) < start or len(study.finished) < 2):
        out.append(Proposal(fresh_sample(study, out, rng), name, "random start"))
    return out


class DesignerStopped(LacerError):
    """A designer cannot go on, and nobody is to propose in its place. What runs is finished; the search can be resumed.

    Attributes:
        proposals: rejected ones that were made before, to be recorded.
    """

    def __init__(self, message: str, proposals: Sequence[Proposal] = ()) -> None:
        super().__init__(message)
        self.proposals = tuple(proposals)


_DESIGNERS: dict[str, type[Designer]] = {}
_loaded = False


def register_designer(cls: type[Designer]) -> type[Designer]:
    """Class decorator: makes a designer known under its ``name``."""
    _DESIGNERS[cls.name] = cls
    return cls


def designers() -> dict[str, type[Designer]]:
    """All designers by name."""
    global _loaded
    if not _loaded:
        package = importlib.import_module("lacer.search.designers")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
        _loaded = True
    return dict(sorted(_DESIGNERS.items()))


def designer_class(name: str) -> type[Designer]:
    """The designer of a name, ``NAME`` or ``NAME:VARIANT``. Raises UnknownNameError with the nearest one."""
    known = designers()
    family, colon, variant = name.partition(":")
    if family not in known or (colon and variant not in known[family].variants):
        raise UnknownNameError("designer", name, designer_names())
    return known[family]


def designer_names() -> list[str]:
    """Names of all designers, those with variants by ``NAME:VARIANT``."""
    return [n for name, cls in designers().items() for n in ([f"{name}:{v}" for v in cls.variants] or [name])]


def make_plain(name: str, seed: int, **options: Any) -> Designer:
    """A designer that needs no LLM. Raises UnknownNameError."""
    cls, (_, _, variant) = designer_class(name), name.partition(":")
    return cls(seed, **options, **({"variant": variant} if variant else {}))


GIVEN = ("seed", "variant", "trainer", "llm", "run_dir", "batch")
"""Arguments of designers that are no options: the search gives them."""


def check_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a designer, as its constructor takes them.

    Raises:
        LacerError: an unknown option ("did you mean"), or a value of another type.
    """
    cls = designer_class(name)
    hints = get_type_hints(cls.__init__, include_extras=True)
    known = [n for n in inspect.signature(cls).parameters if n not in GIVEN]
    out = {}
    for key, value in options.items():
        if key not in known:
            raise LacerError(f"the designer {name!r} has no option {key!r}{did_you_mean(key, known)} "
                             f"Options: {', '.join(known) or 'none'}.")
        try:
            out[key] = TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as e:
            why = e.errors()[0]["msg"]
            raise LacerError(f"the designer {name!r}: {key}: {why} (got {str(value)[:60]!r})") from None
    return out


__all__ = ["Designer", "DesignerStopped", "LacerError", "check_options", "designer_class", "designer_names",
           "designers", "fresh_sample", "make_plain", "register_designer", "unseen"]
