"""The ranker: a small in-context network that predicts how good encoders are from those evaluated so far."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from lacer.envs import LacerError
from lacer.search.designers.base import Designer, fresh_sample, random_start, register_designer
from lacer.search.designers.bo import Coder, normal_scores
from lacer.search.space import Point, SearchSpace
from lacer.search.study import Proposal, Study, Trial

if TYPE_CHECKING:
    import torch

    from lacer.search.ranker.model import Prediction, Ranker, Reading

Array = NDArray[np.float64]

HISTORY = 128
"""Trials that the network reads; of longer histories the best half, the latest quarter and some of the others."""
POOL = 512
"""Candidates in spaces that are too large to be looked at as a whole."""
FINALS = 192
"""Of the candidates so many are scored by the whole network: those that its Gaussian process puts first."""
CHANNELS = 8
"""Measurements beside the score that it reads, at most."""
OWN = 12
"""The best of the history, whose true scores are predicted too: the bar to improve upon."""

WIDER = 1.15
"""What is told of a prediction is wider than the network has it by this factor: real tables differ more from the
synthetic tasks than these from each other. Chosen on two tables, ARLBench and TransNAS-Bench-101's macro space, whose
true scores lie within the 80 % intervals in 73 and 75 % of the cases, with the factor in 79 and 81 %. Proposals do not
depend on it."""

Acquisition = Literal["improvement", "top", "quantile", "thompson"]


@register_designer
class RankerDesigner(Designer):
    """in-context network: trained on synthetic searches, it predicts every candidate from the history

    The idea of LM-Searcher (2509.05657), to name the best of many candidates given the history, with a small network in
    place of a language model: a prior-data fitted network (Müller et al. 2022, 2112.10510; for Bayesian optimisation
    2023, 2305.17535). The network reads the kernel of a Gaussian process off the history, which is then fitted to it
    (as pre-trained Gaussian processes are: Wang et al. 2021, 2109.08215), and a Transformer gives the predictions their
    form. It knows decisions and options by what the history tells about them alone, reads probes, learning
    curves and costs of the evaluated encoders where there are some, and predicts a distribution of the score for each
    candidate. Of a pool (the whole space where it has at most 20,000 encoders; else random ones,
    neighbours and crossovers of the best) the most promising is proposed. The weights come with the package, see
    ``search/ranker/MODEL_CARD.md``. Running trials, and the others of a batch, count with their predicted score, failed
    ones with the worst.

    Args:
        seed: seed of start, pool and ties.
        start: random encoders at first, the first candidate included.
        acquisition: what the most promising candidate has most of: expected ``improvement`` on the best one, the odds
            of being the ``top`` of the pool, the upper ``quantile`` (0.9) of its score, or a score drawn at random
            (``thompson``).
        channels: whether to read probes, learning curves and costs of the evaluated encoders.
        weights: a file of weights in place of the shipped ones, as ``lacer ranker train`` writes it.

    Raises:
        LacerError: ``start`` below 1, weights that cannot be read or do not fit.
    """

    name: ClassVar[str] = "ranker"
    paper: ClassVar[str] = "after LM-Searcher, 2509.05657; PFNs, Müller et al. 2022, 2112.10510"

    def __init__(self, seed: int = 0, start: int = 4, acquisition: Acquisition = "improvement", channels: bool = True,
                 weights: str | None = None) -> None:
        super().__init__(seed)
        if start < 1:
            raise LacerError(f"ranker: start must be at least 1, not {start}")
        self.start, self.acquisition, self.channels, self.weights = start, acquisition, channels, weights
        self._coder: Coder | None = None
        self._free: NDArray[np.int64] = np.arange(1)
        self._codes: dict[str, NDArray[np.int64]] = {}  # of trials by NCode, so that each is encoded once
        self._network: Ranker | None = None

    @property
    def network(self) -> Ranker:
        """The network, read when it is needed first."""
        if self._network is None:
            from pathlib import Path

            from lacer.search.ranker.weights import load, shipped

            self._network = shipped() if self.weights is None else load(Path(self.weights))
        return self._network

    def check_space(self, space: SearchSpace) -> None:
        """Any space will do; reads the weights, so that nothing is trained if they cannot be read."""
        assert self.network

    def propose(self, study: Study, n: int) -> list[Proposal]:
        rng = self.rng(study)
        out = random_start(study, n, self.start, rng, self.name)
        if len(out) < n:
            with _one_thread():
                self._rank(study, out, n, rng)
        return out

    def _rank(self, study: Study, out: list[Proposal], n: int, rng: np.random.Generator) -> None:
        """Fills ``out`` up to ``n`` with the most promising candidates."""
        import torch

        coder, codes, z, others, waiting = self._history(study, rng)
        best = codes[np.argsort(-z, kind="stable")[:OWN]]
        pool = self._pool(study, out, rng)
        pending = coder.encode([*waiting, *(p.point for p in out if p.point is not None)])
        with torch.inference_mode():
            reading = self._read(coder, codes, z, others)
            for i in range(0, len(pending), 8):  # what is not known yet counts with its predicted score
                guess = self._predict(reading, pending[i:i + 8]).expected()[0].numpy().astype(float)
                codes, z = np.concatenate([codes, pending[i:i + 8]]), np.concatenate([z, guess])
                others = np.concatenate([others, np.full((len(guess), others.shape[1]), np.nan)])
                reading = self._read(coder, codes, z, others)
            while len(out) < n:
                if not len(pool):
                    out.append(Proposal(fresh_sample(study, out, rng), self.name, "every encoder has been tried"))
                    continue
                index = self._shortlist(reading, pool)
                p = self._predict(reading, np.concatenate([pool[index], best]))
                gain = self._gain(p, len(index), rng)
                mean, deviation = (v[0].numpy().astype(float) for v in (p.expected(), p.spread()))
                at = int(rng.choice(np.flatnonzero(gain == gain.max())))
                point = self._point(coder, pool[index[at]])
                out.append(Proposal(
                    point, self.name, f"{self.acquisition} {gain[at]:.3g}: predicted {mean[at]:.2f} +- "
                    f"{WIDER * deviation[at]:.2f} on the normal scale of scores so far",
                    meta={"predicted": [round(float(mean[at]), 4), round(float(WIDER * deviation[at]), 4)]}))
                if len(out) < n:
                    codes, z = np.concatenate([codes, pool[index[at]][None]]), np.append(z, mean[at])
                    others = np.concatenate([others, np.full((1, others.shape[1]), np.nan)])
                    reading = self._read(coder, codes, z, others)
                    pool = np.delete(pool, index[at], 0)

    def predict(self, study: Study, points: Sequence[Point]) -> Prediction:
        """What the network expects of some points, given the finished trials (two at least): distributions on the scale
        of the history's normal scores (:class:`lacer.search.ranker.histories.Scale`), one row of them."""
        import torch

        with _one_thread(), torch.inference_mode():
            coder, codes, z, others, _ = self._history(study, self.rng(study))
            return self._predict(self._read(coder, codes, z, others), coder.encode(list(points))).wider(WIDER)

    def _history(self, study: Study, rng: np.random.Generator) -> tuple[
            Coder, NDArray[np.int64], Array, Array, list[Point]]:
        """The trials to read: codes (n, D), normal scores (n,), other measurements (n, C); and the points that run."""
        if self._coder is None or self._coder.space is not study.space:
            self._coder = Coder(study.space)
            free = np.flatnonzero(self._coder.sizes > 2)  # one option says nothing that its condition does not say
            self._free = free if len(free) else np.arange(1)
            self._codes = {}
        known = [t for t in study.trials if t.status != "rejected" and t.proposal.point is not None]
        done = [t for t in known if t.status != "running"]
        sign = study.objective.signed
        scores = [None if t.objective is None else sign(t.objective) for t in done]
        worst = min(s for s in scores if s is not None)
        y = np.array([worst if s is None else s for s in scores])
        kept = digest(y, rng)
        codes = np.stack([self._code(done[i]) for i in kept])
        z = normal_scores(y[kept])
        others = measurements([done[i] for i in kept], z) if self.channels else np.zeros((len(kept), 0))
        running = [t.proposal.point for t in known if t.status == "running" and t.proposal.point is not None]
        return self._coder, codes, z, others, running[-64:]

    @staticmethod
    def _point(coder: Coder, code: NDArray[np.int64]) -> Point:
        return {d.name: d.options[int(c)] for d, c in zip(coder.space.decisions, code, strict=True)
                if c < len(d.options)}

    def _gain(self, p: Prediction, n: int, rng: np.random.Generator) -> Array:
        """How promising the first n of the candidates are; the others are the best of the history."""
        if self.acquisition == "top":
            return p.top[0, :n].numpy().astype(float)
        if self.acquisition == "quantile":
            return (p.expected() + 1.28 * p.spread())[0, :n].numpy().astype(float)
        if self.acquisition == "thompson":
            weight = p.weight[0, :n].numpy().astype(float)
            part = (weight.cumsum(1) / weight.sum(1, keepdims=True) < rng.random((n, 1))).sum(1)
            part = part.clip(max=weight.shape[1] - 1)
            rows = np.arange(n)
            return np.asarray(p.mean[0, :n].numpy()[rows, part]
                              + p.deviation[0, :n].numpy()[rows, part] * rng.normal(size=n), dtype=float)
        gain = p.improvement(p.expected()[:, n:].amax(1, keepdim=True)) + 1e-6 * (p.expected() + p.spread())
        return gain[0, :n].numpy().astype(float)  # the second part tells those without hope of improvement apart

    def _read(self, coder: Coder, codes: NDArray[np.int64], z: Array, others: Array) -> Reading:
        import torch

        from lacer.search.ranker.histories import Batch

        def tensor(a: Array) -> torch.Tensor:
            return torch.as_tensor(a, dtype=torch.float32)[None]

        sizes = (coder.sizes - 1)[self._free]
        member = np.zeros((max(1, len(coder.shared)), len(coder.sizes)))
        for i, g in enumerate(coder.shared):
            member[i, g] = 1 / len(g)
        there = np.isfinite(others)
        return self.network.read(Batch(
            torch.as_tensor(codes[:, self._free])[None], torch.zeros(1, 0, len(sizes), dtype=torch.long),
            int(coder.sizes.max()), tensor(member[:, self._free]), tensor(z), tensor(np.where(there, others, 0.0)),
            tensor(there.astype(float)), torch.as_tensor(sizes)[None], torch.zeros(1, 0)))

    def _predict(self, reading: Reading, codes: NDArray[np.int64]) -> Prediction:
        import torch

        return self.network.predict(reading, torch.as_tensor(codes[:, self._free])[None])

    def _shortlist(self, reading: Reading, pool: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions of those that the Gaussian process finds most promising."""
        import torch

        if len(pool) <= FINALS:
            return np.arange(len(pool))
        bound = []
        for part in torch.as_tensor(pool[:, self._free]).split(4096):
            mean, deviation = self.network.plain(reading, part[None])
            bound.append((mean + 1.5 * deviation)[0])
        return np.argsort(-torch.cat(bound).numpy(), kind="stable")[:FINALS]

    def _pool(self, study: Study, batch: Sequence[Proposal], rng: np.random.Generator) -> NDArray[np.int64]:
        """Codes of new encoders: all of a small space, else random ones, neighbours and crossovers of the best."""
        assert self._coder is not None
        space, coder = study.space, self._coder
        if coder.points:
            proposed = {space.to_ncode(p.point) for p in batch if p.point is not None}
            free = np.ones(len(coder.points), bool)
            free[[coder.row[c] for t in study.trials if (c := t.ncode) in coder.row]] = False
            free[[coder.row[c] for c in proposed]] = False
            return coder.codes[free]
        sign = study.objective.signed
        best = [p for t in sorted(study.finished, key=lambda t: -sign(t.objective or 0.0))[:12]
                if (p := t.proposal.point) is not None]
        found: list[Point] = []
        for i, a in zip(range(POOL), itertools.cycle(best), strict=False):
            kind = rng.random()
            if kind < 0.3:
                point = space.sample(rng)
            elif kind < 0.5 and len(best) > 1:
                point = space.crossover(a, best[int(rng.integers(len(best)))], rng)
            else:
                point = space.mutate(a, rng)
                if i % 3 == 0:
                    point = space.mutate(point, rng)
            found.append(point)
        new = {c.tobytes(): c for c in coder.encode(found)}
        for t in study.trials:
            if t.ncode:
                new.pop(self._code(t).tobytes(), None)
        for code in coder.encode([p.point for p in batch if p.point is not None]):
            new.pop(code.tobytes(), None)
        return np.stack(list(new.values())) if new else coder.encode([])

    def _code(self, t: Trial) -> NDArray[np.int64]:
        """(D,): the code of a trial."""
        assert self._coder is not None
        if t.ncode not in self._codes:
            [self._codes[t.ncode]] = self._coder.encode([t.proposal.point or {}])
        return self._codes[t.ncode]


def digest(y: Array, rng: np.random.Generator) -> NDArray[np.int64]:
    """Positions of the trials to read: all, or the best, the latest, and some of the rest, in order."""
    if len(y) <= HISTORY:
        return np.arange(len(y))
    kept = set(np.argsort(-y, kind="stable")[: HISTORY // 2].tolist())
    kept |= set(range(len(y) - HISTORY // 4, len(y)))
    rest = np.setdiff1d(np.arange(len(y)), sorted(kept))
    return np.sort(np.array([*kept, *rng.choice(rest, HISTORY - len(kept), replace=False)], dtype=np.int64))


def measurements(trials: Sequence[Trial], z: Array) -> Array:
    """(n, C): what was measured beside the score, as normal scores, NaN where it is missing: the learning curve at half
    and at the end of its steps, probes at the end and in mid-training, parameters, and the spread of the returns. At
    most ``CHANNELS`` of them, those that go with the score most."""
    columns: dict[str, Array] = {}
    for i, t in enumerate(trials):
        for name, value in _measured(t).items():
            if name not in columns:
                columns[name] = np.full(len(trials), np.nan)
            columns[name][i] = value
    out: list[tuple[float, Array]] = []
    for name in sorted(columns):
        v = columns[name]
        there = np.isfinite(v)
        if there.sum() >= 3 and np.ptp(v[there]) > 0:
            ranked = np.full(len(trials), np.nan)
            ranked[there] = normal_scores(v[there])
            out.append((abs(float((ranked[there] * z[there]).sum())) / (there.sum() + 1), ranked))
    out.sort(key=lambda c: -c[0])
    return np.stack([c for _, c in out[:CHANNELS]], 1) if out else np.zeros((len(trials), 0))


def _measured(t: Trial) -> dict[str, float]:
    e = t.evaluation
    if e is None or t.status != "ok":
        return {}
    out: dict[str, float] = {}
    if e.curve:
        steps, returns = (np.array(v, dtype=float) for v in zip(*e.curve, strict=True))
        for name, low, high in (("half", 0.35, 0.65), ("end", 0.8, 1.0)):
            part = (steps >= low * steps[-1]) & (steps <= high * steps[-1])
            if part.any():
                out[f"curve {name}"] = float(np.mean(returns[part]))
    for part_name, probes in e.probes.items():
        out |= {f"probe {part_name} {k}": float(v) for k, v in probes.items()}
    for part_name, probes in (e.probe_curve[-1][1] if e.probe_curve else {}).items():
        out |= {f"early {part_name} {k}": float(v) for k, v in probes.items()}
    if e.cost.parameters:
        out["parameters"] = float(e.cost.parameters)
    if len(e.returns) > 1:
        out["spread"] = float(np.std(e.returns))
    return out


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small matrices: threads would only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


