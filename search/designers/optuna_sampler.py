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
from lacer.search.study import Proposal, Study, Trial

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
    CMA-ES is not among them, because Optuna's keeps its state as a pickle in the study: see the designer `cmaes`.

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
        self._study: optuna.Study | None = None  # the same trials as Optuna's own study, brought up to date
        self._numbers: list[int | None] = []  # study trial -> its trial there; None: rejected
        self._codes: list[str] = []
        self._open: list[int] = []  # study trials without a result
        self._asked: dict[str, int] = {}  # NCode -> trial there that was proposed but is not in the study yet

    def propose(self, study: Study, n: int) -> list[Proposal]:
        rng = self.rng(study)
        mirror = self._mirror(study)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mirror.sampler = getattr(optuna.samplers, self.variant)(seed=int(rng.integers(2**31)))
        out: list[Proposal] = []
        name = f"{self.name}:{self.variant}"
        while len(out) < n:
            for _ in range(ASKS):
                trial = mirror.ask()
                point = self._suggest(trial, study.space)
                if point is not None and unseen(study, out, point):
                    attrs = mirror.get_trials(deepcopy=False)[trial.number].system_attrs  # NSGA-II's generation
                    out.append(Proposal(point, name, meta={"system_attrs": dict(attrs)} if attrs else {}))
                    self._asked[study.space.to_ncode(point)] = trial.number
                    break
                mirror.tell(trial, state=TrialState.FAIL)
            else:
                out.append(Proposal(fresh_sample(study, out, rng), name, "the sampler repeats itself: random"))
        return out

    def _mirror(self, study: Study) -> optuna.Study:
        """The study as Optuna's own, in memory: made once, then only told what is new."""
        known = len(self._codes)
        if self._study is None or len(study) < known or (known and study[known - 1].ncode != self._codes[-1]):
            self._distributions = {d.name: CategoricalDistribution(d.options) for d in study.space.decisions}
            self._study = optuna.create_study(direction=study.objective.direction)
            self._numbers, self._codes, self._open, self._asked = [], [], [], {}
        for i in list(self._open):
            t, number = study[i], self._numbers[i]
            if t.status != "running":
                assert number is not None
                self._open.remove(i)
                self._study.tell(number, t.objective, state=self._state(t))
        for i in range(len(self._codes), len(study)):
            t = study[i]
            self._codes.append(t.ncode)
            self._numbers.append(None if t.status == "rejected" or t.proposal.point is None else self._add(t, i))
        for number in self._asked.values():  # proposed, but the search did without it
            self._study.tell(number, state=TrialState.FAIL)
        self._asked = {}
        return self._study

    @staticmethod
    def _state(t: Trial) -> TrialState:
        return {"ok": TrialState.COMPLETE, "running": TrialState.RUNNING}.get(t.status, TrialState.FAIL)

    def _add(self, t: Trial, i: int) -> int:
        """The trial of Optuna's study for a new trial of ours."""
        assert self._study is not None
        assert t.proposal.point is not None
        number = self._asked.pop(t.ncode, None)
        if t.status == "running":
            self._open.append(i)
        if number is not None:
            if t.status != "running":
                self._study.tell(number, t.objective, state=self._state(t))
            return number
        self._study.add_trial(create_trial(
            state=self._state(t), value=t.objective, params=t.proposal.point,
            distributions={k: self._distributions[k] for k in t.proposal.point},
            system_attrs=dict(t.proposal.meta.get("system_attrs") or {})))
        return len(self._study.get_trials(deepcopy=False)) - 1

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
