"""CMA-ES with margin, for spaces of numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lacer.envs import LacerError
from lacer.search.designers.base import Designer, fresh_sample, register_designer, unseen
from lacer.search.space import Point, SearchSpace
from lacer.search.study import Proposal, Study

if TYPE_CHECKING:
    from cmaes import CMAwM

STALE = 10
"""Generations without a new point after which a restart is due."""
RESTARTS = 3
"""Restarts after which the rest is drawn at random."""


@dataclass
class _Generation:
    """A population.

    Attributes:
        points: of the space; None where the space does not have the point.
        codes: their NCodes.
        places: where they lie for the optimiser.
        told: the scores that it was told, higher is better; empty as long as some are missing.
    """

    points: list[Point | None]
    codes: list[str]
    places: list[np.ndarray]
    told: list[float]


@register_designer
class CMAES(Designer):
    """CMA-ES with margin, for spaces whose decisions are all numbers and always asked

    Hansen & Ostermeier 2001; with margin, so that no option of a discrete decision dies out: Hamano et al. 2022
    (2205.13482); restarts with a doubled population: Auger & Hansen 2005. The optimiser is that of the `cmaes` package,
    as in Optuna's `CmaEsSampler` with ``with_margin=True``, which keeps its state as a pickle in the study; here it is
    rebuilt from the results.

    Options are taken in ascending order and at equal distances, so for a layer's width 16, 32, 64 are 0, 1/2, 1.
    Deviations: a point that was evaluated before is not evaluated again, its score is looked up; failed ones count as
    slightly worse than the worst; while a generation is being evaluated, further workers get extra draws of it, from
    which the optimiser does not learn.

    Args:
        seed: seed of all draws.
        sigma: initial standard deviation, as a share of a decision's range.
        population: size of a generation; default 4 + 3 ln(decisions).

    Raises:
        LacerError: for sigma outside (0, 1], a population below 3.
    """

    name: ClassVar[str] = "cmaes"
    paper: ClassVar[str] = "Hamano et al. 2022, 2205.13482"

    def __init__(self, seed: int = 0, sigma: float = 1 / 6, population: int | None = None) -> None:
        super().__init__(seed)
        if not 0 < sigma <= 1 or (population is not None and population < 3):
            raise LacerError("cmaes: sigma must lie in (0, 1] and population be at least 3, not "
                             f"{sigma} and {population}")
        self.sigma, self.population = sigma, population
        self._begin()

    def _begin(self) -> None:
        self._generations: list[_Generation] = []
        self._told: dict[str, float] = {}  # NCode -> score that the optimiser was told
        self._optimizer: CMAwM | None = None
        self._restarts = self._stale = 0

    def check_space(self, space: SearchSpace) -> None:
        for d in space.decisions:
            if d.condition is not None:
                raise LacerError(f"cmaes: the decision {d.name!r} is asked only in some cases; CMA-ES needs decisions "
                                 "that are always asked")
            wrong = [o for o in d.options if not isinstance(o, int | float)]
            if wrong:
                raise LacerError(f"cmaes: the decision {d.name!r} has the option {wrong[0]!r}; CMA-ES needs numbers. "
                                 "bo, optuna:TPESampler and evolution take options of any kind.")
        if all(len(d.options) < 2 for d in space.decisions):
            raise LacerError("cmaes: there is nothing to decide")

    def propose(self, study: Study, n: int) -> list[Proposal]:
        self.check_space(study.space)
        if any(s != _score(study, code) for code, s in self._told.items()):
            self._begin()  # a result has changed, or this is another study
        out: list[Proposal] = []
        now = self._current(study)
        while len(out) < n:
            point, why = None if now is None else self._new(study, out, now), ""
            if point is None:
                point, why = fresh_sample(study, out, self.rng(study)), "nothing new within reach: random"
            out.append(Proposal(point, self.name, why or f"generation {len(self._generations)}"))
        return out

    def _current(self, study: Study) -> _Generation | None:
        """The generation whose scores are not all there yet, all earlier ones being told to the optimiser; None when
        it has been restarted too often."""
        while self._restarts <= RESTARTS:
            if self._optimizer is None:
                self._optimizer = self._start(study.space)
            if not self._generations or self._generations[-1].told:
                g = self._draw(study.space, self._optimizer.population_size, 0)
                new = any(p is not None and c not in self._told for p, c in zip(g.points, g.codes, strict=True))
                self._stale = 0 if new else self._stale + 1
                self._generations.append(g)
            g = self._generations[-1]
            scores = [-math.inf if p is None else _score(study, c) for p, c in zip(g.points, g.codes, strict=True)]
            if any(s is None for s in scores):
                return g
            g.told = [s for s in scores if s is not None]
            self._told |= {c: s for p, c, s in zip(g.points, g.codes, g.told, strict=True) if p is not None}
            worst = min((s for s in g.told if math.isfinite(s)), default=0.0) - 1e-3
            self._optimizer.tell([(x, -s if math.isfinite(s) else -worst)
                                  for x, s in zip(g.places, g.told, strict=True)])
            if self._stale >= STALE or self._optimizer.should_stop():
                self._optimizer, self._stale, self._restarts = None, 0, self._restarts + 1
        return None

    def _start(self, space: SearchSpace) -> CMAwM:
        from cmaes import CMAwM

        sizes = [len(d.options) for d in space.decisions if len(d.options) > 1]
        rng = np.random.default_rng([self.seed, self._restarts])
        mean = rng.random(len(sizes)) if self._restarts else np.full(len(sizes), 0.5)
        first = self.population or 4 + int(3 * math.log(len(sizes)))
        return CMAwM(mean, self.sigma, np.tile([0.0, 1.0], (len(sizes), 1)), np.array([1 / (s - 1) for s in sizes]),
                     population_size=first * 2**self._restarts)

    def _draw(self, space: SearchSpace, n: int, extra: int) -> _Generation:
        """Points of the optimiser's present distribution; the seed, the generation and ``extra`` decide which."""
        assert self._optimizer is not None
        state = np.random.SeedSequence([self.seed, len(self._generations), extra]).generate_state(1)
        self._optimizer.reseed_rng(int(state[0]))
        g = _Generation([], [], [], [])
        for _ in range(n):
            shown, place = self._optimizer.ask()
            values, point = iter(shown), Point()
            for d in space.decisions:
                k = len(d.options) - 1
                point[d.name] = sorted(d.options)[round(float(next(values)) * k) if k else 0]
            g.points.append(point if space.allowed(point) else None)
            g.codes.append(space.to_ncode(point))
            g.places.append(place)
        return g

    def _new(self, study: Study, batch: list[Proposal], now: _Generation) -> Point | None:
        """A point of the generation, or an extra draw of it, that nobody has seen."""
        for extra in range(5):
            g = now if not extra else self._draw(study.space, len(now.points), extra)
            for point in g.points:
                if point is not None and unseen(study, batch, point):
                    return point
        return None


def _score(study: Study, code: str) -> float | None:
    """Higher is better; minus infinity for what failed or was rejected, None for what is not known yet."""
    number = study.evaluated(code)
    if number is None:
        return None if study.seen(code) is None else -math.inf
    t = study[number]
    if t.status == "running":
        return None
    good = t.status == "ok" and t.objective is not None and math.isfinite(t.objective)
    return study.objective.signed(t.objective or 0.0) if good else -math.inf
