"""Study and trials: every proposal of a search and what came of it, stored by Optuna."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from pydantic import ValidationError

from lacer.agents import Evaluation
from lacer.encoders import EncoderSpec
from lacer.envs import LacerError, TaskCard
from lacer.search.space import EncoderSpace, Point

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Proposal:
    """What a designer hands in.

    Attributes:
        point: the encoder as a point of the space; None if the proposal was no valid encoder.
        designer: who proposed it (a fallback names itself).
        rationale: why, in plain words.
        parents: numbers of the trials that it was derived from.
        rejected: why it cannot be evaluated; empty for valid proposals.
        meta: anything else worth keeping, e.g. an LLM's reply, tokens, prompt file, expected effect.
    """

    point: Point | None
    designer: str
    rationale: str = ""
    parents: tuple[int, ...] = ()
    rejected: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)


TrialStatus = Literal["running", "ok", "failed", "rejected"]


@dataclass(frozen=True)
class Trial:
    """A proposal with its number and, once it is there, its evaluation."""

    number: int
    status: TrialStatus
    proposal: Proposal
    spec: EncoderSpec | None
    ncode: str
    evaluation: Evaluation | None = None

    @property
    def objective(self) -> float | None:
        """Task metric of a finished trial, else None."""
        return self.evaluation.objective if self.status == "ok" and self.evaluation is not None else None

    @property
    def reason(self) -> str:
        """Why a trial was rejected or failed."""
        return self.proposal.rejected or (self.evaluation.reason if self.evaluation is not None else "")


class Study:
    """All trials of one search, mirrored in memory; only the driver writes.

    Every change is one transaction in Optuna's storage, so a study survives ``kill -9`` at any moment: a trial that
    was running is running again after a resume, a finished one is there once.

    Args:
        storage: Optuna storage or its URL, e.g. ``sqlite:///runs/x/study.db``.
        name: Optuna study name.
        space: the search space.
        create: False opens an existing study only.

    Raises:
        LacerError: if the study cannot be opened or created.
    """

    def __init__(self, storage: str | BaseStorage, name: str, space: EncoderSpace, *, create: bool = True) -> None:
        self.space = space
        self.card: TaskCard = space.card
        self._distributions = {d.name: CategoricalDistribution(d.options) for d in space.decisions}
        try:
            if create:
                self.optuna = optuna.create_study(storage=storage, study_name=name, load_if_exists=True,
                                                  direction=self.card.objective.direction)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                    self.optuna.set_metric_names([self.card.objective.metric])
            else:
                self.optuna = optuna.load_study(storage=storage, study_name=name)
        except KeyError:
            raise LacerError(f"there is no study {name!r} in {storage}") from None
        except Exception as e:  # the many errors of as many database drivers
            raise LacerError(f"cannot open the study in {storage}: {str(e)[:300]}") from e
        self._lock = threading.Lock()
        self._frozen: dict[int, int] = {}
        self._trials: list[Trial] = [self._read(t) for t in self.optuna.get_trials(deepcopy=False)]

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All trials, by number."""
        with self._lock:
            return tuple(self._trials)

    @property
    def finished(self) -> list[Trial]:
        """Trials with a result, by number."""
        return [t for t in self.trials if t.objective is not None]

    @property
    def best(self) -> Trial | None:
        """The finished trial with the best objective; the earlier one among equals."""
        sign = self.card.objective.signed
        return max(self.finished, key=lambda t: (sign(t.objective or 0.0), -t.number), default=None)

    def start(self, proposal: Proposal) -> Trial:
        """Records a valid proposal as running."""
        assert proposal.point is not None
        assert not proposal.rejected
        return self._add(proposal, TrialState.RUNNING)

    def reject(self, proposal: Proposal) -> Trial:
        """Records a proposal that will not be evaluated."""
        assert proposal.rejected
        return self._add(proposal, TrialState.FAIL)

    def finish(self, number: int, evaluation: Evaluation) -> Trial:
        """Records the evaluation of a running trial, failed ones too."""
        old = self._trials[number]
        if old.status != "running":
            raise ValueError(f"trial {number} is {old.status}")
        trial = optuna.trial.Trial(self.optuna, self._frozen[number])
        # The evaluation first: if the process dies between the two calls, _read completes the trial from it.
        trial.set_user_attr("evaluation", evaluation.model_dump(mode="json"))
        self._tell(number, evaluation)
        new = replace(old, status="ok" if evaluation.ok else "failed", evaluation=evaluation)
        with self._lock:
            self._trials[number] = new
        return new

    def get_attr(self, key: str) -> Any:
        """A value stored with the study, or None."""
        return self.optuna.user_attrs.get(key)

    def set_attr(self, key: str, value: Any) -> None:
        """Stores a JSON value with the study."""
        self.optuna.set_user_attr(key, value)

    def _tell(self, number: int, evaluation: Evaluation) -> None:
        if evaluation.ok:
            self.optuna.tell(number, evaluation.objective)
        else:
            self.optuna.tell(number, state=TrialState.FAIL)

    def _add(self, proposal: Proposal, state: TrialState) -> Trial:
        point = proposal.point or {}
        attrs = {"designer": proposal.designer, "rationale": proposal.rationale, "parents": list(proposal.parents),
                 "rejected": proposal.rejected, "meta": dict(proposal.meta)}
        if point:
            attrs["encoder"] = self.space.to_spec(point).to_dict()
            attrs["ncode"] = self.space.to_ncode(point)
        self.optuna.add_trial(create_trial(
            state=state, params=point, distributions={k: self._distributions[k] for k in point}, user_attrs=attrs))
        frozen = self.optuna.get_trials(deepcopy=False)[len(self._trials)]
        new = self._read(frozen)
        with self._lock:
            self._trials.append(new)
        return new

    def _read(self, t: FrozenTrial) -> Trial:
        a = t.user_attrs
        self._frozen[t.number] = t._trial_id
        proposal = Proposal(dict(t.params) or None, a.get("designer", "?"), a.get("rationale", ""),
                            tuple(a.get("parents", ())), a.get("rejected", ""), a.get("meta", {}))
        evaluation = None
        if "evaluation" in a:
            try:
                evaluation = Evaluation.model_validate(a["evaluation"])
            except ValidationError as e:
                raise LacerError(f"trial {t.number} holds no evaluation of this version: {str(e)[:200]}") from None
        spec, ncode = None, ""
        if proposal.point is not None:
            point = self.space.check(proposal.point)
            spec, ncode = self.space.to_spec(point), self.space.to_ncode(point)
        status: TrialStatus = "running"
        if evaluation is not None:
            status = "ok" if evaluation.ok else "failed"
            if not t.state.is_finished():
                self._tell(t.number, evaluation)
        elif t.state.is_finished():
            status = "rejected"
        return Trial(t.number, status, proposal, spec, ncode, evaluation)


def study_name(url: str) -> str | None:
    """Name of the study in a run folder's storage, which a renamed folder does not change; None for a new storage."""
    names = optuna.get_all_study_names(url)
    return names[0] if names else None


def sqlite_url(path: Path) -> str:
    """Optuna storage URL of a SQLite file."""
    return f"sqlite:///{path.resolve()}"
