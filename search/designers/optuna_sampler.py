"""Optuna's samplers as designers."""

from __future__ import annotations

import warnings
from typing import ClassVar

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState, create_trial

from lacer.envs import UnknownNameError
from lacer.search.designers.base import Designer, fresh_sample, register_designer, unseen
from lacer.search.space import Point, SearchSpace
from lacer.search.study import Proposal, Study

SAMPLERS = ("TPESampler", "GPSampler", "NSGAIISampler")
ASKS = 10
"""Proposals of the sampler that are looked at before a repeated one is replaced by a random one."""


@register_designer
class OptunaSampler(Designer):
    """one of Optuna's samplers: optuna:TPESampler (also `optuna`), optuna:GPSampler, optuna:NSGAIISampler

    Akiba et al. 2019 (1907.10902); TPE: Bergstra et al. 2011, Watanabe 2023 (2304.11127). The sampler sees the study
    as it would its own: decisions are suggested in the order of the space, each only where it is asked.
    Deviations: a sampler draws anew for every proposal, from the seed and the number of trials, so a search resumes
    from the study alone; an encoder that was seen before is asked for again, at most ten times, then drawn at random.
    CMA-ES is not among them: it needs numbers, and keeps its state as a pickle in the study.

    Args:
        seed: seed of the sampler.
        variant: one of ``SAMPLERS``.

    Raises:
        UnknownNameError: no such sampler.
    """

    name: ClassVar[str] = "optuna"
    paper: ClassVar[str] = "Akiba et al. 2019, 1907.10902"
    variants: ClassVar[tuple[str, ...]] = SAMPLERS

    def __init__(self, seed: int = 0, variant: str = "TPESampler") -> None:
        super().__init__(seed)
        if variant not in SAMPLERS:
            raise UnknownNameError("Optuna sampler", variant, SAMPLERS)
        self.variant = variant
        self._distributions: dict[str, CategoricalDistribution] = {}

    def propose(self, study: Study, n: int) -> list[Proposal]:
        rng = self.rng(study)
        mirror = self._mirror(study, int(rng.integers(2**31)))
        out: list[Proposal] = []
        name = f"{self.name}:{self.variant}"
        while len(out) < n:
            for _ in range(ASKS):
                trial = mirror.ask()
                point = self._suggest(trial, study.space)
                if point is not None and unseen(study, out, point):
                    attrs = mirror.get_trials(deepcopy=False)[trial.number].system_attrs  # NSGA-II's generation
                    out.append(Proposal(point, name, meta={"system_attrs": attrs} if attrs else {}))
                    break
                mirror.tell(trial, state=TrialState.FAIL)
            else:
                out.append(Proposal(fresh_sample(study, out, rng), name, "the sampler repeats itself: random"))
        return out

    def _mirror(self, study: Study, seed: int) -> optuna.Study:
        """The study as Optuna's own, in memory."""
        if self._distributions.keys() != study.space.by_name.keys():
            self._distributions = {d.name: CategoricalDistribution(d.options) for d in study.space.decisions}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sampler = getattr(optuna.samplers, self.variant)(seed=seed)
        mirror = optuna.create_study(direction=study.objective.direction, sampler=sampler)
        for t in study.trials:
            if t.proposal.point is None or t.status == "rejected":
                continue
            state = {"ok": TrialState.COMPLETE, "running": TrialState.RUNNING}.get(t.status, TrialState.FAIL)
            mirror.add_trial(create_trial(
                state=state, value=t.objective, params=t.proposal.point,
                distributions={k: self._distributions[k] for k in t.proposal.point},
                system_attrs=dict(t.proposal.meta.get("system_attrs") or {})))
        return mirror

    def _suggest(self, trial: optuna.Trial, space: SearchSpace) -> Point | None:
        """The sampler's point; None where the space has a constraint that it breaks."""
        point: Point = {}
        for d in space.decisions:
            if space.is_active(d, point):
                value = trial.suggest_categorical(d.name, d.options)
                if value not in space.options(d, point):
                    return None
                point[d.name] = value
        return point if space.allowed(point) else None
