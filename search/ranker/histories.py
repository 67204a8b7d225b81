"""Training examples: histories of searches on synthetic tasks, and candidates whose scores are to be predicted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

from lacer.search.designers.bo import normal_scores
from lacer.search.ranker.synthetic import Array, Codes, Rng, Shape, Task, make_shape, make_task

REACH = 2.5
"""So far beyond the best score of the history a target may lie, on the scale of normal scores."""


@dataclass
class Scale:
    """The scale on which scores are predicted: normal scores among the history by rank, linear between its scores, and
    beyond them with the slope of the upper (lower) half.

    Args:
        scores: (n,) of the history, higher is better.
    """

    scores: Array

    def __post_init__(self) -> None:
        self.z = normal_scores(self.scores)
        self.x, first = np.unique(self.scores, return_index=True)
        self.at = self.z[first]

    def __call__(self, scores: Array) -> Array:
        """Scores on the scale, at most ``REACH`` beyond its ends."""
        x, at = self.x, self.at
        if len(x) == 1:
            return np.asarray(np.clip(scores - x[0], -1e-9, 1e-9) * 0.0)
        out = np.interp(scores, x, at)
        half = len(x) // 2
        up = (at[-1] - at[half - 1]) / (x[-1] - x[half - 1])
        down = (at[(len(x) - 1) // 2 + 1] - at[0]) / (x[(len(x) - 1) // 2 + 1] - x[0])
        out = np.where(scores > x[-1], at[-1] + np.minimum(up * (scores - x[-1]), REACH), out)
        return np.asarray(np.where(scores < x[0], at[0] + np.maximum(down * (scores - x[0]), -REACH), out))


@dataclass
class Batch:
    """Tasks of one shape, as tensors.

    Attributes:
        codes: (B, n, D) the history: numbers of options; the size of a decision means "not asked".
        queries: (B, q, D) candidates.
        width: options of the largest decision, plus one.
        member: (B, G, D) rows that sum to 1 over the decisions that share their options; rows of zeros fill up.
        z: (B, n) scores of the history.
        channels: (B, n, C) other measurements of the history, normal scores.
        present: (B, n, C) 1 where they are there.
        sizes: (B, D) options of each decision.
        target: (B, q) scores to predict; empty outside training.
    """

    codes: torch.Tensor
    queries: torch.Tensor
    width: int
    member: torch.Tensor
    z: torch.Tensor
    channels: torch.Tensor
    present: torch.Tensor
    sizes: torch.Tensor
    target: torch.Tensor


def membership(group: NDArray[np.int64], rows: int) -> Array:
    """(rows, D) of :class:`Batch`, for the groups of more than one decision."""
    out = np.zeros((rows, len(group)))
    names, counts = np.unique(group, return_counts=True)
    for i, g in enumerate(names[counts > 1][:rows]):
        out[i, group == g] = 1.0 / (group == g).sum()
    return out


def unique_rows(codes: Codes, seen: Codes | None = None) -> NDArray[np.int64]:
    """Positions of the first of equal rows, without those that are in ``seen``, in order."""
    key = (codes * _primes(codes.shape[1])).sum(1)
    _, first = np.unique(key, return_index=True)
    if seen is not None:
        first = first[~np.isin(key[first], (seen * _primes(codes.shape[1])).sum(1))]
    return np.sort(first)


@cache
def _primes(d: int) -> NDArray[np.int64]:
    return np.random.default_rng(5).integers(1, 2 ** 40, size=d) | 1


def candidates(task: Task, codes: Codes, y: Array, rng: Rng, n: int) -> Codes:
    """New encoders as a search looks at them: random ones, neighbours and crossovers of the best so far."""
    best = codes[np.argsort(-y)[: max(2, min(10, len(y)))]]
    a = best[rng.integers(len(best), size=n // 2)]
    near = task.mutate(a, rng)
    twice = rng.random(len(near)) < 0.35
    near[twice] = task.mutate(near[twice], rng)
    mixed = task.crossover(best[rng.integers(len(best), size=n // 6)], best[rng.integers(len(best), size=n // 6)], rng)
    pool = np.concatenate([task.sample(rng, n), near, mixed])
    keep = unique_rows(pool, codes)
    return pool[rng.permutation(keep)[:n]]


def simulate(task: Task, rng: Rng, n: int, kind: str) -> tuple[Codes, Array, Array]:
    """A history of n encoders: codes, scores with noise, and the noise of each.

    Args:
        task: what is searched.
        rng: random numbers.
        n: length.
        kind: ``random``, ``evolution``, ``gp``, or ``mixed``, which begins at random.
    """
    start = n if kind == "random" else max(3, min(n, int(rng.integers(3, max(4, n // 2 + 1)))))
    codes = task.sample(rng, 3 * start)
    codes = codes[unique_rows(codes)]
    codes = codes[rng.permutation(len(codes))[:start]]
    luck = task.noise * rng.normal(size=len(codes))
    y = task.score(codes) + luck
    rounds = 0
    while len(codes) < n and rounds < 60 and kind != "random":
        rounds += 1
        step = min(n - len(codes), max(1, n // 6))
        if kind == "evolution" or (kind == "mixed" and rng.random() < 0.6):
            alive = np.arange(max(0, len(codes) - 10), len(codes))
            drawn = alive[rng.integers(len(alive), size=(2 * step, 3))]
            new = task.mutate(codes[drawn[np.arange(2 * step), y[drawn].argmax(1)]], rng)
        else:
            new = candidates(task, codes, y, rng, 120)
            if len(new):
                new = new[_gp_order(codes, y, new, rng)]
        keep = unique_rows(new, codes)[:step] if len(new) else np.zeros(0, int)
        if not len(keep):
            new, keep = task.sample(rng, step), np.arange(step)
        e = task.noise * rng.normal(size=len(keep))
        codes, y = np.concatenate([codes, new[keep]]), np.concatenate([y, task.score(new[keep]) + e])
        luck = np.concatenate([luck, e])
    short = n - len(codes)
    if short > 0:  # a small space: some are measured again
        again = rng.integers(len(codes), size=short)
        e = task.noise * rng.normal(size=short)
        codes, y = np.concatenate([codes, codes[again]]), np.concatenate([y, task.score(codes[again]) + e])
        luck = np.concatenate([luck, e])
    return codes, y, luck


def _gp_order(codes: Codes, y: Array, pool: Codes, rng: Rng) -> NDArray[np.int64]:
    """The pool by the upper bound of a plain Gaussian process, best first."""
    rate = 2.0 / np.sqrt(codes.shape[1])

    def kernel(a: Codes, b: Codes) -> Array:
        return np.asarray(np.exp(-rate * (a[:, None] != b[None]).sum(2)))

    z = normal_scores(y)
    factor = cho_factor(kernel(codes, codes) + 0.1 * np.eye(len(codes)), lower=True)
    cross = kernel(codes, pool)
    mean = cross.T @ cho_solve(factor, z)
    var = 1 - (cross * cho_solve(factor, cross)).sum(0)
    return np.asarray(np.argsort(-(mean + rng.choice([0.3, 1.0]) * np.sqrt(np.maximum(var, 0)))))


@dataclass
class Episode:
    """A task and what has been measured of it."""

    task: Task
    codes: Codes
    y: Array
    luck: Array

    def add(self, codes: Codes, rng: Rng) -> None:
        """Measures more."""
        e = self.task.noise * rng.normal(size=len(codes))
        self.codes = np.concatenate([self.codes, codes])
        self.y, self.luck = np.concatenate([self.y, self.task.score(codes) + e]), np.concatenate([self.luck, e])


def draw_shapes(rng: Rng, number: int, prune: bool = True) -> list[Shape]:
    """Spaces with equally many decisions, and options at most."""
    d = int(rng.choice([3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 18, 24], p=[
        .03, .06, .1, .17, .08, .15, .11, .09, .08, .06, .05, .02]))
    o = int(rng.choice([2, 3, 4, 5, 6, 8, 10], p=[.1, .28, .27, .15, .1, .07, .03]))
    while o ** d < 200:
        d += 1
    return [make_shape(rng, d, o, prune=prune) for _ in range(number)]


def to_batch(episodes: list[Episode], queries: list[Codes], rng: Rng, target: bool = True) -> Batch:
    """Episodes with equally long histories and equally many candidates, as tensors."""
    n, channels = len(episodes[0].codes), len(episodes[0].task.channels)
    width = max(e.task.shape.width for e in episodes)
    z, goal, measured = [], [], np.zeros((len(episodes), n, channels))
    present = np.ones((len(episodes), n, channels))
    for b, (e, q) in enumerate(zip(episodes, queries, strict=True)):
        scale = Scale(e.y)
        z.append(scale.z)
        goal.append(scale(e.task.score(q)) if target else np.zeros(0))
        for c, channel in enumerate(e.task.channels):
            at = np.random.default_rng([b, c, 7])  # the same noise each time an episode is looked at
            own = at.normal(size=n)
            raw = channel.function(e.codes) + channel.share * e.luck + channel.noise * own
            there = np.ones(n, bool) if at.random() < 0.8 else at.random(n) < at.uniform(0.3, 1.0)
            if there.sum() > 1:
                measured[b, there, c] = normal_scores(raw[there])
            present[b, :, c] = there
    rows = max(1, max(int((np.unique(e.task.shape.group, return_counts=True)[1] > 1).sum()) for e in episodes))

    def tensor(a: object) -> torch.Tensor:
        return torch.as_tensor(np.asarray(a), dtype=torch.float32)

    return Batch(torch.as_tensor(np.stack([e.codes for e in episodes])), torch.as_tensor(np.stack(queries)), width,
                 tensor([membership(e.task.shape.group, rows) for e in episodes]), tensor(z), tensor(measured),
                 tensor(present), torch.as_tensor(np.stack([e.task.shape.sizes for e in episodes])), tensor(goal))


def draw_episodes(rng: Rng, number: int, n: int, families: tuple[str, ...] | None = None,
                  channels: int | None = None, prune: bool = True) -> list[Episode]:
    """Tasks of one shape with histories of n encoders."""
    if channels is None:
        channels = 0 if rng.random() < 0.55 else int(rng.integers(1, 7))
    out = []
    for shape in draw_shapes(rng, number, prune):
        task = make_task(rng, shape, channels, *((families,) if families else ()))
        kind = str(rng.choice(["random", "evolution", "gp", "mixed"], p=[0.3, 0.25, 0.2, 0.25]))
        out.append(Episode(task, *simulate(task, rng, n, kind)))
    return out


def draw_queries(e: Episode, rng: Rng, q: int) -> Codes:
    """Candidates of an episode, a few of the history's own among them, whose true score is to be told."""
    own = max(1, q // 12)
    new = candidates(e.task, e.codes, e.y, rng, q - own)
    fill = q - len(new)
    weights = np.exp(Scale(e.y).z)
    again = e.codes[rng.choice(len(e.codes), size=fill, p=weights / weights.sum())]
    return np.concatenate([new, again])
