"""Synthetic search spaces with scores: all that the ranker is trained on.

A :class:`Task` is a space of decisions (some conditional, some sharing their options, some pruned away as in
LM-Searcher, 2509.05657, section 3.2), a hidden score, the noise of a measurement, and channels that are measured along
with it. Scores are sums of functions from :data:`FAMILIES`, each of which stands for a way in which architectures get
good or bad. No measured table is among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Codes = NDArray[np.int64]
Function = Callable[[Codes], Array]
Rng = np.random.Generator


@dataclass(frozen=True)
class Shape:
    """Decisions of a task.

    Attributes:
        sizes: (D,), options per decision. The code of a decision that is not asked is its size.
        group: (D,), decisions with one number share their options.
        parent: (D,), the earlier decision that one depends on, or -1.
        on: (D, O), options of the parent under which it is asked.
        allowed: (D, O), options that pruning has left.
    """

    sizes: NDArray[np.int64]
    group: NDArray[np.int64]
    parent: NDArray[np.int64]
    on: NDArray[np.bool_]
    allowed: NDArray[np.bool_]

    @property
    def width(self) -> int:
        """Columns of a table by option, the one for "not asked" included."""
        return int(self.sizes.max()) + 1


@dataclass(frozen=True)
class Channel:
    """Something measured along with the score: ``function`` of the code, plus ``share`` times the score's own noise,
    plus noise of its own with the standard deviation ``noise``."""

    function: Function
    share: float
    noise: float


@dataclass(frozen=True)
class Task:
    """A space with a hidden score of about unit variance.

    Attributes:
        shape: the space.
        score: the score without noise, by code.
        noise: standard deviation of one measurement.
        channels: what is measured along with it.
    """

    shape: Shape
    score: Function
    noise: float
    channels: tuple[Channel, ...] = ()

    def sample(self, rng: Rng, n: int) -> Codes:
        """(n, D) random codes."""
        s = self.shape
        codes = np.empty((n, len(s.sizes)), dtype=np.int64)
        for d in range(len(s.sizes)):
            options = np.flatnonzero(s.allowed[d])
            codes[:, d] = options[rng.integers(len(options), size=n)]
        return self._settle(codes, rng)

    def mutate(self, codes: Codes, rng: Rng) -> Codes:
        """(n, D): each code with one decision changed."""
        s, n = self.shape, len(codes)
        out = codes.copy()
        free = (s.allowed.sum(1) > 1)[None] & (codes < s.sizes)
        keys = np.where(free, rng.random(codes.shape), -1.0)
        which = keys.argmax(1)
        draw = rng.random((n, s.allowed.shape[1]))
        draw[~s.allowed[which]] = -1.0
        rows = np.arange(n)
        old = codes[rows, which]
        ok = free.any(1)
        draw[rows[ok], old[ok]] = -1.0
        out[rows[ok], which[ok]] = draw.argmax(1)[ok]
        return self._settle(out, rng)

    def crossover(self, a: Codes, b: Codes, rng: Rng) -> Codes:
        """(n, D): each decision from one of two parents."""
        return self._settle(np.where(rng.random(a.shape) < 0.5, a, b), rng)

    def _settle(self, codes: Codes, rng: Rng) -> Codes:
        """Draws decisions that have become asked, drops those that are not asked any more."""
        s = self.shape
        for d in np.flatnonzero(s.parent >= 0):
            p = s.parent[d]
            above = codes[:, p]
            asked = (above < s.sizes[p]) & s.on[d][np.minimum(above, s.on.shape[1] - 1)]
            options = np.flatnonzero(s.allowed[d])
            new = asked & (codes[:, d] == s.sizes[d])
            codes[new, d] = options[rng.integers(len(options), size=int(new.sum()))]
            codes[~asked, d] = s.sizes[d]
        return codes


def make_shape(rng: Rng, decisions: int, options: int, *, prune: bool = True) -> Shape:
    """A space of so many decisions with at most so many options."""
    d, o = decisions, options
    sizes = np.full(d, o) if rng.random() < 0.5 else rng.integers(2, o + 1, size=d)
    group = np.arange(d)
    kind = rng.random()
    if kind < 0.45:  # all alike
        sizes[:] = o
        group[:] = 0
    elif kind < 0.7 and d >= 4:  # some alike
        names = rng.integers(0, max(2, d // 3), size=d)
        for g in np.unique(names):
            members = np.flatnonzero(names == g)
            if len(members) > 1 and rng.random() < 0.7:
                sizes[members], group[members] = sizes[members[0]], members[0]
    parent, on = np.full(d, -1), np.zeros((d, o), bool)
    if rng.random() < 0.25 and d >= 4:
        for i in range(1, d):
            if rng.random() < 0.5:
                parent[i] = rng.integers(0, i) if rng.random() < 0.5 else max(0, i - int(rng.integers(1, 4)))
                on[i, : sizes[parent[i]]] = rng.random(sizes[parent[i]]) < rng.choice([0.3, 0.6, 0.8])
                if not on[i].any():
                    on[i, rng.integers(sizes[parent[i]])] = True
    allowed = np.arange(o)[None] < sizes[:, None]
    if prune and rng.random() < 0.25:
        whole = allowed.copy()
        for i in range(d):
            keep = rng.random(o) < 0.5
            if rng.random() < 0.5:
                keep[:] = False
            if not (keep & whole[i]).any():
                keep[rng.integers(sizes[i])] = True
            allowed[i] &= keep
        if np.prod(allowed.sum(1).astype(float)) < 60:
            allowed = whole
    return Shape(sizes, group, parent, on, allowed)


def _importance(rng: Rng, d: int) -> Array:
    """How much each decision counts; some not at all."""
    w = np.exp(rng.normal(0, rng.choice([0.2, 0.7, 1.4]), size=d))
    if rng.random() < 0.3:  # grows or falls along the decisions
        w *= np.linspace(1, rng.choice([0.2, 5.0]), d)
    if rng.random() < 0.35 and d > 3:
        w *= rng.random(d) < rng.uniform(0.4, 0.9)
    return w if w.any() else np.ones(d)


def _effects(rng: Rng, s: Shape, columns: int = 1) -> Array:
    """(D, width, columns): effects of options, alike where decisions share their options."""
    own = rng.normal(size=(len(s.sizes), s.width, columns))
    shared = rng.normal(size=(len(s.sizes), s.width, columns))[s.group]
    alike = rng.choice([0.0, 0.7, 0.9, 1.0], p=[0.15, 0.3, 0.3, 0.25])
    out: Array = alike * shared + np.sqrt(1 - alike ** 2) * own
    if rng.random() < 0.3:
        out = np.sign(out) * np.abs(out) ** 2
    return out


def _look_up(table: Array, codes: Codes) -> Array:
    """(n, D, ...): entries of a table (D, width, ...)."""
    return np.asarray(table[np.arange(table.shape[0]), codes])


def additive(rng: Rng, s: Shape) -> Function:
    """Each decision adds its effect."""
    table = _effects(rng, s)[..., 0] * _importance(rng, len(s.sizes))[:, None]
    return lambda codes: _look_up(table, codes).sum(1)


def pairs(rng: Rng, s: Shape) -> Function:
    """Pairs of decisions add effects: neighbours or any, with a table for each or one for all."""
    d = len(s.sizes)
    base = additive(rng, s)
    near = rng.random() < 0.5
    number = int(rng.integers(1, 2 * d + 1))
    a = rng.integers(0, d, size=number) if not near else np.arange(d - 1)
    b = (a + 1 + rng.integers(0, max(1, d - 1), size=len(a))) % d if not near else a + 1
    tables = rng.normal(size=(len(a), s.width, s.width))
    if (s.group == 0).all() and rng.random() < 0.7:
        tables[:] = tables[0] if len(tables) else 0.0
    weight = np.exp(rng.normal(0, 0.7, size=len(a)))[:, None, None]
    tables = tables * weight
    mix = rng.uniform(0.0, 0.8) / max(1.0, np.sqrt(d))
    index = np.arange(len(a))
    return lambda codes: mix * base(codes) + tables[index, codes[:, a], codes[:, b]].sum(1) / np.sqrt(max(1, len(a)))


def counts(rng: Rng, s: Shape) -> Function:
    """How often each option occurs: a target, or a saturating return."""
    member = s.group == np.bincount(s.group).argmax()
    weight = member * (1.0 if rng.random() < 0.5 else np.exp(rng.normal(0, 0.3, size=len(s.sizes))))
    size = int(s.sizes[np.flatnonzero(member)[0]])
    target = rng.dirichlet(np.ones(size))
    power, rate = rng.choice([1.0, 2.0]), rng.uniform(1, 6)
    gain = rng.normal(size=size)
    saturating = rng.random() < 0.5

    def f(codes: Codes) -> Array:
        share = np.stack([((codes == o) * weight).sum(1) for o in range(size)], 1) / weight.sum()
        if saturating:
            return np.asarray((gain * (1 - np.exp(-rate * share))).sum(1))
        return np.asarray(-(np.abs(share - target) ** power * np.abs(gain)).sum(1))

    return f


def stages(rng: Rng, s: Shape) -> Function:
    """A chain of layers in stages: each option has a capacity (one may be an identity without any), capacities of a
    stage add up with falling returns, and the weakest stage counts most."""
    d = len(s.sizes)
    capacity = np.abs(_effects(rng, s)[..., 0])
    if rng.random() < 0.6:
        capacity[np.arange(d), _of_group(rng, s)] = 0.0
    number = int(rng.integers(1, min(5, d) + 1))
    stage = np.sort(rng.integers(0, number, size=d))
    weight = np.exp(rng.normal(0, 0.4, size=d))
    soft, rate = rng.uniform(0.1, 1.0), rng.uniform(0.3, 1.5)
    cost = rng.choice([0.0, 0.0, 0.05, 0.15])

    def f(codes: Codes) -> Array:
        c = _look_up(capacity, codes) * weight
        parts = np.stack([1 - np.exp(-rate * c[:, stage == g].sum(1)) for g in np.unique(stage)], 1)
        return np.asarray(np.log(soft + parts).mean(1) - cost * c.sum(1))

    return f


def _of_group(rng: Rng, s: Shape) -> NDArray[np.int64]:
    """(D,): an option of every decision, the same one where decisions share their options."""
    return np.asarray((rng.random(len(s.sizes))[s.group] * s.sizes).astype(np.int64))


def cell(rng: Rng, s: Shape) -> Function:
    """A graph of nodes with an operation on every edge: one may be zero, one the identity, the others transform a small
    state. What reaches the last node, along whichever paths are left, makes the score."""
    d = len(s.sizes)
    nodes = 2
    while nodes * (nodes - 1) // 2 < d:
        nodes += 1
    edges = [(i, j) for j in range(1, nodes) for i in range(j)]
    pick = np.sort(rng.permutation(len(edges))[:d])
    edges = [edges[i] for i in pick]
    edges = [edges[i] for i in rng.permutation(d)] if rng.random() < 0.2 else edges
    k = 3
    op = np.repeat(rng.normal(0, 0.6, size=(1, s.width, k, k)), d, 0) + 0.15 * rng.normal(size=(d, s.width, k, k))
    op += rng.uniform(0.0, 1.0, size=(1, s.width, 1, 1)) * np.eye(k)
    names = rng.permutation(s.width - 1)
    if rng.random() < 0.8:
        op[:, names[0]] = 0.0
    if rng.random() < 0.7 and len(names) > 1:
        op[:, names[1]] = np.eye(k)
    op[:, -1] = 0.0
    start, read = rng.normal(size=k), rng.normal(size=k)
    bonus = additive(rng, s) if rng.random() < 0.7 else None
    mix = rng.uniform(0.1, 0.6)
    squash = rng.random() < 0.6
    deaf = rng.random() < 0.5

    def f(codes: Codes) -> Array:
        value = [np.repeat(start[None], len(codes), 0)] + [np.zeros((len(codes), k)) for _ in range(nodes - 1)]
        order = sorted(range(d), key=lambda e: edges[e][1])
        for e in order:
            i, j = edges[e]
            source = np.tanh(value[i]) if squash else value[i]
            value[j] = value[j] + np.einsum("nkl,nl->nk", op[e][codes[:, e]], source)
        last = value[-1]
        out = np.tanh(last) @ read if not deaf else np.log(0.05 + (last ** 2).sum(1))
        return np.asarray(out + (mix * bonus(codes) / np.sqrt(d) if bonus is not None else 0.0))

    return f


def boxes(rng: Rng, s: Shape) -> Function:
    """Many small rules: an amount is added where some decisions take certain options, as in a forest of small trees."""
    d = len(s.sizes)
    k = int(rng.integers(8, 40))
    amount = rng.normal(size=k)
    size = np.minimum(rng.integers(1, 5, size=k), d)
    importance = _importance(rng, d)
    which, where = [], []
    for i in range(k):
        p = (importance + 1e-3) / (importance + 1e-3).sum()
        which.append(rng.choice(d, size[i], replace=False, p=p))
        where.append(rng.random((size[i], s.width)) < 0.5)

    def f(codes: Codes) -> Array:
        out = np.zeros(len(codes))
        for a, ds, m in zip(amount, which, where, strict=True):
            inside = m[np.arange(len(ds)), codes[:, ds]].all(1)
            out += a * inside
        return out

    return f


def network(rng: Rng, s: Shape) -> Function:
    """A random network of one hidden layer on embeddings of the options."""
    hidden = int(rng.choice([6, 16, 32]))
    table = _effects(rng, s, hidden) * _importance(rng, len(s.sizes))[:, None, None]
    table /= np.sqrt((table ** 2).mean(1).sum(0).mean() + 1e-9)
    gain, bias, out = rng.uniform(0.3, 2.5), rng.normal(size=hidden), rng.normal(size=hidden)
    return lambda codes: np.tanh(gain * _look_up(table, codes).sum(1) + bias) @ out


def ordinal(rng: Rng, s: Shape) -> Function:
    """Options on a hidden scale, with an optimum for each decision or along a weighted sum of them."""
    d = len(s.sizes)
    place = np.full((d, s.width), 0.5)
    for i in range(d):
        place[i, : s.sizes[i]] = np.argsort(rng.random(s.sizes[i])) / max(1, s.sizes[i] - 1)
    place = place[s.group]
    weight, best = _importance(rng, d), rng.random(d)
    power = rng.choice([1.0, 2.0])
    if rng.random() < 0.5:
        table = -np.abs(place - best[:, None]) ** power * weight[:, None]
        return lambda codes: _look_up(table, codes).sum(1)
    sign = rng.normal(size=(2, d)) * weight
    target = rng.normal(0, 0.7, size=2)
    scale = np.sqrt((sign ** 2).sum(1) / 12 + 1e-9)
    return lambda codes: -np.abs((_look_up(place, codes) - 0.5) @ sign.T / scale - target).sum(1)


def bottleneck(rng: Rng, s: Shape) -> Function:
    """The worse of several parts, each on decisions of its own, counts most."""
    d = len(s.sizes)
    number = int(rng.integers(2, min(4, d) + 1))
    part = rng.integers(0, number, size=d)
    table = _effects(rng, s)[..., 0] * _importance(rng, d)[:, None]
    hard = rng.uniform(0.5, 4)

    def f(codes: Codes) -> Array:
        e = _look_up(table, codes)
        sums = np.stack([e[:, part == g].sum(1) for g in range(number)], 1)
        return np.asarray(-np.log(np.exp(-np.clip(hard * sums, -40, 40)).sum(1)) / hard)

    return f


FAMILIES: Mapping[str, Callable[[Rng, Shape], Function]] = {
    "additive": additive, "pairs": pairs, "counts": counts, "stages": stages, "cell": cell, "boxes": boxes,
    "network": network, "ordinal": ordinal, "bottleneck": bottleneck}

_WEIGHTS = {"additive": 1.0, "pairs": 1.2, "counts": 0.8, "stages": 1.6, "cell": 2.2, "boxes": 1.0, "network": 1.6,
            "ordinal": 1.0, "bottleneck": 0.8}


def _standard(f: Function, probe: Codes) -> Function:
    y = f(probe)
    mean, sd = float(y.mean()), float(y.std()) + 1e-9
    return lambda codes: (f(codes) - mean) / sd


def _warp(rng: Rng) -> Callable[[Array], Array]:
    """A monotone change of the scale of scores."""
    kind, a = rng.random(), rng.uniform(0.3, 1.2)
    if kind < 0.4:
        return lambda y: y
    if kind < 0.7:  # accuracies: many good ones, a few terrible ones
        return lambda y: -np.exp(-a * np.clip(y, -6, 6))
    if kind < 0.85:
        return lambda y: np.exp(a * np.clip(y, -6, 6))
    return lambda y: y + a * np.maximum(0, y - 1) ** 2


def make_task(rng: Rng, shape: Shape, channels: int = 0, families: tuple[str, ...] = tuple(FAMILIES)) -> Task:
    """A task on a space, with so many channels."""
    blank = Task(shape, lambda codes: np.zeros(len(codes)), 0.0)
    probe = blank.sample(rng, 256)
    p = np.array([_WEIGHTS[f] for f in families])
    d = len(shape.sizes)

    def draw() -> Function:
        return _standard(FAMILIES[families[int(rng.choice(len(families), p=p / p.sum()))]](rng, shape), probe)

    number = int(rng.choice([1, 2, 3], p=[0.55, 0.3, 0.15]))
    parts = [draw() for _ in range(number)]
    if "counts" in families and (shape.group == 0).all() and rng.random() < 0.4:
        parts.append(_standard(counts(rng, shape), probe))
    subsets: list[Function] = []
    if channels and d >= 4 and rng.random() < 0.6:  # parts that depend on some decisions only, and can be probed
        for _ in range(int(rng.integers(1, 4))):
            fixed = rng.random(d) < rng.uniform(0.3, 0.8)
            subsets.append(_standard(_fixed(draw(), fixed, probe[0]), probe))
    weights = rng.dirichlet(np.full(len(parts) + len(subsets), 1.5))
    every = [*parts, *subsets]
    total = _standard(lambda codes: np.asarray(sum(w * f(codes) for w, f in zip(weights, every, strict=True))), probe)
    if rng.random() < 0.25:  # options that ruin everything
        ruin = np.zeros((d, shape.width))
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(d))
            option = int(rng.integers(shape.sizes[at]))
            same = (shape.group == shape.group[at]) if rng.random() < 0.3 else np.arange(d) == at
            ruin[same, option] = rng.uniform(1, 4)
        healthy = total
        total = _standard(lambda codes: healthy(codes) - _look_up(ruin, codes).max(1), probe)
    warp = _warp(rng)
    score = _standard(lambda codes: warp(total(codes)), probe)
    noise = 0.0 if rng.random() < 0.4 else float(np.exp(rng.uniform(np.log(0.02), np.log(0.7))))
    made = []
    for _ in range(channels):
        kind = rng.random()
        if kind < 0.3:  # a lower fidelity: the score, something else, and the run's own luck
            a, other = rng.uniform(0.2, 1.0), draw()
            f: Function = _mix(total, other, a)
            made.append(Channel(f, float(rng.uniform(0, 1)), float(rng.uniform(0.05, 1.0))))
        elif kind < 0.6 and subsets:
            made.append(Channel(subsets[int(rng.integers(len(subsets)))], 0.0, float(rng.uniform(0.02, 0.8))))
        elif kind < 0.7:  # the run's luck alone, or next to the true score: tells a lucky run from a good encoder
            made.append(Channel(total, float(rng.uniform(0, 0.5)), float(rng.uniform(0.05, 0.5))))
        elif kind < 0.85:  # useless, though a function of the encoder: a cost, say
            made.append(Channel(draw(), 0.0, float(rng.uniform(0, 0.3))))
        else:
            made.append(Channel(lambda codes: np.zeros(len(codes)), 0.0, 1.0))
    return Task(shape, score, noise, tuple(made))


def _mix(a: Function, b: Function, share: float) -> Function:
    return lambda codes: share * a(codes) + (1 - share) * b(codes)


def _fixed(f: Function, fixed: NDArray[np.bool_], values: Codes) -> Function:
    return lambda codes: f(np.where(fixed, values, codes))
