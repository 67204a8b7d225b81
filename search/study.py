"""Study and trials: every proposal of a search and what came of it."""

from __future__ import annotations

import bisect
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal

from optuna.distributions import CategoricalDistribution
from pydantic import ValidationError

from lacer.agents import Evaluation, Rung
from lacer.encoders import EncoderSpec
from lacer.envs import LacerError, Objective, TaskCard
from lacer.search.space import EncoderSpace, Point, SearchSpace
from lacer.search.storage import Row, State, Store


@dataclass(frozen=True)
class Proposal:
    """What a designer hands in.

    Attributes:
        point: the encoder as a point of the space; None if the proposal was no valid encoder.
        designer: who proposed it (a fallback names itself).
        rationale: why, in plain words.
        parents: numbers of the trials that it was derived from.
        rejected: why it cannot be evaluated; empty for valid proposals.
        meta: anything else worth keeping: an LLM's reply, ``tokens_in`` and ``tokens_out``, prompt file, expected
            effect; ``env_steps`` that the designer spent on training of its own, which the budget is charged.
    """

    point: Point | None
    designer: str
    rationale: str = ""
    parents: tuple[int, ...] = ()
    rejected: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)


USAGE = ("tokens_in", "tokens_out", "requests", "seconds", "cost")
"""Keys of ``Proposal.meta`` that count what a language model took, see :attr:`Trial.usage`."""

TrialStatus = Literal["running", "ok", "failed", "pruned", "rejected"]

_STATES: dict[TrialStatus, State] = {"running": "RUNNING", "ok": "COMPLETE", "failed": "FAIL", "pruned": "PRUNED",
                                     "rejected": "FAIL"}


@dataclass(frozen=True)
class Trial:
    """A proposal with its number and, once it is there, its evaluation.

    Attributes:
        passed: rungs of successive halving that it has passed while it is running.
    """

    number: int
    status: TrialStatus
    proposal: Proposal
    spec: EncoderSpec | None
    ncode: str
    evaluation: Evaluation | None = None
    passed: tuple[Rung, ...] = ()

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """Rungs of successive halving that it has reached."""
        return self.passed if self.evaluation is None else tuple(self.evaluation.rungs)

    @property
    def survivor(self) -> int | None:
        """The trial of which this is a further training seed, for an encoder that survived the search; else None."""
        number = self.proposal.meta.get("survivor")
        return None if number is None else int(number)

    @property
    def objective(self) -> float | None:
        """Task metric of a finished trial, else None."""
        return self.evaluation.objective if self.status == "ok" and self.evaluation is not None else None

    @property
    def reason(self) -> str:
        """Why a trial was rejected, failed or pruned."""
        return self.proposal.rejected or (self.evaluation.reason if self.evaluation is not None else "")

    @property
    def env_steps(self) -> int:
        """Environment steps that this trial cost, the designer's own training included."""
        own = int(self.proposal.meta.get("env_steps") or 0)
        return own + (self.evaluation.cost.env_steps if self.evaluation is not None else 0)

    @property
    def tokens(self) -> int:
        """LLM tokens that the proposal cost, in and out."""
        return sum(int(self.proposal.meta.get(k) or 0) for k in ("tokens_in", "tokens_out"))

    @property
    def usage(self) -> dict[str, float]:
        """What the LLM took for the proposal: ``tokens_in``, ``tokens_out``, ``requests``, ``seconds``, and ``cost`` in
        US dollars where the prices are known; empty if it was not asked."""
        meta = self.proposal.meta
        return {k: float(meta[k]) for k in USAGE if k in meta} if "requests" in meta else {}


def score_of(trial: Trial, trials: Iterable[Trial]) -> float | None:
    """The mean objective over all evaluations of a trial's encoder among some trials; None without a result."""
    found = [t for t in trials if t.objective is not None
             and (t.number == trial.number or (t.ncode and t.ncode == trial.ncode))]
    return _mean(found) if found else None


def _mean(trials: Sequence[Trial]) -> float:
    """The mean objective of trials with a result."""
    return sum(t.objective or 0.0 for t in trials) / len(trials)


PASSED = "rungs"
"""User attribute of a trial that holds the rungs it has passed."""


def passed_rungs(attrs: Mapping[str, Any]) -> tuple[Rung, ...]:
    """The rungs of a stored trial. Raises LacerError if they are not of this version."""
    try:
        return tuple(Rung.model_validate(r) for r in attrs.get(PASSED, ()))
    except ValidationError as e:
        raise LacerError(f"a trial holds no rungs of this version: {str(e)[:200]}") from None


class Study:
    """All trials of one search, in memory.

    Args:
        space: the search space.
        objective: what is optimised; default: that of the task of an EncoderSpace, else a score to maximise.
        trials: trials to begin with, by number.
    """

    def __init__(self, space: SearchSpace, objective: Objective | None = None, trials: Iterable[Trial] = ()) -> None:
        self.space = space
        self.objective = objective or (space.card.objective if isinstance(space, EncoderSpace) else Objective("score"))
        self._lock = threading.Lock()
        self._trials: list[Trial] = []
        self._first: dict[str, int] = {}  # NCode -> its first trial
        self._first_valid: dict[str, int] = {}  # the same without rejected ones
        self._counts: Counter[TrialStatus] = Counter()
        self._finished: list[Trial] = []
        self._scores: dict[str, tuple[Trial, ...]] = {}  # the same by encoder
        self._best: str | None = None  # a key of `_scores`
        for t in trials:
            self._append(t)

    @property
    def encoders(self) -> EncoderSpace:
        """The search space where it is one of encoders. Raises LacerError if it is another one."""
        if not isinstance(self.space, EncoderSpace):
            raise LacerError("this designer searches encoders for an environment; for other spaces choose another one, "
                             "e.g. evolution, or with an LLM lm-searcher")
        return self.space

    @property
    def card(self) -> TaskCard:
        """The task, where the space is one of encoders. Raises LacerError if it is not."""
        return self.encoders.card

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All trials, by number."""
        with self._lock:
            return tuple(self._trials)

    def __len__(self) -> int:
        return len(self._trials)

    def __getitem__(self, number: int) -> Trial:
        return self._trials[number]

    @property
    def finished(self) -> list[Trial]:
        """Trials with a result, by number."""
        with self._lock:
            return list(self._finished)

    @property
    def best(self) -> Trial | None:
        """The trial of the best encoder, by its mean objective where it was evaluated several times; the earliest one
        among equals. Where some survived the search and have further seeds, the best of these."""
        with self._lock:
            return None if self._best is None else self._scores[self._best][0]

    @property
    def best_value(self) -> float | None:
        """The objective of the best encoder: the mean, where it was evaluated several times."""
        with self._lock:
            return None if self._best is None else _mean(self._scores[self._best])

    def best_first(self) -> list[Trial]:
        """The first trial of each encoder with a result, the best first, further seeds of survivors left out."""
        with self._lock:
            groups = [[t for t in same if t.survivor is None] for same in self._scores.values()]
        found = [(self.objective.signed(_mean(g)), -g[0].number) for g in groups if g]
        return [self._trials[-n] for _, n in sorted(found, reverse=True)]

    def _rank(self, code: str) -> tuple[bool, float, int]:
        same = self._scores[code]
        return (any(t.survivor is not None for t in same),
                self.objective.signed(_mean(same)), -same[0].number)

    def _add_result(self, t: Trial) -> None:
        """Keeps `finished` and `best` up to date; the lock is held."""
        bisect.insort(self._finished, t, key=lambda t: t.number)
        code = t.ncode or f"#{t.number}"
        same = self._scores.get(code, ())
        self._scores[code] = tuple(sorted((*same, t), key=lambda t: t.number))
        if self._best == code:
            self._best = max(self._scores, key=self._rank)  # its mean may have fallen
        elif self._best is None or self._rank(code) > self._rank(self._best):
            self._best = code

    def count(self, *statuses: TrialStatus) -> int:
        """Number of trials of some statuses."""
        return sum(self._counts[s] for s in statuses)

    def seen(self, code: str) -> int | None:
        """The first trial, rejected ones included, that proposed the encoder of an NCode."""
        return self._first.get(code)

    def evaluated(self, code: str) -> int | None:
        """The first trial, running ones included, that evaluates the encoder of an NCode."""
        return self._first_valid.get(code)

    def view(self, hidden: Collection[int] = ()) -> Study:
        """A copy as of now, in memory, in which the results of some trials are not there yet."""
        new = Study(self.space, self.objective)
        with self._lock:
            new._trials, new._first, new._first_valid = list(self._trials), dict(self._first), dict(self._first_valid)
            new._counts, new._best = self._counts.copy(), self._best
            new._finished, new._scores = list(self._finished), dict(self._scores)
        hide = [t for n in hidden if (t := new._trials[n]).status not in ("running", "rejected")]
        for t in hide:
            new._counts[t.status] -= 1
            new._counts["running"] += 1
            new._trials[t.number] = replace(t, status="running", evaluation=None)
        if any(t.objective is not None for t in hide):
            gone = {t.number for t in hide}
            new._finished = [t for t in new._finished if t.number not in gone]
            for code in {t.ncode or f"#{t.number}" for t in hide}:
                kept = tuple(t for t in new._scores.pop(code, ()) if t.number not in gone)
                new._scores |= {code: kept} if kept else {}
            new._best = max(new._scores, key=new._rank, default=None)
        return new

    def start(self, proposal: Proposal) -> Trial:
        """Records a valid proposal as running."""
        assert proposal.point is not None
        assert not proposal.rejected
        return self._add(proposal, "running")

    def reject(self, proposal: Proposal) -> Trial:
        """Records a proposal that will not be evaluated."""
        assert proposal.rejected
        return self._add(proposal, "rejected")

    def finish(self, number: int, evaluation: Evaluation) -> Trial:
        """Records the evaluation of a running trial, failed and pruned ones too."""
        old = self._trials[number]
        if old.status != "running":
            raise ValueError(f"trial {number} is {old.status}")
        status: TrialStatus = "ok" if evaluation.ok else "pruned" if evaluation.status == "pruned" else "failed"
        if status == "failed" and evaluation.status == "ok":
            evaluation = evaluation.model_copy(update={
                "status": "failed", "reason": evaluation.reason or f"the objective is {evaluation.objective}"})
        self._store_result(old, status, evaluation)
        new = replace(old, status=status, evaluation=evaluation)
        with self._lock:
            self._trials[number] = new
            self._counts["running"] -= 1
            self._counts[status] += 1
            if new.objective is not None:
                self._add_result(new)
        return new

    def add_rung(self, number: int, rung: Rung) -> Trial:
        """Records that a running trial has passed a rung."""
        old = self._trials[number]
        new = replace(old, passed=(*old.passed, rung))
        self._store_rungs(new)
        with self._lock:
            self._trials[number] = new
        return new

    def _add(self, proposal: Proposal, status: TrialStatus) -> Trial:
        point = proposal.point
        spec = self.space.to_spec(point) if point is not None and isinstance(self.space, EncoderSpace) else None
        new = Trial(len(self._trials), status, proposal, spec, self.space.to_ncode(point) if point is not None else "")
        self._store_new(new)
        self._append(new)
        return new

    def _append(self, t: Trial) -> None:
        with self._lock:
            self._trials.append(t)
            self._counts[t.status] += 1
            if t.objective is not None:
                self._add_result(t)
            if t.ncode:
                self._first.setdefault(t.ncode, t.number)
                if t.status != "rejected":
                    self._first_valid.setdefault(t.ncode, t.number)

    def _store_new(self, trial: Trial) -> None:
        """For subclasses that keep trials elsewhere too; called before the trial is in memory."""

    def _store_result(self, trial: Trial, status: TrialStatus, evaluation: Evaluation) -> None:
        """The same for a result."""

    def _store_rungs(self, trial: Trial) -> None:
        """The same for the rungs of a running trial."""


class StoredStudy(Study):
    """A study in a database, mirrored in memory; only the driver writes.

    Every change is one transaction, so a study survives ``kill -9`` at any moment: a trial that was running is running
    again after a resume, a finished one is there once.

    Raises:
        LacerError: the study cannot be opened, created or written; it belongs to another search space.
    """

    def __init__(self, url: str, name: str, space: SearchSpace, objective: Objective | None = None, *,
                 create: Literal["no", "yes", "if missing"] = "if missing") -> None:
        super().__init__(space, objective)
        self._distributions = {d.name: CategoricalDistribution(d.options) for d in space.decisions}
        self.store = Store(url, name, self.objective, create)
        self._ids: list[int] = []
        try:
            for t in self.store.trials(self._distributions):
                self._ids.append(t.id)
                self._append(self._read(t))
        except LacerError as e:
            raise LacerError(f"{e} (study {name!r} in {self.store.shown})") from None

    def get_attr(self, key: str) -> Any:
        """A value stored with the study, or None."""
        return self.store.get_attr(key)

    def set_attr(self, key: str, value: Any) -> None:
        """Stores a JSON value with the study."""
        self.store.set_attr(key, value)

    def begin(self, seconds: float) -> None:
        """Notes that a search goes on now, after ``seconds`` of earlier sessions: the wall time of a result is counted
        from there."""
        now = datetime.now().isoformat()
        self.set_attr("sessions", [*(self.get_attr("sessions") or []), {"start": now, "seconds": seconds}])
        self.set_attr("finished", None)

    def end(self, why: str) -> None:
        """Notes that a search is finished, and why if not all candidates were evaluated."""
        self.set_attr("finished", {"at": datetime.now().isoformat(), "why": why})

    def close(self) -> None:
        """Closes the database."""
        self.store.close()

    def _store_new(self, trial: Trial) -> None:
        p = trial.proposal
        attrs: dict[str, Any] = {"designer": p.designer, "rationale": p.rationale, "parents": list(p.parents),
                                 "rejected": p.rejected, "meta": dict(p.meta)}
        if p.point is not None:
            attrs["ncode"] = trial.ncode
        if trial.spec is not None:
            attrs["encoder"] = trial.spec.to_dict()
        self._ids.append(self.store.add(trial.number, _STATES[trial.status], p.point or {}, self._distributions, attrs))

    def _store_result(self, trial: Trial, status: TrialStatus, evaluation: Evaluation) -> None:
        self.store.finish(self._ids[trial.number], _STATES[status], evaluation.objective if status == "ok" else None,
                          evaluation.curve, {"evaluation": evaluation.model_dump(mode="json")})

    def _store_rungs(self, trial: Trial) -> None:
        self.store.set_trial_attr(self._ids[trial.number], PASSED, [r.model_dump(mode="json") for r in trial.passed])

    def _read(self, t: Row) -> Trial:
        a = t.attrs
        proposal = Proposal(dict(t.params) or None, a.get("designer", "?"), a.get("rationale", ""),
                            tuple(a.get("parents", ())), a.get("rejected", ""), a.get("meta", {}))
        evaluation: Evaluation | None = None
        status: TrialStatus = "running"
        if "evaluation" in a:
            try:
                evaluation = Evaluation.model_validate(a["evaluation"])
            except ValidationError as e:
                raise LacerError(f"trial {t.number} holds no evaluation of this version: {str(e)[:200]}") from None
            status = "ok" if evaluation.ok else "pruned" if evaluation.status == "pruned" else "failed"
        elif t.state != "RUNNING":
            status = "rejected"
        spec, ncode = None, ""
        if proposal.point is not None:
            try:
                proposal = replace(proposal, point=self.space.check(proposal.point))
            except LacerError as e:
                raise LacerError(f"trial {t.number} is not of this search space: {e}") from None
            assert proposal.point is not None
            spec = self.space.to_spec(proposal.point) if isinstance(self.space, EncoderSpace) else None
            ncode = self.space.to_ncode(proposal.point)
        return Trial(t.number, status, proposal, spec, ncode, evaluation, passed_rungs(a))
