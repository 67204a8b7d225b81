"""The loop of every search: ask the designer, check, deduplicate, evaluate on the executor, tell."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from lacer.agents import Cost, Evaluation, Rung
from lacer.search.designers.base import Designer, DesignerStopped
from lacer.search.executors import Event, Executor, InProcess, Job
from lacer.search.fidelity import charged
from lacer.search.study import Proposal, Study, Trial

Repeats = Literal["reject", "reuse", "add"]

Judge = Callable[[Trial, Evaluation, list[Trial]], Evaluation | Rung]

MAX_REJECTIONS = 50
"""Rejected proposals in a row after which a search ends: the designer has nothing new to offer."""


SAME_FAILURES = 5
"""Candidates that fail with the same reason, before any has a result, after which a search ends: it would go on so."""


@dataclass(frozen=True)
class Budget:
    """What a search may spend; whatever is reached first ends it. None: no limit. Nothing is proposed after that;
    candidates that run are finished, and those that were proposed are evaluated, unless it is time that is spent.

    Attributes:
        candidates: evaluated encoders, failed ones included.
        env_steps: environment steps of trainings and evaluations, those that a designer spends itself included. A
            candidate starts only if what it is expected to take is left.
        seconds: wall time of the search, over all its sessions.
        tokens: LLM tokens, in and out.
        reserve: so many full trainings that come later are kept back from ``env_steps``.
        own: environment steps that the designer spends before its first proposal, which tells them.
    """

    candidates: int | None = None
    env_steps: int | None = None
    seconds: float | None = None
    tokens: int | None = None
    reserve: int = 0
    own: int = 0


class Listener:
    """What a search tells while it runs; nothing by default."""

    def rejected(self, trial: Trial) -> None:
        """A proposal was recorded that will not be evaluated."""

    def started(self, key: str, trial: Trial) -> None:
        """A candidate was handed to the executor under a key."""

    def progress(self, event: Event) -> None:
        """News of a running candidate."""

    def passed(self, key: str, trial: Trial) -> None:
        """A candidate has passed a rung and goes on."""

    def finished(self, key: str | None, trial: Trial) -> None:
        """A candidate has ended; no key if it took over the result of an earlier one."""


class Engine:
    """One search over a study.

    Args:
        study: the trials; those that it says are running are evaluated first.
        designer: who proposes.
        executor: where candidates are evaluated. The caller closes it.
        job: what to evaluate for a trial; the second argument counts earlier evaluations of the same encoder.
        budget: when to end.
        first: proposal that comes before the designer's, in a new study.
        why_not: reason to reject a new point, else "".
        repeats: an encoder that was proposed before is rejected, or takes over the result ("reuse"), or is evaluated
            once more under another seed ("add"; the study's best is the best mean).
        lag: None: every proposal knows all results so far. A number makes a search repeatable whatever order results
            arrive in: proposals wait for all but the last ``lag - 1`` trials and know no result of these.
        ahead: proposals to have ready before a worker is free.
        expected_steps: environment steps of a candidate as long as none has finished, without its evaluation.
        elapsed: seconds that earlier sessions took.
        patience: see ``MAX_REJECTIONS``.
        listener: what is told.
        judge: for jobs that pause: the rung that a candidate has passed, after which the rest of its job follows at
            once; or, if it has not, its evaluation. The last argument holds the trials that it competes with.
        survivors: only further seeds of survivors are asked for; otherwise these do not count as candidates.
    """

    def __init__(self, study: Study, designer: Designer, executor: Executor, job: Callable[[Trial, int], Job], *,
                 budget: Budget, first: Proposal | None = None, why_not: Callable[[Proposal], str] | None = None,
                 repeats: Repeats = "reject", lag: int | None = None, ahead: int = 0, expected_steps: int = 0,
                 elapsed: float = 0.0, patience: int = MAX_REJECTIONS, listener: Listener | None = None,
                 judge: Judge | None = None, survivors: bool = False) -> None:
        self.study, self.designer, self.executor, self.budget = study, designer, executor, budget
        self._job, self._why_not, self._repeats = job, why_not, repeats
        self._lag, self._ahead, self._patience = lag, ahead, patience
        self._listener, self._judge, self._survivors = listener or Listener(), judge, survivors
        self._candidates = 0  # of `_order`, those that the budget counts
        self._begin = time.monotonic() - elapsed
        self._running: dict[str, int] = {}
        self._steps_of: dict[str, int] = {}  # of running candidates, so far
        self._pending: list[Trial] = []
        self._order: list[int] = []  # trials that are not rejected
        self._evaluations: dict[str, list[int]] = {}  # NCode -> its trials, for repeats
        self._twins: dict[int, list[int]] = {}  # running trial -> those that wait for its result
        self._unobserved: list[Trial] = []
        self._observed = 0  # how many of `_order` the designer has been told of, with a lag
        self._rejections = 0
        self._alike: tuple[str, int] = ("", 0)  # what this session's candidates failed of, one after the other
        self._expected, self._known = expected_steps, False
        self._own = budget.own
        self._env_steps = self._tokens = 0
        for t in study.trials:
            self._count(t)
            if t.status == "running":
                if t.survivor is not None or not survivors:
                    self._queue(t)
            elif t.status != "rejected":
                self._unobserved.append(t)
        if first is not None and not len(study):
            self._admit(first)

    @property
    def seconds(self) -> float:
        """Wall time of the search so far."""
        return time.monotonic() - self._begin

    def run(self) -> str:
        """Searches until the budget is spent.

        Returns:
            Why it ended, if not because all candidates are there; else "".

        Raises:
            LacerError: the study cannot be written, or the designer cannot work at all.
            DesignerStopped: after what runs is finished.
        """
        stopped: DesignerStopped | None = None
        asker = _Asker(self.designer, self.executor, inline=isinstance(self.executor, InProcess))
        try:
            while True:
                stop = self._spent()
                wanted = 0 if stop is not None or stopped is not None or asker.busy else self._wanted()
                if wanted:
                    asker.ask(self._view(), wanted, self._news())
                try:
                    proposals = asker.answers()
                except DesignerStopped as e:
                    stopped, proposals = e, list(e.proposals)
                for proposal in proposals:
                    self._admit(proposal)
                late = stop in ("seconds", "failures")
                self._submit(late)
                if stopped is not None and not self._running and (not self._pending or late):
                    raise stopped
                if stop is not None and not self._running and not asker.busy and (not self._pending or late):
                    return self._why_ended(stop)
                # After new proposals there may be more to ask for: that does not wait.
                for event in self.executor.poll(0.0 if proposals else 0.25):
                    self._handle(event)
        finally:
            asker.close()

    # -- proposals ----------------------------------------------------------------------------------------------------

    def _wanted(self) -> int:
        """How many proposals to ask for now."""
        want = self.executor.free + self._ahead - len(self._pending)
        if self._lag is not None:
            due = max(0, len(self._order) - self._lag + 1)
            ready = all(self.study[n].status != "running" for n in self._order[:due])
            want = 1 if ready else 0
        if want > 0:  # what a designer proposes at once is made from the same results
            want = max(want, getattr(self.designer, "batch", 1))
        if self.budget.candidates is not None:
            want = min(want, self.budget.candidates - self._candidates)
        if self.budget.env_steps is not None and self._expected:
            left = self.budget.env_steps - self._env_steps - self._own
            started = len(self._running) + len(self._pending)
            want = min(want, left // self._expected - started - self.budget.reserve)
            if not self._known:  # an evaluation may take as much as the training
                want = min(want, max(left // (2 * self._expected) - self.budget.reserve, 1) - started)
        return max(0, want)

    def _view(self) -> Study:
        if self._lag is None:
            return self.study.view()
        return self.study.view(self._order[max(0, len(self._order) - self._lag + 1):])

    def _news(self) -> list[Trial]:
        """Results that the designer has not been told of: in the order of trials where a lag makes it repeatable."""
        if self._lag is None:
            news, self._unobserved = self._unobserved, []
            return news
        due = max(self._observed, len(self._order) - self._lag + 1)
        news = [self.study[n] for n in self._order[self._observed:due]]
        self._observed = due
        return news

    def _admit(self, proposal: Proposal) -> None:
        """Records a proposal and, if there is nothing against it, lines it up."""
        if not proposal.rejected:
            assert proposal.point is not None
            code = self.study.space.to_ncode(proposal.point)
            before = self.study.evaluated(code)
            reason = ""
            if before is not None and self._repeats == "reject":
                reason = f"the same encoder as #{before}"
            elif before is None and self._why_not is not None:
                reason = self._why_not(proposal)
            if reason:
                proposal = replace(proposal, rejected=reason)
        trial = self.study.reject(proposal) if proposal.rejected else self.study.start(proposal)
        self._count(trial)
        if trial.status == "rejected":
            self._rejections += 1
            self._listener.rejected(trial)
        else:
            self._rejections = 0
            self._queue(trial)

    def _count(self, trial: Trial) -> None:
        self._env_steps += trial.env_steps
        self._tokens += trial.tokens
        if "env_steps" in trial.proposal.meta:
            self._own = 0
        self._learn_cost(trial)
        if trial.status != "rejected":
            self._order.append(trial.number)
            self._candidates += (trial.survivor is not None) == self._survivors
            self._evaluations.setdefault(trial.ncode, []).append(trial.number)

    def _learn_cost(self, trial: Trial) -> None:
        """What a candidate is expected to take; without what the designer spent before it."""
        if trial.status == "ok" and trial.evaluation is not None:
            self._expected, self._known = max(self._expected, trial.evaluation.cost.env_steps), True

    def _queue(self, trial: Trial) -> None:
        """Lines a running trial up, or lets it wait for the same encoder's result."""
        original = self._evaluations[trial.ncode][0]
        if self._repeats != "reuse" or original == trial.number or trial.survivor is not None:
            self._pending.insert(0 if trial.passed else len(self._pending), trial)
        elif self.study[original].status == "running":
            self._twins.setdefault(original, []).append(trial.number)
        else:
            self._copy(original, trial.number)

    def _copy(self, original: int, twin: int) -> None:
        """The result of an encoder is that of its twin too, at no cost."""
        evaluation = self.study[original].evaluation
        assert evaluation is not None
        cost = Cost(parameters=evaluation.cost.parameters, parameters_by_module=evaluation.cost.parameters_by_module)
        self._tell(None, twin, evaluation.model_copy(update={"cost": cost}))

    # -- evaluations --------------------------------------------------------------------------------------------------

    def _submit(self, late: bool) -> None:
        while self._pending and self.executor.free and not (late and not self._pending[0].passed):
            trial = self._pending.pop(0)
            key = f"#{trial.number}"
            self._running[key] = trial.number
            repeat = self._evaluations[trial.ncode].index(trial.number)
            self.executor.submit(key, self._job(trial, repeat))
            self._listener.started(key, trial)

    def _handle(self, event: Event) -> None:
        if event.key not in self._running:
            return
        if event.evaluation is None:
            assert event.progress is not None
            self._steps_of[event.key] = int(event.progress.get("steps", 0))
            self._listener.progress(event)
            return
        evaluation, steps = event.evaluation, self._steps_of.pop(event.key, 0)
        if not evaluation.ok and not evaluation.cost.env_steps and steps:  # it failed, but its steps were spent
            evaluation = evaluation.model_copy(update={"cost": evaluation.cost.model_copy(update={"env_steps": steps})})
        number = self._running.pop(event.key)
        trial = self.study[number]
        if evaluation.paused_at is not None and self._judge is not None:
            unknown = () if self._lag is None else self._order[max(0, self._order.index(number) - self._lag + 1):]
            judged = self._judge(trial, evaluation, [t for t in self.study.trials if t.number not in unknown])
            if isinstance(judged, Rung):
                trial = self.study.add_rung(number, judged)
                self._pending.insert(0, trial)
                self._listener.passed(event.key, trial)
                return
            evaluation = judged
        elif trial.passed:
            evaluation = charged(evaluation, trial.passed)
        self._tell(event.key, number, evaluation)
        for twin in self._twins.pop(number, []):
            self._copy(number, twin)

    def _tell(self, key: str | None, number: int, evaluation: Evaluation) -> None:
        before = self.study[number].env_steps
        trial = self.study.finish(number, evaluation)
        self._env_steps += trial.env_steps - before
        self._learn_cost(trial)
        if trial.status == "failed":
            self._alike = (trial.reason, self._alike[1] + 1 if trial.reason == self._alike[0] else 1)
        else:
            self._alike = ("", 0)
        self._unobserved.append(trial)
        self._listener.finished(key, trial)

    # -- the end ------------------------------------------------------------------------------------------------------

    def _spent(self) -> str | None:
        """The budget that is spent, if one is."""
        b = self.budget
        if b.seconds is not None and self.seconds >= b.seconds:
            return "seconds"
        if self._alike[1] >= SAME_FAILURES and not self.study.count("ok"):
            return "failures"
        if b.candidates is not None and self._candidates >= b.candidates:
            return "candidates"
        if b.tokens is not None and self._tokens >= b.tokens:
            return "tokens"
        started = len(self._running) + len(self._pending) + b.reserve
        if b.env_steps is not None and self._env_steps + self._own + (started + 1) * self._expected > b.env_steps:
            return "env_steps"
        return "rejections" if self._rejections >= self._patience else None

    def _why_ended(self, stop: str) -> str:
        b = self.budget
        if stop == "failures":
            reason, n = self._alike
            return f"{n} candidates in a row failed alike, and none has a result: {reason[:200]}"
        if stop == "seconds":
            left = f"; {len(self._pending)} proposed candidates wait for a resumed search" if self._pending else ""
            return f"the budget of {b.seconds:,g} s is spent{left}"
        if stop == "tokens":
            return f"the budget of {b.tokens:,} LLM tokens is spent"
        if stop == "env_steps":
            return f"{self._env_steps:,} of the budget of {b.env_steps:,} environment steps are spent"
        return f"{self._patience} proposals in a row were rejected" if stop == "rejections" else ""


class _Asker:
    """Asks the designer in a thread of its own, so results are stored and candidates started while an LLM thinks."""

    def __init__(self, designer: Designer, executor: Executor, inline: bool) -> None:
        self._designer, self._executor, self._inline = designer, executor, inline
        self._questions: queue.SimpleQueue[tuple[Study, int, list[Trial]] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[list[Proposal] | BaseException] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.busy = False

    def ask(self, view: Study, n: int, news: list[Trial]) -> None:
        self.busy = True
        if self._inline:
            try:
                self._answers.put(self._ask(view, n, news))
            except DesignerStopped as e:
                self._answers.put(e)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, daemon=True)
            self._thread.start()
        self._questions.put((view, n, news))

    def _serve(self) -> None:
        while (question := self._questions.get()) is not None:
            try:
                answer: list[Proposal] | BaseException = self._ask(*question)
            except BaseException as e:  # handed to the driver, which raises it
                answer = e
            self._answers.put(answer)
            self._executor.wake()

    def _ask(self, view: Study, n: int, news: list[Trial]) -> list[Proposal]:
        for trial in news:
            self._designer.observe(trial)
        return self._designer.propose(view, n)

    def answers(self) -> list[Proposal]:
        """Proposals that have come in since the last call."""
        try:
            got = self._answers.get_nowait()
        except queue.Empty:
            return []
        self.busy = False
        if isinstance(got, BaseException):
            raise got
        return got

    def close(self) -> None:
        """The thread ends after what it is doing now."""
        self._questions.put(None)
