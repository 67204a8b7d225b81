"""The loop of a search: order, repeats, budgets, failures, several processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helper_objectives
import numpy as np
import optuna
import pytest

from lacer.agents import Call, Cost, Evaluation
from lacer.envs import LacerError
from lacer.search import Decision, Proposal, SearchSpace, Study, plain, search
from lacer.search.config import SearchConfig
from lacer.search.designers.base import Designer, fresh_sample
from lacer.search.designers.evolution import Evolution
from lacer.search.engine import Budget, Engine, Repeats
from lacer.search.executors import Event, Executor, InProcess, Job
from lacer.search.fidelity import Fidelity
from lacer.search.study import Trial

SPACE = SearchSpace([Decision(f"d{i}", (0, 1, 2, 3)) for i in range(6)])
SMALL = SearchSpace([Decision("a", (0, 1, 2))])
Function = Callable[[dict[str, Any]], Any]


class Jumbled(Executor):
    """Several jobs at once whose results arrive in random order."""

    def __init__(self, function: Function, slots: int, seed: int) -> None:
        self.inner, self.slots = InProcess(function), slots
        self.waiting: list[tuple[str, Job]] = []
        self.rng = np.random.default_rng(seed)
        self.woken = threading.Event()
        self.most = 0

    @property
    def free(self) -> int:
        return self.slots - len(self.waiting)

    def submit(self, key: str, job: Job) -> None:
        self.waiting.append((key, job))
        self.most = max(self.most, len(self.waiting))

    def poll(self, timeout: float) -> list[Event]:
        # Most of the time nothing has come in yet.
        if not self.waiting or self.rng.random() < 0.8:
            self.woken.wait(0.001)
            self.woken.clear()
            return []
        self.inner.submit(*self.waiting.pop(self.rng.integers(len(self.waiting))))
        return self.inner.poll(0)

    def wake(self) -> None:
        self.woken.set()

    def close(self) -> None:
        pass


def engine(study: Study, designer: Designer, executor: Executor, **kwargs: Any) -> Engine:
    kwargs.setdefault("budget", Budget(candidates=24))
    return Engine(study, designer, executor, lambda t, repeat: Call(
        function="", point=t.proposal.point or {}, seed=repeat), **kwargs)


def codes(study: Study) -> list[str]:
    return [t.ncode for t in study.trials]


# -- order ------------------------------------------------------------------------------------------------------------


def test_deterministic_whatever_order_results_arrive_in() -> None:
    seen = set()
    for seed in range(5):
        study, executor = Study(SPACE), Jumbled(helper_objectives.smooth, 4, seed)
        assert engine(study, Evolution(7), executor, lag=4).run() == ""
        assert executor.most >= 3, "workers do work at once"
        seen.add(tuple(codes(study)))
    assert len(seen) == 1
    free = set()
    for seed in range(5):
        study = Study(SPACE)
        engine(study, Evolution(7), Jumbled(helper_objectives.smooth, 4, seed)).run()
        free.add(tuple(codes(study)))
    assert len(free) > 1, "without it the order does matter, so the test can fail"


def test_deterministic_in_processes_and_resumed(tmp_path: Path) -> None:
    """Real processes with jittered times, stopped by a budget in the middle, resumed: as one search."""
    options: dict[str, Any] = {"space": SPACE, "objective": helper_objectives.jittered, "designer": "evolution",
                               "workers": 2, "deterministic": True, "quiet": True}
    whole = Study(SPACE)
    engine(whole, Evolution(0), InProcess(helper_objectives.smooth), lag=2).run()
    part = search(**options, candidates=11, out=tmp_path / "run")
    assert len(part.study) == 11
    rest = search(**options, candidates=24, resume=tmp_path / "run")
    assert [(t.ncode, t.objective) for t in rest.study.trials] == [(t.ncode, t.objective) for t in whole.trials]
    with pytest.raises(LacerError, match="workers cannot change"):
        search(**{**options, "workers": 3}, candidates=25, resume=tmp_path / "run")


class Nosy(Designer):
    """Writes down what it knows when it is asked, and what it was told."""

    name = "nosy"

    def __init__(self) -> None:
        super().__init__(0)
        self.knew: list[tuple[int, int]] = []
        self.told: list[int] = []

    def propose(self, study: Study, n: int) -> list[Proposal]:
        self.knew.append((len(study), len(study.finished)))
        return [Proposal(fresh_sample(study, [], self.rng(study)), self.name)]

    def observe(self, trial: Trial) -> None:
        self.told.append(trial.number)


def test_a_lag_hides_exactly_the_last_results() -> None:
    designer = Nosy()
    engine(Study(SPACE), designer, Jumbled(helper_objectives.smooth, 3, 0), lag=3).run()
    assert designer.knew == [(n, max(0, n - 2)) for n in range(24)]
    assert designer.told == list(range(21)), "told in order, and not of what is hidden"


def test_results_are_told_once_and_before_the_next_question() -> None:
    designer = Nosy()
    engine(Study(SPACE), designer, InProcess(helper_objectives.smooth)).run()
    assert designer.knew == [(n, n) for n in range(24)]
    assert designer.told == list(range(23))


def test_thinking_is_hidden_behind_evaluations() -> None:
    """With one proposal ahead the designer is asked as soon as the one before has started, not when it has ended."""
    for ahead in (0, 1):
        designer = Nosy()
        engine(Study(SPACE), designer, Threaded(helper_objectives.a_while), ahead=ahead,
               budget=Budget(candidates=6)).run()
        assert designer.knew == [(n, max(0, n - ahead)) for n in range(6)]


class Threaded(Executor):
    """One job at a time in a thread."""

    def __init__(self, function: Function) -> None:
        self.inner, self.thread = InProcess(function), None  # type: ignore[assignment]
        self.thread: threading.Thread | None
        self.out: list[Event] = []
        self.news = threading.Event()

    @property
    def free(self) -> int:
        return int(self.thread is None)

    def submit(self, key: str, job: Job) -> None:
        def work() -> None:
            self.inner.submit(key, job)
            self.out = self.inner.poll(0)
            self.news.set()

        self.thread = threading.Thread(target=work)
        self.thread.start()

    def poll(self, timeout: float) -> list[Event]:
        self.news.wait(timeout)
        self.news.clear()
        out, self.out = self.out, []
        if out:
            self.thread = None
        return out

    def wake(self) -> None:
        self.news.set()

    def close(self) -> None:
        pass


# -- rungs ------------------------------------------------------------------------------------------------------------


def in_rungs(point: dict[str, Any]) -> Evaluation:
    """A run that pauses after 10 and 20 of 40 steps and shows there what it will have in the end, and some noise."""
    decisions = {k: v for k, v in point.items() if k != "rung"}
    score = helper_objectives.smooth(decisions)
    noise = 0.1 * np.random.default_rng([*map(int, decisions.values()), point["rung"]]).normal()
    if point["rung"] == 2:
        return Evaluation(objective=score, cost=Cost(env_steps=45))
    steps = 10 * (point["rung"] + 1)
    return Evaluation(paused_at=steps, curve=[(steps, score + noise)], cost=Cost(env_steps=steps))


def halving(study: Study, executor: Executor, **kwargs: Any) -> tuple[Engine, list[int]]:
    """An engine with rungs, and how many candidates were unfinished whenever a job was made."""
    fidelity, open_trials = Fidelity(rungs=(10, 20), reduction=2), list[int]()

    def job(trial: Trial, repeat: int) -> Call:
        open_trials.append(study.count("running"))
        return Call(function="", point={**(trial.proposal.point or {}), "rung": len(trial.passed)})

    kwargs.setdefault("budget", Budget(candidates=24))
    made = Engine(study, Evolution(7), executor, job, judge=lambda t, e, others: fidelity.judge(
        t, e, others, study.objective), **kwargs)
    return made, open_trials


def outcomes(study: Study) -> tuple[tuple[str, str, int, float | None], ...]:
    return tuple((t.ncode, t.status, len(t.rungs), t.objective) for t in study.trials)


def test_candidates_go_on_at_once_and_nobody_waits_for_a_bracket() -> None:
    study, executor = Study(SPACE), Jumbled(in_rungs, 4, 0)
    made, unfinished = halving(study, executor)
    assert made.run() == ""
    assert executor.most == 4
    assert max(unfinished) == 4, "none is laid aside at a rung"
    assert study.count("ok") + study.count("pruned") == 24
    assert study.count("pruned") > 6
    for t in study.trials:
        assert t.env_steps == (45 if t.status == "ok" else t.rungs[-1].steps)
        assert [r.steps for r in t.rungs] == [10, 20][:len(t.rungs)]
        assert t.status == "ok" or t.reason.startswith(f"pruned after {t.rungs[-1].steps} steps: return ")


def test_rungs_are_deterministic_whatever_order_results_arrive_in() -> None:
    seen, free = set(), set()
    for seed in range(4):
        study = Study(SPACE)
        halving(study, Jumbled(in_rungs, 4, seed), lag=4)[0].run()
        seen.add(outcomes(study))
        study = Study(SPACE)
        halving(study, Jumbled(in_rungs, 4, seed))[0].run()
        free.add(outcomes(study))
    assert len(seen) == 1
    assert len(free) > 1, "without it the order does matter, so the test can fail"


def test_pruned_candidates_leave_steps_to_others_and_the_reserve_is_kept() -> None:
    study = Study(SPACE)
    why = halving(study, InProcess(in_rungs), expected_steps=45, budget=Budget(env_steps=900, reserve=4))[0].run()
    spent = sum(t.env_steps for t in study.trials)
    assert 900 - 5 * 45 < spent <= 900 - 4 * 45
    assert f"{spent} of the budget of 900" in why
    assert len(study) > (900 - 4 * 45) // 45


def test_a_candidate_at_a_rung_is_finished_when_the_time_is_over() -> None:
    study = Study(SPACE)
    made, _ = halving(study, InProcess(in_rungs), budget=Budget(candidates=24, seconds=60))

    def passed(key: str, trial: Trial) -> None:
        made._begin -= 60

    made._listener.passed = passed  # type: ignore[method-assign]
    assert "the budget of 60 s is spent" in made.run()
    assert [t.status for t in study.trials] == ["ok"]


# -- repeats ----------------------------------------------------------------------------------------------------------


class Stubborn(Designer):
    """Proposes the same two encoders again and again."""

    name = "stubborn"

    def propose(self, study: Study, n: int) -> list[Proposal]:
        return [Proposal({"a": (len(study) + i) % 2}, self.name) for i in range(n)]


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("repeats", ["reject", "reuse", "add"])
def test_repeats(repeats: Repeats, slots: int) -> None:
    calls: list[int] = []

    def noisy(point: dict[str, Any]) -> float:
        calls.append(point["a"])
        return point["a"] + (10.0 if calls.count(point["a"]) == 1 else 0.0)

    study = Study(SMALL)
    end = engine(study, Stubborn(), Jumbled(noisy, slots, 1), repeats=repeats, budget=Budget(candidates=8)).run()
    if repeats == "reject":
        assert sorted(calls) == [0, 1]
        assert study.count("rejected") in (50, 51)
        assert study.trials[2].reason in ("the same encoder as #0", "the same encoder as #1")
        assert "50 proposals in a row were rejected" in end
    else:
        assert end == ""
        assert [t.status for t in study.trials] == ["ok"] * 8
        assert len(calls) == (2 if repeats == "reuse" else 8)
    if repeats == "reuse":
        assert [t.objective for t in study.trials] == [10.0, 11.0] * 4
        assert all(t.evaluation is not None and t.evaluation.cost.total_seconds == 0 for t in study.trials[2:])
    if repeats == "add":  # the mean counts: one lucky evaluation does not make the best
        study.finish(study.start(Proposal({"a": 2}, "x")).number, Evaluation(objective=4.0))
        assert study.best is not None
        assert study.best.ncode == "2"


# -- budgets ----------------------------------------------------------------------------------------------------------


def costing(steps: int) -> Function:
    return lambda point: Evaluation(objective=1.0, cost=Cost(env_steps=steps))


class Training(Nosy):
    """Trains something itself and asks an LLM, 100 steps and 10 tokens a proposal."""

    def propose(self, study: Study, n: int) -> list[Proposal]:
        point = fresh_sample(study, [], self.rng(study))
        return [Proposal(point, self.name, meta={"env_steps": 100, "tokens_in": 7, "tokens_out": 3})]


@pytest.mark.parametrize("slots", [1, 3])
def test_budget_of_steps_is_kept_and_charges_designers(slots: int) -> None:
    study = Study(SPACE)
    end = engine(study, Training(), Jumbled(costing(1000), slots, 0), expected_steps=900,
                 budget=Budget(candidates=99, env_steps=6_000)).run()
    spent = sum(t.env_steps for t in study.trials)
    assert study.count("ok") == 5
    assert spent == 5 * 1100
    assert end == "5,500 of the budget of 6,000 environment steps are spent"


def test_budget_of_tokens() -> None:
    study = Study(SPACE)
    end = engine(study, Training(), InProcess(helper_objectives.smooth), budget=Budget(99, tokens=45)).run()
    assert study.count("ok") == 5
    assert end == "the budget of 45 LLM tokens is spent"


def test_budget_of_time_over_sessions(tmp_path: Path) -> None:
    options: dict[str, Any] = {"space": SPACE, "objective": helper_objectives.a_while, "designer": "random",
                               "max_seconds": 0.5, "quiet": True}
    first = search(**options, out=tmp_path / "run")
    done = first.study.count("ok")
    assert 1 <= done <= 3, "at 0.2, 0.4, and the one that was running finishes at 0.6 s"
    assert first.ended == "the budget of 0.5 s is spent"
    again = search(**options, resume=tmp_path / "run")
    assert len(again.study) == done, "the time of the first session counts"
    more = search(**{**options, "max_seconds": 60, "candidates": done + 2}, resume=tmp_path / "run")
    assert more.study.count("ok") == done + 2


# -- failures ---------------------------------------------------------------------------------------------------------

MOODS = SearchSpace([Decision("mood", ("raise", "prune", "nan", "die", "well"))])


def test_failures_are_results(tmp_path: Path) -> None:
    result = search(space=MOODS, objective=helper_objectives.moody, designer="random", candidates=5, workers=2,
                    out=tmp_path / "run", quiet=True)
    got = {t.proposal.point["mood"]: (t.status, t.reason) for t in result.study.trials if t.proposal.point}
    assert got.pop("die")[1].startswith("the run's process was killed")
    assert got == {"raise": ("failed", "RuntimeError: boom"), "prune": ("pruned", "hopeless"),
                   "nan": ("failed", "the objective is nan"), "well": ("ok", "")}
    assert result.best_point == {"mood": "well"}
    stored = optuna.load_study(storage=f"sqlite:///{tmp_path}/run/study.db", study_name=None)
    assert {t.params["mood"]: t.state.name for t in stored.trials} == {
        "raise": "FAIL", "prune": "PRUNED", "nan": "FAIL", "die": "FAIL", "well": "COMPLETE"}


def test_out_of_memory_and_time(tmp_path: Path) -> None:
    options: dict[str, Any] = {"space": SMALL, "objective": helper_objectives.greedy, "designer": "random",
                               "candidates": 1, "executor": "process", "quiet": True}
    [greedy] = search(**options, memory=0.3).study.trials
    assert greedy.reason.startswith("out of memory: it used 0.")
    assert greedy.reason.endswith("the limit is 0.30 GB")
    [late] = search(**options, timeout=0.5).study.trials
    assert late.reason == "time-out"


class Broken(Designer):
    name = "broken"

    def propose(self, study: Study, n: int) -> list[Proposal]:
        raise LacerError("no idea")


@pytest.mark.parametrize("executor", [InProcess(helper_objectives.smooth), Jumbled(helper_objectives.smooth, 2, 0)])
def test_a_designer_that_cannot_work_ends_the_search(executor: Executor) -> None:
    with pytest.raises(LacerError, match="no idea"):
        engine(Study(SPACE), Broken(), executor).run()


# -- any objective, any space -----------------------------------------------------------------------------------------


def test_any_objective_on_any_space(tmp_path: Path) -> None:
    width = {"f": lambda p: p["d0"] - p["d1"]}
    best = search(space=SPACE, objective=width["f"], designer="evolution", candidates=150, quiet=True)
    assert best.best_value == 3
    assert best.best_point is not None
    assert best.best_point["d0"] == 3
    least = search(space=SPACE, objective=width["f"], direction="minimize", metric="delay", candidates=150,
                   quiet=True,
                   out=tmp_path / "run")
    assert least.best_value == -3
    stored = optuna.load_study(storage=f"sqlite:///{tmp_path}/run/study.db", study_name=None)
    assert stored.direction.name == "MINIMIZE"
    assert stored.metric_names == ["delay"]
    assert stored.best_value == -3


def test_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(LacerError, match="put it at the top level of a module"):
        search(space=SPACE, objective=lambda p: 0.0, workers=2)
    with pytest.raises(LacerError, match="objective= needs space="):
        search(objective=helper_objectives.smooth)  # type: ignore[call-overload]
    with pytest.raises(LacerError, match="final_steps: only for a search with an environment"):
        search(space=SPACE, objective=helper_objectives.smooth, final_steps=5)
    with pytest.raises(LacerError, match="needs objective="):
        search("lacer/KnownSources-v0", space=SPACE)
    with pytest.raises(LacerError, match="did you mean 'evolution'"):
        search(space=SPACE, objective=helper_objectives.smooth, designer="evolutoin")
    search(space=SMALL, objective=helper_objectives.smooth, candidates=1, out=tmp_path / "run", quiet=True)
    with pytest.raises(LacerError, match="exists already"):
        search(space=SMALL, objective=helper_objectives.smooth, out=tmp_path / "run")
    with pytest.raises(LacerError, match="trial 0 is not of this search space"):
        search(space=SPACE, objective=helper_objectives.smooth, resume=tmp_path / "run")
    with pytest.raises(LacerError, match="has another objective"):
        search(space=SMALL, objective=helper_objectives.smooth, direction="minimize", resume=tmp_path / "run")


# -- batches and budgets ----------------------------------------------------------------------------------------------


class Several(Designer):
    """Proposes some encoders at once, as an LLM designer does; may train by itself before."""

    name = "several"

    def __init__(self, batch: int, own: int = 0) -> None:
        super().__init__(0)
        self.batch, self.own = batch, own
        self.made: list[int] = []

    def propose(self, study: Study, n: int) -> list[Proposal]:
        out: list[Proposal] = []
        for _ in range(min(n, self.batch)):
            first = self.own and not self.made and not out
            out.append(Proposal(fresh_sample(study, out, self.rng(study)), self.name,
                                meta={"env_steps": self.own} if first else {}))
        self.made.append(len(out))
        return out


def costly(point: dict[str, Any]) -> Evaluation:
    return Evaluation(objective=helper_objectives.smooth(point), cost=Cost(env_steps=300))


@pytest.mark.parametrize("lag", [None, 4])
def test_a_batch_is_asked_for_as_a_whole(lag: int | None) -> None:
    for slots in (2, 4):
        d = Several(5)
        engine(Study(SPACE), d, Jumbled(helper_objectives.smooth, slots, 0), ahead=1, lag=lag).run()
        assert d.made == [5, 5, 5, 5, 4]


@pytest.mark.parametrize("slots", [2, 16, 48])
@pytest.mark.parametrize("own", [0, 5000])
def test_many_workers_keep_to_the_environment_steps(slots: int, own: int) -> None:
    """A designer's own steps are not told before its first proposal, those of an evaluation not before a first end."""
    study = Study(SPACE)
    budget = Budget(50, own + 3000, own=own)
    engine(study, Several(99, own), Jumbled(costly, slots, 0), budget=budget, expected_steps=200).run()
    assert sum(t.env_steps for t in study.trials) == own + 3000


def test_further_seeds_leave_waiting_candidates_alone() -> None:
    """Those that a budget of time has left are for a resumed search, not for the one that trains survivors."""
    study = Study(SPACE)
    for value in (0, 1):
        trial = study.start(Proposal({f"d{i}": value for i in range(6)}, "x"))
    study.finish(0, Evaluation(objective=1.0))
    Engine(study, Several(1), InProcess(helper_objectives.smooth), lambda t, repeat: Call(
        function="", point=t.proposal.point or {}, seed=repeat), budget=Budget(0), survivors=True).run()
    assert study[trial.number].status == "running"


def test_the_mean_of_an_encoder_is_its_value(tmp_path: Path) -> None:
    study = Study(SMALL)
    for a, value in ((1, 4.0), (2, 6.0), (1, 10.0)):
        study.finish(study.start(Proposal({"a": a}, "x")).number, Evaluation(objective=value))
    assert study.best is study[0]
    assert study.best_value == 7.0


def test_a_resumed_search_keeps_its_executor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    make = plain.make_executor

    def noted(config: SearchConfig, *args: Any) -> Executor:
        seen.append(config.executor)
        return make(config, *args)

    monkeypatch.setattr(plain, "make_executor", noted)
    options: dict[str, Any] = {"space": SPACE, "objective": helper_objectives.smooth, "designer": "random",
                               "quiet": True}
    search(**options, candidates=2, executor="process", workers=2, out=tmp_path / "run")
    search(**options, candidates=3, resume=tmp_path / "run")
    assert seen == ["process", "process"]


@pytest.mark.parametrize("slots", [1, 3])
def test_a_search_whose_candidates_all_fail_alike_ends(slots: int) -> None:
    def fails(point: dict[str, Any]) -> float:
        if broken:
            raise RuntimeError("no licence for the simulator")
        return helper_objectives.smooth(point)

    broken, study = True, Study(SPACE)
    why = engine(study, Evolution(0), Jumbled(fails, slots, 0)).run()
    assert 5 <= len(study) < 5 + slots
    assert " candidates in a row failed alike, and none has a result: RuntimeError: no licence" in why
    broken = False
    assert engine(study, Evolution(0), Jumbled(fails, slots, 0)).run() == "", "mended, it goes on"
    assert study.count("ok") + study.count("failed") == 24


def test_other_failures_do_not_end_a_search() -> None:
    failures = iter(range(100))

    def fails(point: dict[str, Any]) -> float:
        raise RuntimeError(f"failure {next(failures)}")

    study = Study(SPACE)
    engine(study, Evolution(0), InProcess(fails)).run()
    assert study.count("failed") == 24


def test_a_function_that_always_fails_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(point: dict[str, Any]) -> float:
        raise ZeroDivisionError("division by zero")

    with pytest.warns(UserWarning, match="no candidate has a result; the first one failed: .*division by zero"):
        result = search(space=SPACE, objective=fails, candidates=2)
    assert result.best_value is None
    assert "#0 failed: ZeroDivisionError: division by zero" in capsys.readouterr().err
