"""Spending less on candidates that will not win: successive halving, further seeds for the best, warm starts.

A rung is a pause in a candidate's training, a job of its own that ends with a checkpoint. What the candidate showed
there is judged by Optuna's pruner against all others that have reached the rung so far, so nobody waits for a bracket
(asynchronous successive halving, Li et al. 2020, arXiv 1810.05934; Hyperband, Li et al. 2018, JMLR 18-185). Judgements
are stored with the trial; Optuna's study is made anew from them for each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lacer.agents.evaluation import Evaluation, Protocol, Rung, RunRequest
from lacer.envs import LacerError, Objective, did_you_mean

if TYPE_CHECKING:
    from lacer.encoders import EncoderSpec
    from lacer.search.study import Trial

FUSED = "fused"
"""As `lacer.agents.probes.FUSED`, which imports torch."""


class Fidelity(BaseModel):
    """What a search spends on which candidate; by default the same on all."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rungs: tuple[int, ...] = Field((), description="environment steps of training after which a candidate is judged "
                                                   "against the others, and ended unless it is among the best, e.g. "
                                                   "[1000, 3000]; none: all are trained to the end")
    pruner: Literal["halving", "hyperband"] = Field(
        "halving", description="Optuna's pruner: asynchronous successive halving, or Hyperband, which lets some "
                               "candidates pass the first rungs unjudged")
    reduction: int = Field(3, ge=2, description="one of so many candidates passes a rung")
    signal: str = Field("return", description="what is judged: return (mean training return of the last episodes), "
                                              "objective (a short evaluation), probe:NAME (of the fused state), or the "
                                              "mean rank of several, joined by +")
    episodes: int = Field(4, ge=1, description="evaluation episodes at a rung, for the signal objective")
    survivors: int = Field(0, ge=0, description="so many of the best encoders are trained again with further seeds at "
                                                "the end of the search, and the winner is the best mean among them")
    survivor_seeds: int = Field(2, ge=1, description="further training seeds for each of them")
    warm_start: Literal["off", "parent"] = Field(
        "off", description="parent: a candidate that was derived from another begins with its trained weights in "
                           "the sources' blocks that are the same")

    @field_validator("rungs")
    @classmethod
    def _increasing(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(b <= a for a, b in pairwise((0, *value))):
            raise ValueError(f"must be numbers of steps, each greater than the one before, not {list(value)}")
        return value

    @model_validator(mode="after")
    def _known(self) -> Self:
        for name in self.signals:
            if name.startswith("probe:"):
                from lacer.agents.probes import list_probes  # imports torch

                probes = list(list_probes())
                if name[6:] not in probes:
                    raise ValueError(f"there is no probe {name[6:]!r}{did_you_mean(name[6:], probes)}")
            elif name not in ("return", "objective"):
                raise ValueError(f"there is no signal {name!r}"
                                 f"{did_you_mean(name, ['return', 'objective', 'probe:NAME'])}")
        return self

    @property
    def signals(self) -> list[str]:
        """The parts of the signal."""
        return [s.strip() for s in self.signal.split("+")]

    @property
    def probes(self) -> list[str]:
        """Names of the probes among them."""
        return [s[6:] for s in self.signals if s.startswith("probe:")]

    @property
    def on(self) -> bool:
        """Whether anything differs from the plain protocol."""
        return bool(self.rungs or self.survivors or self.warm_start != "off")

    def check(self, protocol: Protocol, *, ray: bool, trains: bool) -> None:
        """Looks whether it fits the rest of a search.

        Args:
            protocol: of the candidates.
            ray: whether they run on a Ray cluster.
            trains: whether the designer trains by itself.

        Raises:
            LacerError: it does not.
        """
        if trains and self.on:
            raise LacerError("fidelity is for searches of many candidates; a designer that trains by itself proposes "
                             "those that it has compared already. Choose another designer, or leave fidelity out")
        if ray and (self.rungs or self.warm_start != "off"):
            raise LacerError("fidelity.rungs and fidelity.warm_start need checkpoints, which Ray's nodes do not share: "
                             "choose --executor process")
        if not self.rungs:
            return
        rollout = protocol.ppo.n_envs * protocol.ppo.n_steps
        if self.rungs[-1] >= protocol.steps:
            raise LacerError(f"fidelity.rungs: {self.rungs[-1]:,} is not before the end of the training, "
                             f"protocol.steps={protocol.steps:,}")
        ends = [-(-r // rollout) for r in (*self.rungs, protocol.steps)]
        for (a, b), (end, after) in zip(pairwise((*self.rungs, protocol.steps)), pairwise(ends), strict=True):
            if end == after:
                raise LacerError(f"fidelity.rungs: {a:,} and {b:,} are the same pause, since a rollout has {rollout:,} "
                                 "steps (protocol.ppo.n_envs x n_steps)")
        if self.probes and "overlap" in protocol.ppo.shortcuts:
            raise LacerError("fidelity.signal: probes need the environments' states, which the shortcut overlap does "
                             "not wait for: choose one of them")
        for name in self.probes:
            if protocol.probes is not None and name not in protocol.probes:
                raise LacerError(f"fidelity.signal: the probe {name!r} is not among protocol.probes")

    def request(self, request: RunRequest, passed: int) -> RunRequest:
        """What to run next of a candidate that has passed so many rungs: until the next one, or to the end."""
        changes: dict[str, Any] = {}
        if self.rungs:
            protocol = request.protocol
            if self.probes:
                points = {*protocol.probe_at, *(r / protocol.steps for r in self.rungs)}
                changes["protocol"] = protocol.model_copy(update={"probe_at": tuple(sorted(points))})
            changes |= {"pauses": self.rungs, "until": self.rungs[passed] if passed < len(self.rungs) else None,
                        "pause_episodes": self.episodes if "objective" in self.signals else 0}
        return request.model_copy(update=changes) if changes else request

    def scores(self, e: Evaluation, objective: Objective) -> dict[str, float]:
        """What a paused run showed, by signal, higher is better; those that it has."""
        found: dict[str, float | None] = {}
        for name in self.signals:
            if name == "objective":
                found[name] = None if e.objective is None else objective.signed(e.objective)
            elif name == "return":
                found[name] = e.curve[-1][1] if e.curve else None
            else:
                at = [probes for steps, probes in e.probe_curve if steps == e.paused_at]
                found[name] = at[0].get(FUSED, {}).get(name[6:]) if at else None
        return {k: v for k, v in found.items() if v is not None and math.isfinite(v)}

    def judge(self, trial: Trial, e: Evaluation, others: Iterable[Trial], objective: Objective) -> Evaluation | Rung:
        """Whether a candidate that has reached its next rung goes on: the rung that it has passed, or, if it has not,
        its evaluation.

        Args:
            trial: the candidate.
            e: its paused run.
            others: the trials that it competes with.
            objective: of the task.
        """
        assert e.paused_at is not None
        index, scores = len(trial.rungs), self.scores(e, objective)
        others = [t for t in others if t.number != trial.number and len(t.rungs) > index]
        values = ranked(self.signals, [scores, *(t.rungs[index].scores for t in others)])
        if values is None:  # nothing to judge by: no episode has ended yet, or the environment shows no state
            promoted, place = True, ""
        else:
            known = {t.number: v for t, v in zip(others, values[1:], strict=True) if v is not None}
            assert values[0] is not None
            promoted = promotes(self, trial.number, values[0], known, index)
            better = sum(v > values[0] for v in known.values())
            place = f", place {better + 1} of {len(known) + 1}"
        rung = Rung(steps=e.paused_at, scores=scores, promoted=promoted, eval_steps=e.cost.env_steps - e.paused_at,
                    eval_seconds=e.cost.eval_seconds, total_seconds=e.cost.total_seconds)
        if promoted:
            return rung
        shown = ", ".join(f"{k.removeprefix('probe:')} {v:.4g}" for k, v in scores.items())
        return charged(e.model_copy(update={
            "status": "pruned", "reason": f"pruned after {e.paused_at:,} steps: {shown}{place}", "objective": None,
            "rungs": [*trial.rungs, rung]}), trial.rungs)


def ranked(signals: Sequence[str], scores: Sequence[dict[str, float]]) -> list[float | None] | None:
    """One number for each candidate, higher is better: its score, or with several signals the mean of its ranks; None
    for those without. None if the first has none."""
    if len(signals) == 1:
        values = [s.get(signals[0]) for s in scores]
        return None if values[0] is None else values
    from scipy.stats import rankdata

    complete = [i for i, s in enumerate(scores) if all(name in s for name in signals)]
    if 0 not in complete:
        return None
    ranks = sum(rankdata([scores[i][name] for i in complete]) for name in signals)
    out: list[float | None] = [None] * len(scores)
    for i, r in zip(complete, ranks, strict=True):
        out[i] = float(r) / len(signals)
    return out


def promotes(fidelity: Fidelity, number: int, value: float, known: Mapping[int, float], rung: int) -> bool:
    """Optuna's judgement of a candidate at a rung.

    Args:
        fidelity: pruner and its numbers.
        number: of the trial; Hyperband's bracket depends on it.
        value: what it showed.
        known: what others showed at this rung, by number.
        rung: which one, from 0.

    Optuna's resource is ``reduction ** rung``, so its rungs are ours, whatever their steps.
    """
    import optuna
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    base = fidelity.reduction
    study = optuna.create_study(direction="maximize", study_name="lacer")
    # One more than the last resource: Optuna takes a logarithm, which may fall short of a whole number.
    hyperband = optuna.pruners.HyperbandPruner(1, base ** len(fidelity.rungs) + 1, base)
    hyperband._try_initialization(study)
    pruner = hyperband if fidelity.pruner == "hyperband" else optuna.pruners.SuccessiveHalvingPruner(1, base)
    for n in range(max([number, *known]) + 1):
        # The first rung at which it is judged, and Optuna's own records of rungs, which count from there.
        first = hyperband._get_bracket_id(study, cast(Any, SimpleNamespace(number=n))) if pruner is hyperband else 0
        attrs = {f"completed_rung_{rung - first}": known[n]} if n in known and rung >= first else {}
        if n == number:
            attrs = {f"completed_rung_{i}": value for i in range(rung - first)}
        study.add_trial(create_trial(state=TrialState.RUNNING, system_attrs=attrs,
                                     intermediate_values={base ** rung: value} if n == number else {}))
    return not pruner.prune(study, study.get_trials(deepcopy=False)[number])


def charged(e: Evaluation, passed: Sequence[Rung]) -> Evaluation:
    """An evaluation with what the evaluations and runs at passed rungs took."""
    if not passed:
        return e
    c = e.cost
    cost = c.model_copy(update={
        "env_steps": max(c.env_steps, passed[-1].steps) + sum(r.eval_steps for r in passed),
        "eval_seconds": c.eval_seconds + sum(r.eval_seconds for r in passed),
        "total_seconds": c.total_seconds + sum(r.total_seconds for r in passed)})
    return e.model_copy(update={"cost": cost, "rungs": e.rungs or list(passed)})


def unchanged(child: EncoderSpec, parent: EncoderSpec) -> tuple[str, ...]:
    """Sources whose block is the same in two encoders. Their input is the same too; that of the fusion and of what
    comes after it is not as soon as one block differs."""
    return tuple(n for n, block in child.sources.items() if n in parent.sources and block == parent.sources[n])
