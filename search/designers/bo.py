"""Bayesian optimisation with a Gaussian process over decisions."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize
from scipy.special import ndtr, ndtri
from threadpoolctl import ThreadpoolController

from lacer.envs import LacerError
from lacer.search.designers.base import Designer, fresh_sample, random_start, register_designer
from lacer.search.space import Point, SearchSpace
from lacer.search.study import Proposal, Study

Array = NDArray[np.float64]

ENUMERATE = 20_000
"""Spaces of at most so many points are scored whole."""
POOL = 1_000
"""Candidates that are scored in larger spaces: random ones and neighbours of the best."""


@cache
def _threads() -> ThreadpoolController:
    return ThreadpoolController()


@register_designer
class BO(Designer):
    """Bayesian optimisation: a Gaussian process over decisions, the largest expected improvement

    The classical bar of neural architecture search (Jones et al. 1998; White et al. 2021, 1910.11858). Kernel: a
    product of exponentials over decisions, each with a length scale of its own (ARD Hamming; a decision that is not
    asked is an option too), plus one on how often each option occurs in all decisions that share the same options.
    Noise, amplitudes and length scales maximise the posterior given the data. Scores are mapped to normal quantiles by
    rank, so that a few terrible encoders do not stretch the scale. Expected improvement is over the best posterior mean
    so far, because a score with noise is no bar. Running trials, and the others of a batch, count with their predicted
    score (fantasies; Ginsbourger et al. 2010), failed ones with the worst.

    Args:
        seed: seed of start, pool and ties.
        start: random encoders at first, the first candidate included.

    Raises:
        LacerError: if ``start`` is below 1.
    """

    name: ClassVar[str] = "bo"
    paper: ClassVar[str] = "Jones et al. 1998; White et al. 2021, 1910.11858"

    def __init__(self, seed: int = 0, start: int = 6) -> None:
        super().__init__(seed)
        if start < 1:
            raise LacerError(f"bo: start must be at least 1, not {start}")
        self.start = start
        self._coder: Coder | None = None

    def propose(self, study: Study, n: int) -> list[Proposal]:
        with _threads().limit(limits=1, user_api="blas"):  # small matrices: threads would only wait for each other
            return self._propose(study, n)

    def _propose(self, study: Study, n: int) -> list[Proposal]:
        rng = self.rng(study)
        out = random_start(study, n, self.start, rng, self.name)
        if len(out) == n:
            return out
        if self._coder is None or self._coder.space is not study.space:
            self._coder = Coder(study.space)
        coder = self._coder
        known = [t for t in study.trials if t.status != "rejected" and t.proposal.point is not None]
        done = [t for t in known if t.status != "running"]
        codes = coder.encode([t.proposal.point or {} for t in done])
        sign = study.objective.signed
        scores = [None if t.objective is None else sign(t.objective) for t in done]
        worst = min(s for s in scores if s is not None)
        y = normal_scores(np.array([worst if s is None else s for s in scores]))
        gp = GP.fit(codes, y, coder)
        running = [t.proposal.point for t in known if t.status == "running" and t.proposal.point is not None]
        for point in [*running, *(p.point for p in out if p.point is not None)]:
            gp = gp.with_fantasy(coder.encode([point]))
        pool = self._pool(study, out, rng)
        if not pool:
            return out + [Proposal(fresh_sample(study, out, rng), self.name) for _ in range(n - len(out))]
        pool_codes = coder.encode(pool) if pool is not coder.points else coder.codes
        taken = np.zeros(len(pool), bool)
        if pool is coder.points:
            taken[[coder.row[c] for t in study.trials if (c := t.ncode) in coder.row]] = True
            taken[[coder.row[study.space.to_ncode(p.point)] for p in out if p.point is not None]] = True
        while len(out) < n:
            if taken.all():
                out.append(Proposal(fresh_sample(study, out, rng), self.name, "every encoder has been tried"))
                continue
            mean, deviation = gp.predict(pool_codes)
            gain = expected_improvement(mean, deviation, float(gp.mean_at_data().max()))
            gain[taken] = -np.inf
            best = int(rng.choice(np.flatnonzero(gain >= gain.max() - 1e-12)))
            taken[best] = True
            out.append(Proposal(pool[best], self.name, f"expected improvement {gain[best]:.3g}: predicted "
                                f"{mean[best]:.2f} +- {deviation[best]:.2f} on the normal scale of scores so far",
                                meta={"predicted": [round(float(mean[best]), 4), round(float(deviation[best]), 4)]}))
            gp = gp.with_fantasy(pool_codes[best:best + 1])
        return out

    def _pool(self, study: Study, batch: list[Proposal], rng: np.random.Generator) -> list[Point]:
        """Candidates to score: the whole space where it is small, else random ones and neighbours of the best."""
        assert self._coder is not None
        if self._coder.points:
            return self._coder.points
        sign = study.objective.signed
        best = sorted(study.finished, key=lambda t: -sign(t.objective or 0.0))[:10]
        pool: dict[str, Point] = {}
        for _ in range(POOL // 2):
            point = study.space.sample(rng)
            pool.setdefault(study.space.to_ncode(point), point)
        for t in itertools.islice(itertools.cycle(best), POOL // 2):
            assert t.proposal.point is not None
            point = study.space.mutate(t.proposal.point, rng)
            if rng.random() < 0.3:
                point = study.space.mutate(point, rng)
            pool.setdefault(study.space.to_ncode(point), point)
        taken = {study.space.to_ncode(p.point) for p in batch if p.point is not None}
        return [p for code, p in pool.items() if code not in taken and study.seen(code) is None]


class Coder:
    """Points as rows of option numbers, and what a kernel needs to compare them.

    Attributes:
        points, codes, row: the whole space if it is small, its codes, and the row of an NCode; else empty.
    """

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self.options = [{(type(o), o): i for i, o in enumerate(d.options)} for d in space.decisions]
        self.sizes = np.array([len(o) + 1 for o in self.options])  # the last: not asked
        self.offsets = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        # Decisions that share their options, for the histogram: option (type, value) -> column.
        groups: dict[tuple[object, ...], list[int]] = {}
        for i, d in enumerate(space.decisions):
            groups.setdefault(tuple((type(o), o) for o in d.options), []).append(i)
        self.shared = [g for g in groups.values() if len(g) > 1 and len(space.decisions[g[0]].options) > 1]
        self.points: list[Point] = []
        if space.size() <= ENUMERATE:
            self.points = list(space.points())
        self.codes = self.encode(self.points)
        self.row = {space.to_ncode(p): i for i, p in enumerate(self.points)}

    def encode(self, points: list[Point]) -> NDArray[np.int64]:
        """(n, decisions): the number of the chosen option; one beyond the last where a decision is not asked."""
        names = [d.name for d in self.space.decisions]
        return np.array([[o[type(p[n]), p[n]] if n in p else len(o) for n, o in zip(names, self.options, strict=True)]
                         for p in points], dtype=np.int64).reshape(len(points), len(names))

    def one_hot(self, codes: NDArray[np.int64]) -> Array:
        """(n, sum of options)."""
        out = np.zeros((len(codes), int(self.sizes.sum())))
        out[np.arange(len(codes))[:, None], codes + self.offsets] = 1.0
        return out

    def histogram(self, codes: NDArray[np.int64]) -> Array:
        """(n, H): share of each option among the decisions that share it; H may be 0."""
        parts = [np.stack([(codes[:, g] == o).mean(1) for o in range(self.sizes[g[0]] - 1)], 1) for g in self.shared]
        return np.concatenate(parts, 1) if parts else np.zeros((len(codes), 0))


@dataclass
class GP:
    """A Gaussian process with the kernel of :class:`BO`, conditioned on data.

    ``log``: logarithms of the parameters: amplitudes of the two kernels, noise variance, scale of the histogram, and a
    weight per decision.
    """

    coder: Coder
    log: Array
    codes: NDArray[np.int64]
    y: Array
    hot: Array
    histogram: Array

    def __post_init__(self) -> None:
        self.factor = cho_factor(self._kernel(self.hot, self.histogram) + np.exp(self.log[2]) * np.eye(len(self.y)),
                                 lower=True)
        self.alpha = cho_solve(self.factor, self.y)

    @classmethod
    def fit(cls, codes: NDArray[np.int64], y: Array, coder: Coder) -> GP:
        """The parameters with the highest posterior density, found by L-BFGS from the middle of the prior."""
        hot, histogram = coder.one_hot(codes), coder.histogram(codes)
        differ = (codes.T[:, :, None] != codes.T[:, None, :]).astype(float)
        far = _squared(histogram, histogram)
        n, d = codes.shape
        flat = differ.reshape(d, n * n)
        # Priors, normal in the logarithm: about two decisions' difference halves the correlation; some noise.
        centre = np.concatenate([[np.log(0.7), np.log(0.4), np.log(0.05), np.log(4.0)],
                                 np.full(d, np.log(1.5 / np.sqrt(d)))])
        width = np.concatenate([[0.7, 1.0, 1.2, 1.0], np.full(d, 1.0)])
        if not far.any():
            centre[1] = -12.0

        def loss(log: Array) -> tuple[float, Array]:
            a, b, noise, scale = np.exp(log[:4])
            weights = np.exp(log[4:])
            near = a * np.exp(-(weights @ flat)).reshape(n, n)
            counts = b * np.exp(-scale * far)
            try:
                factor = cho_factor(near + counts + (noise + 1e-8) * np.eye(n), lower=True)
            except np.linalg.LinAlgError:
                return 1e10, np.zeros_like(log)
            alpha = cho_solve(factor, y)
            q = cho_solve(factor, np.eye(n)) - np.outer(alpha, alpha)
            value = 0.5 * y @ alpha + np.log(np.diag(factor[0])).sum()
            grad = np.empty_like(log)
            grad[0] = 0.5 * (q * near).sum()
            grad[1] = 0.5 * (q * counts).sum()
            grad[2] = 0.5 * noise * np.trace(q)
            grad[3] = -0.5 * scale * (q * counts * far).sum()
            grad[4:] = -0.5 * weights * (flat @ (q * near).ravel())
            off = (log - centre) / width
            return float(value + 0.5 * off @ off), grad + off / width

        bounds = [(-14.0, 5.0)] * len(centre)
        found = minimize(loss, centre, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 40})
        return cls(coder, found.x, codes, y, hot, histogram)

    def _kernel(self, hot: Array, histogram: Array) -> Array:
        """(n, m): covariance of the data with other points."""
        a, b, _, scale = np.exp(self.log[:4])
        weights = np.repeat(np.exp(self.log[4:]), self.coder.sizes)
        differ = np.exp(self.log[4:]).sum() - (self.hot * weights) @ hot.T
        return a * np.exp(-differ) + b * np.exp(-scale * _squared(self.histogram, histogram))

    def predict(self, codes: NDArray[np.int64]) -> tuple[Array, Array]:
        """Mean and standard deviation, without noise."""
        cross = self._kernel(self.coder.one_hot(codes), self.coder.histogram(codes))
        prior = np.exp(self.log[0]) + np.exp(self.log[1])
        solved = solve_triangular(self.factor[0], cross, lower=True)
        return cross.T @ self.alpha, np.sqrt(np.maximum(prior - (solved ** 2).sum(0), 1e-12))

    def mean_at_data(self) -> Array:
        """Posterior mean where there are data."""
        return self.y - np.exp(self.log[2]) * self.alpha

    def with_fantasy(self, codes: NDArray[np.int64]) -> GP:
        """The same with further points that score as predicted."""
        y, _ = self.predict(codes)
        return GP(self.coder, self.log, np.concatenate([self.codes, codes]), np.concatenate([self.y, y]),
                  np.concatenate([self.hot, self.coder.one_hot(codes)]),
                  np.concatenate([self.histogram, self.coder.histogram(codes)]))


def normal_scores(values: Array) -> Array:
    """Values mapped to quantiles of the standard normal by rank; equals share their mean rank."""
    order = np.argsort(np.argsort(values, kind="stable"), kind="stable").astype(float)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean_rank = np.bincount(inverse, order) / counts
    return np.asarray(ndtri((mean_rank[inverse] + 0.5) / len(values)), dtype=float)


def expected_improvement(mean: Array, deviation: Array, best: float) -> Array:
    """Expected improvement over ``best`` (Jones et al. 1998), more is better."""
    z = (mean - best) / deviation
    return deviation * (z * ndtr(z) + np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi))


def _squared(a: Array, b: Array) -> Array:
    if not a.shape[1]:
        return np.zeros((len(a), len(b)))
    return np.maximum((a ** 2).sum(1)[:, None] + (b ** 2).sum(1)[None] - 2 * a @ b.T, 0.0)
