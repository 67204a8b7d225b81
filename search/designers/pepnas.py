"""PEPNAS: evolution whose individuals go on training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lacer.agents import Evaluation
from lacer.envs import LacerError
from lacer.search.designers.base import register_designer
from lacer.search.designers.training import RANKED, TrainingDesigner
from lacer.search.space import EncoderSpace, SearchSpace
from lacer.search.trainer import Trainer

if TYPE_CHECKING:
    from torch import Tensor

    from lacer.agents.training import Session
    from lacer.encoders import EncoderSpec

SMALLEST = 4
"""Individuals of a population that a small budget allows."""


@register_designer
class Pepnas(TrainingDesigner):
    """PEPNAS: NSGA-II on score and size; individuals inherit weights and train longer every generation

    Xue et al. 2024 (IEEE TEVC, doi 10.1109/TEVC.2024.3393304). Two objectives, the task metric and the number of
    parameters, by the selection of NSGA-II (Deb et al. 2002). Progressive evaluation: an individual's steps
    grow in proportion to the generation; survivors go on with their weights, children begin with those of their
    parents' tensors that fit (same block, name and shape). Sub-population preservation: eliminated
    individuals larger than the mean survivor are kept aside, the best of them, half as many as the population, and
    trained on; every third generation those within 0.08 of the best come back.

    Deviations, and what was decided where the paper was not at hand: the 0.08 is in units of the range between the best
    and the worst score of the generation, as a reward has no scale of its own; scores are those of greedy episodes; the
    optimiser starts anew with every generation; a small budget shrinks the population, to four at least. In the end
    individuals are trained from scratch as candidates, the best score first.

    Args:
        seed: seed of the training.
        trainer: where it trains.
        population: individuals, at most.
        generations: number of generations.
        margin: see above.
        every: generations between two returns of those kept aside.
        episodes: greedy episodes by which an individual is scored.

    Raises:
        LacerError: for options out of range.
    """

    name: ClassVar[str] = "pepnas"
    paper: ClassVar[str] = "PEPNAS, doi 10.1109/TEVC.2024.3393304"
    function: ClassVar[str] = "lacer.search.designers.pepnas:train"

    def __init__(self, seed: int = 0, *, trainer: Trainer | None = None, population: int = 20, generations: int = 6,
                 margin: float = 0.08, every: int = 3, episodes: int = 4) -> None:
        super().__init__(seed, trainer=trainer)
        if population < SMALLEST or min(generations, every, episodes) < 1 or margin < 0:
            raise LacerError(f"pepnas: population must be at least {SMALLEST}; generations, every and episodes at "
                             "least 1; margin not below 0")
        self.population, self.generations, self.margin = population, generations, margin
        self.every, self.episodes = every, episodes

    def options(self) -> dict[str, Any]:
        """Its options, for the training."""
        return {"population": self.population, "generations": self.generations, "margin": self.margin,
                "every": self.every, "episodes": self.episodes}


@dataclass
class Individual:
    """An encoder in the population.

    Attributes:
        number: its name among all.
        code: NCode.
        parents: numbers; the first one's weights go before the second one's.
        score: the larger the better; None as long as it has not been scored, or if it diverged.
        parameters, steps: its size and the steps that it has been trained.
    """

    number: int
    code: str
    parents: tuple[int, ...] = ()
    score: float | None = None
    parameters: int = 0
    steps: int = 0


def fronts(points: Sequence[tuple[float, float]]) -> list[list[int]]:
    """Non-dominated sorting: indices by front, the best first; both numbers are to be large."""
    def dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a[0] >= b[0] and a[1] >= b[1] and a != b

    left, out = list(range(len(points))), []
    while left:
        front = [i for i in left if not any(dominates(points[j], points[i]) for j in left)]
        out.append(front)
        left = [i for i in left if i not in front]
    return out


def crowding(points: Sequence[tuple[float, float]]) -> list[float]:
    """Crowding distance of each point of a front; infinite at its ends."""
    out = [0.0] * len(points)
    for axis in (0, 1):
        order = sorted(range(len(points)), key=lambda i: points[i][axis])
        out[order[0]] = out[order[-1]] = float("inf")
        width = points[order[-1]][axis] - points[order[0]][axis]
        for before, i, after in zip(order, order[1:], order[2:], strict=False):
            if width > 0:
                out[i] += (points[after][axis] - points[before][axis]) / width
    return out


@dataclass
class Population:
    """The individuals, and which of them live on; knows nothing of training.

    Attributes:
        size: survivors of a generation.
        margin, every: see :class:`Pepnas`.
        members: the population; larger than ``size`` for a generation after some have come back.
        aside: those that are preserved.
        generation: number of generations that have ended.
        merged: numbers of those that came back at the end of the last one.
    """

    size: int
    margin: float = 0.08
    every: int = 3
    members: list[Individual] = field(default_factory=list)
    aside: list[Individual] = field(default_factory=list)
    generation: int = 0
    merged: list[int] = field(default_factory=list)
    born: int = 0

    def children(self, space: SearchSpace, rng: np.random.Generator) -> list[Individual]:
        """``size`` new individuals: random ones at first, then by crossover of two parents and mutation, each parent
        the better of two drawn at random."""
        known = {i.code for i in [*self.members, *self.aside]}
        out: list[Individual] = []
        order = self._ranks()
        for _ in range(50 * self.size):
            if len(out) == self.size:
                break
            parents: tuple[int, ...] = ()
            if not self.members:
                point = space.sample(rng)
            else:
                a, b = (min(rng.choice(len(self.members), 2), key=lambda i: order[i]) for _ in range(2))
                a, b = sorted((int(a), int(b)), key=lambda i: order[i])
                first, second = self.members[a], self.members[b]
                point = space.crossover(space.from_ncode(first.code), space.from_ncode(second.code), rng)
                if space.to_ncode(point) in known or rng.random() < 0.5:
                    point = space.mutate(point, rng)
                parents = (first.number, second.number) if a != b else (first.number,)
            code = space.to_ncode(point)
            if code not in known:
                known.add(code)
                out.append(Individual(self.born, code, parents))
                self.born += 1
        return out

    def _ranks(self) -> list[int]:
        """Place of every member by front and crowding distance."""
        order = _order(self.members)
        return [order.index(i) for i in range(len(self.members))]

    def end_generation(self, children: Sequence[Individual]) -> None:
        """Selects the survivors among members and children, keeps larger ones aside, lets some come back."""
        self.generation += 1
        pool = [i for i in [*self.members, *children] if i.score is not None]
        order = _order(pool)
        self.members = [pool[i] for i in order[:self.size]]
        out = [pool[i] for i in order[self.size:]]
        mean = float(np.mean([i.parameters for i in self.members])) if self.members else 0.0
        self.aside = [i for i in self.aside if i.score is not None] + [i for i in out if i.parameters > mean]
        self.aside = sorted(self.aside, key=lambda i: (-_score(i), i.number))[:self.size // 2]
        self.merged = []
        if self.generation % self.every == 0 and self.aside:
            scores = [_score(i) for i in [*pool, *self.aside]]
            bar = max(scores) - self.margin * (max(scores) - min(scores))
            self.merged = [i.number for i in self.aside if _score(i) >= bar]
            self.members += [i for i in self.aside if i.number in self.merged]
            self.aside = [i for i in self.aside if i.number not in self.merged]


def _score(i: Individual) -> float:
    assert i.score is not None
    return i.score


def _order(individuals: Sequence[Individual]) -> list[int]:
    """Indices by front, within a front by crowding distance."""
    points = [(_score(i), -float(i.parameters)) for i in individuals]
    out: list[int] = []
    for front in fronts(points):
        distance = crowding([points[i] for i in front])
        out += [i for _, i in sorted(zip(distance, front, strict=True), key=lambda x: (-x[0], x[1]))]
    return out


def train(session: Session) -> Evaluation:
    """The training: finds ``ranked``, the living by score, and ``generations``: best score, sizes, who came back."""
    job = session.job
    o = job.options
    space = EncoderSpace(session.card, job.decisions)
    # An individual gets steps in proportion to the generation; from the second one on there are parents and children.
    weight = [g * min(g, 2) for g in range(1, o["generations"] + 1)]
    shares = [w / sum(weight) for w in weight]
    # Twice: an individual's episodes of evaluation may take as long as its rollout.
    fits = int(shares[0] * job.steps / (2 * session.rollout))
    population = Population(min(o["population"], max(SMALLEST, fits)), o["margin"], o["every"])
    weights: dict[int, Mapping[str, Tensor]] = {}
    history: list[dict[str, Any]] = []
    kept = session.restore()
    if kept is not None:
        tensors, state = kept
        p = state["population"]
        population = Population(**{**p, "members": [_read(i) for i in p["members"]],
                                   "aside": [_read(i) for i in p["aside"]]})
        history = state["history"]
        for key, tensor in tensors.items():
            number, name = key.split("/", 1)
            weights.setdefault(int(number), {})[name] = tensor  # type: ignore[index]
    while population.generation < o["generations"] and not _spent(session, population):
        g = population.generation
        children = population.children(space, np.random.default_rng([job.seed, g]))
        queue = [*population.members, *population.aside, *children]
        specs = {i.number: space.to_spec(space.from_ncode(i.code)) for i in queue}
        until = sum(shares[:g + 1]) * job.steps  # of all steps, at the end of this generation
        for k, i in enumerate(queue):
            if _spent(session, population):
                break
            each = (until - session.steps) / (len(queue) - k)
            _train(session, i, max(1, int(each / session.rollout)), weights, specs, session.seed(1, g, i.number))
        population.end_generation(children)
        if not population.members:
            raise LacerError("no individual of the first generation could be built and trained")
        alive = {i.number for i in [*population.members, *population.aside]}
        weights = {n: w for n, w in weights.items() if n in alive}
        history.append({"generation": population.generation, "best": max(map(_score, population.members)),
                        "members": len(population.members), "aside": len(population.aside),
                        "came_back": population.merged})
        session.save({f"{n}/{name}": t for n, w in weights.items() for name, t in w.items()},
                     {"population": asdict(population), "history": history})
    best = sorted([*population.members, *population.aside], key=lambda i: -_score(i))
    sign, metric = session.card.objective.signed, session.card.objective.metric
    return session.result(sign(_score(best[0])), {"generations": history, "ranked": [
        (i.code, f"{metric} {sign(_score(i)):.3g} after {i.steps:,} steps of its own, {i.parameters:,} parameters")
        for i in best[:RANKED]]})


def _read(data: dict[str, Any]) -> Individual:
    return Individual(**{**data, "parents": tuple(data["parents"])})


def _spent(session: Session, population: Population) -> bool:
    """Whether no further individual can be trained."""
    return session.steps + session.rollout > session.job.steps and bool(population.members or session.steps)


def _train(session: Session, i: Individual, rollouts: int, weights: dict[int, Mapping[str, Tensor]],
           specs: Mapping[int, EncoderSpec], seed: int) -> None:
    """Trains and scores an individual, from its own weights or its parents'; without a score if it diverges."""
    from lacer.agents.ppo import Diverged, make_model
    from lacer.agents.training import parameters

    job, spec = session.job, specs[i.number]
    before = session.steps
    try:
        model = make_model(spec, session.card, session.table, session.env, job.protocol, seed)
        if i.number in weights:
            own = dict(weights[i.number])
        else:
            own = _state(model.policy)
            for parent in reversed(i.parents):
                own |= _fitting(own, spec, weights[parent], specs[parent])
        model.policy.load_state_dict(own, strict=False)
        session.learn(model, rollouts, seed=seed)
        i.steps += session.steps - before
        i.score = session.card.objective.signed(session.evaluate(model, job.options["episodes"],
                                                                 job.protocol.eval_seed))
    except (Diverged, LacerError):  # LacerError: an encoder that cannot be built
        i.score = None
        return
    i.parameters = parameters(model.policy)
    weights[i.number] = _state(model.policy)


def _state(policy: Any) -> dict[str, Tensor]:
    """The tensors of a policy; SB3 lists a shared extractor under three names, of which one is kept."""
    return {k: v.detach().cpu().clone() for k, v in policy.state_dict().items()
            if not k.startswith(("pi_features_extractor.", "vf_features_extractor."))}


def _fitting(own: Mapping[str, Tensor], spec: EncoderSpec, weights: Mapping[str, Tensor],
             parent: EncoderSpec) -> dict[str, Tensor]:
    """A parent's tensors of the same name and shape, of the same blocks."""
    same = {f"blocks.{n}" for n, block in spec.sources.items()
            if n in parent.sources and parent.sources[n].block == block.block}
    if (spec.fusion.block, spec.condition) == (parent.fusion.block, parent.condition):
        same.add("fusion")

    def fits(name: str) -> bool:
        if "features_extractor.encoder." not in name:
            return True
        path = name.split("features_extractor.encoder.")[1].split(".")
        return (".".join(path[:2]) if path[0] == "blocks" else path[0]) in same

    return {k: weights[k] for k, v in own.items() if k in weights and weights[k].shape == v.shape and fits(k)}
