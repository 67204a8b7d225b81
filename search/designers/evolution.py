"""Regularized evolution."""

from __future__ import annotations

from typing import ClassVar

from lacer.envs import LacerError
from lacer.search.designers.base import Designer, fresh_sample, register_designer, unseen
from lacer.search.study import Proposal, Study


@register_designer
class Evolution(Designer):
    """regularized evolution: mutates the best of a random tournament among the youngest encoders

    Real et al. 2019 (1802.01548), algorithm 1: the population is the last ``population`` finished trials (the oldest
    dies), the parent is the best of ``tournament`` drawn from it, the child differs from it in one decision.
    Deviations: sizes for budgets of tens of trials (the paper: 100 and 25); a child that was seen before is mutated
    again; failed trials never enter the population.

    Args:
        seed: seed of its random numbers.
        population, tournament: see above.

    Raises:
        LacerError: if one of them is below 1.
    """

    name: ClassVar[str] = "evolution"
    paper: ClassVar[str] = "Real et al. 2019, 1802.01548"

    def __init__(self, seed: int = 0, population: int = 8, tournament: int = 3) -> None:
        super().__init__(seed)
        if population < 1 or tournament < 1:
            raise LacerError(f"evolution: population and tournament must be at least 1, not {population} and "
                             f"{tournament}")
        self.population, self.tournament = population, tournament

    def propose(self, study: Study, n: int) -> list[Proposal]:
        rng = self.rng(study)
        sign = study.objective.signed
        started = len(study) - study.count("rejected")
        alive = study.finished[-self.population:]
        out: list[Proposal] = []
        for i in range(n):
            if started + i < self.population // 2 or not alive:
                out.append(Proposal(fresh_sample(study, out, rng), self.name, "random start of the population"))
                continue
            k = min(self.tournament, len(alive))
            drawn = [alive[j] for j in rng.choice(len(alive), k, replace=False)]
            parent = max(drawn, key=lambda t: sign(t.objective or 0.0))
            assert parent.proposal.point is not None
            child = parent.proposal.point
            for _ in range(100):
                child = study.space.mutate(child, rng)
                if unseen(study, out, child):
                    break
            else:
                child = fresh_sample(study, out, rng)
            changed = [f"{k} {parent.proposal.point.get(k, '-')} -> {v}" for k, v in child.items()
                       if parent.proposal.point.get(k) != v]
            out.append(Proposal(child, self.name, f"#{parent.number} with " + ", ".join(changed), (parent.number,)))
        return out
