"""The search from top to bottom: ask the designer, check, evaluate, record; then train the winner and report."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import lacer.encoders
from lacer.agents import Agent, Evaluation, Protocol, Rung, RunRequest, WarmStart, load, versions
from lacer.encoders import EncoderSpec
from lacer.envs import LacerError, Objective, TaskCard, task_card
from lacer.search.config import (
    SearchConfig,
    expert_spec,
    memory_share,
    own_steps,
    resumed,
    validate,
    worker_count,
)
from lacer.search.designers.base import Designer, check_options, designer_class, make_plain
from lacer.search.designers.spark import rates
from lacer.search.designers.training import TrainingDesigner
from lacer.search.engine import MAX_REJECTIONS, Budget, Engine, Listener
from lacer.search.executors import Event, Executor, InProcess, ProcessPool, clean_environment
from lacer.search.fidelity import unchanged
from lacer.search.files import is_locked, read_json, write_config, write_whole
from lacer.search.outcome import EXPERT, NOOP, WINNER, Outcome, describe_usage, total_usage
from lacer.search.progress import Display, clock, result_line
from lacer.search.space import EncoderSpace, Point, SearchSpace, load_space, read_space
from lacer.search.storage import check_server, has_password, sqlite_url, study_names, without_password
from lacer.search.study import Proposal, StoredStudy, Trial
from lacer.search.survivors import Seeds
from lacer.search.tracking import Media, TensorBoard, Totals, Tracker
from lacer.search.trainer import Trainer
from lacer.search.wandb_tracker import WandB, wandb_mode

if TYPE_CHECKING:
    from lacer.search.plain import PointResult

log = logging.getLogger("lacer")

WITHOUT_LLM = "ranker"
"""The designer that ``auto`` takes where there is no LLM; docs/benchmarks.md says on which tables it was ahead."""

FINAL_SEEDS = 500_000
"""Distance between the seeds of the evaluation episodes that choose and of those that are reported."""

REPEAT_SEEDS = 100_000
"""Distance between the training seeds of an encoder that is evaluated several times."""


@dataclass(frozen=True)
class SearchResult:
    """What :func:`search` returns."""

    folder: Path
    outcome: Outcome

    @property
    def report(self) -> Path:
        """The report, one HTML file."""
        return self.folder / "report.html"

    @property
    def best(self) -> Agent:
        """The trained winner, loaded from ``best/``. Raises LacerError if the search has none."""
        if self.outcome.winner is None:
            raise LacerError("the search has no winner: none of its candidates has a result, see outcome.trials")
        return load(self.folder / "best")


@dataclass(frozen=True)
class Plan:
    """A checked configuration: everything that can go wrong before it costs anything has been looked at."""

    config: SearchConfig
    card: TaskCard
    space: EncoderSpace
    expert: Point
    designer: str

    @property
    def total_steps(self) -> int:
        """Environment steps of all training runs."""
        c = self.config
        own = own_steps(c) if designer_class(self.designer).trains else 0
        return own + (c.candidates + further_runs(c)) * c.protocol.steps + 2 * c.final_steps


def plan(config: SearchConfig) -> Plan:
    """Checks a configuration.

    Raises:
        LacerError: unknown environment, designer, block or option; an expert's encoder that does not fit.
    """
    card = task_card(config.env, **config.env_kwargs)
    task_card(config.env, **{**config.env_kwargs, **config.eval_env_kwargs})
    if config.max_env_steps is not None and config.max_env_steps < config.protocol.steps:
        raise LacerError(f"max_env_steps is {config.max_env_steps:,}, less than one candidate takes "
                         f"({config.protocol.steps:,}): raise it, or lower protocol.steps")
    name = config.designer
    if name == "auto":
        name = "lacer" if config.llm else WITHOUT_LLM
    trains = designer_class(name).trains
    config.fidelity.check(config.protocol, ray=config.executor == "ray", trains=trains)
    least = (1 + further_runs(config)) * config.protocol.steps
    if further_runs(config) and config.max_env_steps is not None and config.max_env_steps < least:
        raise LacerError(f"max_env_steps is {config.max_env_steps:,}, less than one candidate and the further seeds of "
                         f"the survivors take ({least:,}): raise it, or lower fidelity.survivors")
    check_options(name, config.designer_kwargs)
    if config.max_env_steps is not None and trains and config.max_env_steps < own_steps(config) + config.protocol.steps:
        raise LacerError(f"max_env_steps is {config.max_env_steps:,}, less than the designer {name!r} trains by itself "
                         f"({own_steps(config):,}) and one candidate takes ({config.protocol.steps:,}): raise it, or "
                         "lower designer_steps")
    space = load_space(config.space, card)
    expert = space.expert if space.expert is not None and config.expert is None else expert_spec(card, config.expert)
    try:
        point = space.from_spec(expert)
    except LacerError as e:
        raise LacerError(f"the expert's encoder is not part of the search space: {e}. Widen the space, or give "
                         "another one with --expert encoder.json") from None
    lacer.encoders.build(expert, card, lacer.encoders.TextTable("hash"))
    return Plan(config, card, space, point, name)


def check_expert(checked: Plan) -> None:
    """Raises LacerError if the expert's encoder breaks the limits."""
    c = checked.config
    try:
        c.limits.check(checked.space.to_spec(checked.expert), checked.card, c.text_model)
    except LacerError as e:
        raise LacerError(f"the expert's encoder, the first candidate, breaks the limits: {e}. Raise the limits, or "
                         "give a smaller one with --expert encoder.json") from None


def make_designer(name: str, config: SearchConfig, folder: Path | None) -> Designer:
    """A designer as configured. Raises LacerError if an LLM designer's key or model is missing, or an option wrong."""
    cls, options = designer_class(name), check_options(name, config.designer_kwargs)
    if cls.trains:
        assert folder is not None
        return make_plain(name, config.seed, trainer=_trainer(config, folder), **options)
    if not cls.needs_llm:
        return make_plain(name, config.seed, **options)
    from lacer.search.llm.base import llm_config

    if not config.llm:
        raise LacerError(f"the designer {name!r} needs an LLM: add e.g. --llm openai:MODEL (and OPENAI_API_KEY, or "
                         "--llm-base-url for a local server), or choose one that needs none, see `lacer designers`")
    llm = llm_config(config)
    if config.llm_temperature is None:
        llm = llm.model_copy(update={"temperature": cls.temperature})  # type: ignore[attr-defined]
    designer = cls(config.seed, llm=llm, run_dir=folder, batch=config.batch, **options)  # type: ignore[call-arg]
    designer.check()  # type: ignore[attr-defined]
    return designer


def asks_a_person(config: SearchConfig) -> bool:
    """Whether the language model is somebody at this terminal."""
    return (config.llm or "").startswith("human")


def _trainer(config: SearchConfig, folder: Path) -> Trainer:
    """Where a designer trains by itself: on this machine, with a candidate's limit of memory, and its limit of time for
    as many steps as a candidate takes."""
    def executor() -> Executor:
        if config.executor == "inprocess":
            return InProcess()
        share = max(1.0, own_steps(config) / config.protocol.steps)
        return ProcessPool(1, folder / "workers.log", config.timeout * share,
                           config.memory or memory_share(worker_count(config)))

    return Trainer(config.env, config.protocol, own_steps(config), config.env_kwargs, config.eval_env_kwargs,
                   config.text_model, folder, executor)


@overload
def search(env: str | None = None, *, out: str | Path | None = None, resume: str | Path | None = None,
           quiet: bool = False, **options: Any) -> SearchResult: ...


@overload
def search(*, space: SearchSpace, objective: Callable[[Point], Any], metric: str = "score",
           direction: Literal["maximize", "minimize"] = "maximize", out: str | Path | None = None,
           resume: str | Path | None = None, quiet: bool = False, **options: Any) -> PointResult: ...


def search(env: str | None = None, *, objective: Callable[[Point], Any] | None = None, metric: str = "score",
           direction: Literal["maximize", "minimize"] = "maximize", out: str | Path | None = None,
           resume: str | Path | None = None, quiet: bool = False, **options: Any) -> SearchResult | PointResult:
    """Searches an encoder, trains the winner and writes a report; or searches any space with any function.

    ::

        from lacer.search import search
        result = search("lacer/KnownSources-v0", designer="evolution", candidates=10, protocol={"steps": 5000})
        print(result.outcome.winner, result.report)
        action = result.best.predict(observation)

        from lacer.search import Decision, SearchSpace
        space = SearchSpace([Decision("width", (8, 16, 32)), Decision("depth", (1, 2, 3))])
        result = search(space=space, objective=lambda point: point["width"] / point["depth"], candidates=6)
        print(result.best_point, result.best_value)

    Args:
        env: registered environment id.
        objective: a function that takes a point of ``space`` (a dict) and returns a number, or an Evaluation; it may
            raise ``optuna.TrialPruned``. Any other exception is a failed candidate. By default it is called in this
            process; with ``workers=2`` or more in as many processes, which have to find it by its name.
        metric, direction: name of the objective, and ``"maximize"`` or ``"minimize"``.
        out: the run folder; default ``runs/<date-time-env-designer>``, with ``objective`` none. Must not exist.
        resume: an existing run folder to go on with; only budgets, workers, LLM and tracking may be changed. With
            ``objective``, space and objective are given again.
        quiet: nothing is printed.
        **options: fields of :class:`SearchConfig`; nested ones as dicts.

    Raises:
        LacerError: wrong input, before anything expensive starts; the study cannot be written.
        KeyboardInterrupt: on Ctrl-C, after everything is stopped and stored.
    """
    if env is not None:
        options["env"] = env
    if resume is not None and out is not None:
        raise LacerError("out and resume exclude each other: a resumed search stays in its folder")
    if objective is not None:
        from lacer.search.plain import search_points

        space = options.pop("space", None)
        if not isinstance(space, SearchSpace):
            raise LacerError("objective= needs space=, a SearchSpace")
        config = resumed(SearchConfig, Path(resume), options) if resume is not None else validate(options, "search()")
        folder = resume if resume is not None else out
        return search_points(space, objective, config, set(options), objective=Objective(metric, "", direction),
                             folder=None if folder is None else Path(folder), resume=resume is not None, quiet=quiet)
    if isinstance(options.get("space"), SearchSpace):
        raise LacerError("space= as a SearchSpace needs objective=, the function to search with; for an environment "
                         "give options by decision")
    if resume is not None:
        return run_search(resumed(SearchConfig, Path(resume), options), Path(resume), quiet, fresh=False)
    return run_search(validate(options, "search()"), None if out is None else Path(out), quiet, fresh=True)


@dataclass(frozen=True)
class Shared:
    """What several searches, one after the other, have in common; whoever made it closes it."""

    executor: Executor
    display: Display


def run_search(config: SearchConfig, folder: Path | None, quiet: bool, fresh: bool,
               shared: Shared | None = None) -> SearchResult:
    """:func:`search` of an environment with a checked configuration."""
    if isinstance(config.space, str):  # its content is kept with the run: a file may change before the run is resumed
        config = config.model_copy(update={"space": read_space(config.space)})
    if config.deterministic:  # how many results a proposal knows depends on it
        config = config.model_copy(update={"workers": worker_count(config)})
    checked = plan(config)
    if config.designer != checked.designer:  # "auto": with a model in a resumed search it would be another one
        config = config.model_copy(update={"designer": checked.designer})
        checked = replace(checked, config=config)
    if designer_class(checked.designer).trains:  # more candidates in a resumed search do not change it
        config = config.model_copy(update={"designer_steps": own_steps(config)})
        checked = replace(checked, config=config)
    if folder is None:
        name = checked.card.env_id.split("/")[-1].split(":")[-1]
        folder = Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{name}-{checked.designer}"
    if fresh and folder.exists():
        go_on = "To go on with it: lacer search --resume " + shlex.quote(str(folder)) + ". To start anew: "
        raise LacerError(f"{folder} exists already. {go_on if (folder / 'config.yaml').exists() else 'It is no run: '}"
                         "choose another folder with --out.")
    if fresh:
        check_expert(checked)
    if config.storage is not None:
        check_server(config.storage, (config.study_name or folder.name) if fresh else None)
    designer = make_designer(checked.designer, config, folder)
    designer.check_space(checked.space)
    try:
        folder.mkdir(parents=True, exist_ok=not fresh)
        with only_driver(folder), sigterm_as_interrupt():
            study = _open_study(checked, folder, fresh)
            return _Driver(checked, designer, study, folder, quiet, shared).run()
    except OSError as e:
        raise LacerError(f"cannot write the run folder {folder}: {e.strerror or e}") from None


def study_place(config: SearchConfig, folder: Path) -> tuple[str, str]:
    """Storage URL and study name of a run folder. Raises LacerError if its study file is damaged."""
    url = config.storage or sqlite_url(folder / "study.db")
    if config.storage is None and (folder / "study.db").exists():
        return url, study_names(url)[0]  # a renamed folder does not rename its study
    return url, config.study_name or folder.name


def store_config(config: SearchConfig, folder: Path, name: str, exclude: set[str] | None = None) -> None:
    """Writes ``config.yaml``, without a password and without some fields. Raises OSError."""
    stored = config.model_dump(mode="json", exclude=exclude)
    if config.storage is not None:
        stored |= {"storage": without_password(config.storage), "study_name": name}
    write_config(folder / "config.yaml", stored)


def _open_study(plan: Plan, folder: Path, fresh: bool) -> StoredStudy:
    """The study of a run folder, its other files written or checked.

    Raises:
        LacerError: it cannot be opened, made or read.
    """
    config = plan.config
    url, name = study_place(config, folder)
    # A run that was killed before its first trial has no study yet; a run with results must have it.
    begun = (folder / "events").is_dir()
    if begun and config.storage is None and not (folder / "study.db").exists():
        raise LacerError(f"{folder / 'study.db'} is missing. Restore it from a copy, or start a new run.")
    if (folder / "versions.json").exists():
        read_json(folder / "versions.json")
    else:
        write_whole(folder / "versions.json", json.dumps(provenance(config), indent=1) + "\n")
    store_config(config, folder, name)
    return StoredStudy(url, name, plan.space, create="no" if begun else "yes" if fresh else "if missing")


@contextlib.contextmanager
def only_driver(folder: Path) -> Iterator[None]:
    with (folder / "driver.lock").open("w") as lock:
        for last in (False, True):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if last:
                    raise LacerError(f"another process is working on {folder}; one driver at a time. To use more "
                                     "machines, let it use more workers: --executor ray") from None
                time.sleep(0.2)  # `lacer watch` looks at the lock for a moment
        yield


def is_driven(folder: Path) -> bool:
    """Whether a process of this machine is working on a run folder."""
    return is_locked(folder / "driver.lock")


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def provenance(config: SearchConfig) -> dict[str, Any]:
    """Versions, platform, git revision and seeds, as kept with every run."""
    try:
        git = subprocess.run(["git", "-C", str(Path(lacer.encoders.__file__).resolve().parent), "describe", "--always",
                              "--dirty", "--abbrev=12"], capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # not installed
        git = ""
    return {"packages": versions(), "platform": platform.platform(), "git": git or None,
            "seed": config.seed, "eval_seed": config.protocol.eval_seed,
            "final_eval_seed": config.protocol.eval_seed + FINAL_SEEDS}


def further_runs(config: SearchConfig) -> int:
    """Trainings of survivors that come after the search."""
    return config.fidelity.survivors * config.fidelity.survivor_seeds


def make_executor(config: SearchConfig, log: Path, function: Callable[[Point], Any] | None = None) -> Executor:
    """The executor of a configuration.

    Args:
        log: file for what workers print.
        function: the objective, where it is not a PPO run.

    Raises:
        LacerError: Ray is missing or does not answer.
    """
    if config.executor == "inprocess":
        return InProcess(function)
    workers = worker_count(config)
    if config.executor == "ray":
        from lacer.search.ray_executor import RayExecutor

        return RayExecutor(config.workers or None, config.timeout, config.memory, address=config.ray_address,
                           cpus=config.cpus_per_candidate, gpus=config.gpus_per_candidate)
    return ProcessPool(workers, log, config.timeout, config.memory or memory_share(workers),
                       calls=function is not None)


def run_request(config: SearchConfig, spec: EncoderSpec | None, protocol: Protocol, seed: int,
                save_to: Path | None = None) -> RunRequest:
    """The PPO run of an encoder under a configuration; None: doing nothing."""
    return RunRequest(env=config.env, env_kwargs=config.env_kwargs, eval_env_kwargs=config.eval_env_kwargs,
                      encoder=None if spec is None else spec.to_dict(), protocol=protocol, seed=seed,
                      text_model=config.text_model, save_to=None if save_to is None else str(save_to.resolve()))


class _Driver(Listener):
    def __init__(self, plan: Plan, designer: Designer, study: StoredStudy, folder: Path, quiet: bool,
                 shared: Shared | None = None) -> None:
        self.plan, self.card, self.designer, self.study, self.folder = plan, plan.card, designer, study, folder
        self.config = plan.config
        if plan.config.storage is not None:  # what is shown and logged from here on
            self.config = plan.config.model_copy(update={"storage": without_password(plan.config.storage)})
        self.shared = shared
        self.display = shared.display if shared is not None else Display(
            plan.card, plan.total_steps, quiet, live=not asks_a_person(plan.config))
        if isinstance(designer, TrainingDesigner) and designer.trainer is not None:
            designer.trainer.listener = self._trained
        self.start = time.monotonic()
        self.before = self._saved = float(study.get_attr("seconds") or 0.0)
        self.ended = ""

    @property
    def seconds(self) -> float:
        """Wall time of all sessions."""
        return self.before + time.monotonic() - self.start

    # -- the search ---------------------------------------------------------------------------------------------------

    def run(self) -> SearchResult:
        c, say = self.config, self.display.say
        say(f"Searching an encoder for {self.card.env_id}: {c.candidates} candidates x {c.protocol.steps:,} steps, "
            f"{worker_count(c)} at once, {self.plan.space.size():.3g} encoders possible. Folder: {self.folder}")
        if c.designer == "auto":
            say(f"Designer: {self.plan.designer} " + ("" if c.llm else "(no LLM given)"))
        if c.storage is not None and has_password(str(self.plan.config.storage)):
            say("The password in --storage is not kept; give it again to resume, or use PGPASSWORD or ~/.pgpass.")
        executor = self.shared.executor if self.shared is not None else make_executor(c, self.folder / "workers.log")
        self.trackers: list[Tracker] = []
        try:
            self.study.begin(self.before)
            self._start_trackers()
            self.ended = self._engine(executor).run()
            if self.ended:
                say(f"The search ends: {self.ended}.")
            self._more_seeds(executor)
            finals = self._finals(executor)
            outcome = self.outcome(finals)
            from lacer.search.report import write_report

            write_report(outcome, self.folder / "report.html", expert=self.plan.space.to_spec(self.plan.expert))
            media = self._media() if self.trackers else Media()
            self._track(lambda tracker: tracker.finish(outcome, self.folder, media))
            self._close(0, 60)
            self.study.end(self.ended)
        except KeyboardInterrupt:
            self._release(executor)
            self._close(255, 1)
            if self.shared is None:
                say(f"Stopped. Nothing finished is lost. To go on: lacer search --resume "
                    f"{shlex.quote(str(self.folder))}")
            raise
        except LacerError as e:  # the study cannot be written, or the LLM's key is wrong
            self._close(1, 1)
            if self.shared is not None:
                raise
            raise LacerError(f"{e}\nNothing finished is lost. To go on: lacer search --resume "
                             f"{shlex.quote(str(self.folder))}") from e
        finally:
            self.designer.close()
            with contextlib.suppress(LacerError):  # it has been reported if the study cannot be written
                self.study.set_attr("seconds", self.seconds)
            self._release(executor)
            self.study.close()
        return SearchResult(self.folder, outcome)

    def _release(self, executor: Executor) -> None:
        if self.shared is None:
            executor.close()
            self.display.close()

    def _engine(self, executor: Executor) -> Engine:
        c = self.config
        for _ in range(self.study.count("ok", "failed", "pruned")):
            self.display.skip(c.protocol.steps)
        if any("env_steps" in t.proposal.meta for t in self.study.trials):  # it has trained
            self.display.skip(c.designer_steps or 0)
        # Designers do not know the limits, so they run into them; an LLM is told, and costs money.
        patience = MAX_REJECTIONS * (10 if c.limits and not self.designer.needs_llm else 1)
        ahead = c.ahead if c.ahead is not None else int(self.designer.needs_llm)
        return Engine(
            self.study, self.designer, executor, self._job,
            budget=Budget(c.candidates, c.max_env_steps, c.max_seconds, c.max_tokens, further_runs(c),
                          own_steps(c) if designer_class(self.plan.designer).trains else 0),
            first=Proposal(self.plan.expert, "expert", "a sensible encoder made by hand") if c.expert_first else None,
            why_not=self._why_not,
            repeats=c.repeats, lag=c.workers if c.deterministic else None, ahead=ahead,
            expected_steps=c.protocol.steps, elapsed=self.seconds, patience=patience, listener=self, judge=self._judge)

    def _more_seeds(self, executor: Executor) -> None:
        """Trains the best encoders with further seeds, if the configuration says so."""
        f = self.config.fidelity
        best = [t.number for t in self.study.best_first()[:f.survivors]]
        if not best:
            return
        seeds = Seeds(best, f.survivor_seeds)
        if seeds.left(self.study):
            self.display.say(f"The best {len(best)} encoders are trained with {f.survivor_seeds} further "
                             f"seed{'' if f.survivor_seeds == 1 else 's'}: " + ", ".join(f"#{n}" for n in best))
        Engine(self.study, seeds, executor, self._job, budget=Budget(sum(
            t.survivor is not None for t in self.study.trials) + seeds.left(self.study)), repeats="add",
            elapsed=self.seconds, listener=self, survivors=True).run()

    def _judge(self, trial: Trial, paused: Evaluation, others: list[Trial]) -> Evaluation | Rung:
        return self.config.fidelity.judge(trial, paused, others, self.card.objective)

    def _job(self, trial: Trial, repeat: int) -> RunRequest:
        c, spec = self.config, trial.spec
        assert spec is not None
        request = run_request(c, spec, c.protocol, c.seed + REPEAT_SEEDS * repeat)
        # A survivor's further seeds are trained as it was, without the judgements.
        request = c.fidelity.request(request, len(c.fidelity.rungs if trial.survivor is not None else trial.passed))
        if c.fidelity.warm_start != "off":
            request = request.model_copy(update={"keep_checkpoint": True, "warm_start": self._warm_start(trial)})
        return self._with_checkpoint(request, f"{trial.number}-{repeat}")

    def _warm_start(self, trial: Trial) -> WarmStart | None:
        """What a trial takes from its first parent that has something for it."""
        if trial.survivor is not None:
            trial = self.study[trial.survivor]
        for number in trial.proposal.parents:
            parent = self.study[number]
            if parent.spec is None or trial.spec is None:
                continue
            modules = unchanged(trial.spec, parent.spec)
            files = sorted(self._checkpoints.glob(f"{number}-*.safetensors"))
            if modules and files and parent.status != "running":
                return WarmStart(path=str(files[0]), trial=number, modules=modules)
        return None

    @property
    def _checkpoints(self) -> Path:
        return self.folder.resolve() / "checkpoints"

    def _why_not(self, proposal: Proposal) -> str:
        assert proposal.point is not None
        try:
            self.config.limits.check(self.plan.space.to_spec(proposal.point), self.card, self.config.text_model)
        except LacerError as e:
            return str(e)
        return ""

    def _request(self, spec: EncoderSpec | None, protocol: Protocol, seed: int, name: str,
                 save_to: Path | None = None) -> RunRequest:
        return self._with_checkpoint(run_request(self.config, spec, protocol, seed, save_to), name)

    def _with_checkpoint(self, request: RunRequest, name: str) -> RunRequest:
        if not request.in_parts and not request.keep_checkpoint:
            return request
        return request.model_copy(update={"checkpoint": str(self._checkpoints / f"{name}.safetensors")})

    def rejected(self, trial: Trial) -> None:
        self.display.say(f"        #{trial.number} rejected ({trial.proposal.designer}): {trial.reason[:160]}")

    def started(self, key: str, trial: Trial) -> None:
        assert trial.spec is not None
        self.display.started(key, f"{key} {trial.spec.short()}", self.config.protocol.steps)

    def passed(self, key: str, trial: Trial) -> None:
        rung = trial.passed[-1]
        shown = ", ".join(f"{k.removeprefix('probe:')} {v:.4g}" for k, v in rung.scores.items())
        self.display.ended(key, 0, f"        {key} goes on after {rung.steps:,} steps: "
                                   f"{shown or 'nothing to judge by'}")

    def progress(self, event: Event) -> None:
        assert event.progress is not None
        self.display.progress(event.key, event.progress)

    def _trained(self, event: Event) -> None:
        """News of the designer's own training, in the thread in which it thinks."""
        steps, e = self.config.designer_steps or 0, event.evaluation
        if event.progress is not None:
            if not event.progress["steps"]:
                self.display.say(f"The designer {self.plan.designer} trains by itself before it proposes: {steps:,} "
                                 "steps.")
                self.display.started(event.key, f"{self.plan.designer} trains by itself", steps)
            self.display.progress(event.key, event.progress)
        elif e is not None:
            self.display.ended(event.key, steps, f"        {self.plan.designer} " + (
                f"trained by itself: {e.cost.env_steps:,} steps in {clock(e.cost.total_seconds)}" if e.status == "ok"
                else f"could not train: {e.reason[:160]}"))

    def finished(self, key: str | None, trial: Trial) -> None:
        best = self.study.best
        ended = [t for t in self.study.trials if t.status in ("ok", "failed", "pruned") and t.survivor is None]
        done, pruned = len(ended), sum(t.status == "pruned" for t in ended)
        if self.config.fidelity.warm_start == "off":  # of its last rung, or of a run that was killed
            for path in self._checkpoints.glob(f"{trial.number}-*.safetensors"):
                path.unlink(missing_ok=True)
        o = self.card.objective
        self.display.ended(key or "", self.config.protocol.steps,
                           result_line(trial, self.card, self.config.candidates, done))
        name = o.metric.replace("_", " ")
        self.display.headline(f"candidate {done} of {self.config.candidates} done" + (
            f" ({pruned} pruned)" if pruned else "") + (
            f", best {name} so far {self.study.best_value:.3f} {o.unit} (#{best.number})" if best else ""))
        totals = Totals(self.study.best_value, sum(t.env_steps for t in self.study.trials), self.seconds)
        self._track(partial(_tell, trial=trial, totals=totals))
        if self.seconds - self._saved > 30:  # after kill -9 the budget of wall time still holds
            self._saved = self.seconds
            self.study.set_attr("seconds", self.seconds)

    # -- what comes after ---------------------------------------------------------------------------------------------

    def _finals(self, pool: Executor) -> dict[str, Evaluation]:
        """Trains winner and expert with the final budget; evaluates them and doing nothing on fresh seeds."""
        c, best = self.config, self.study.best
        finals = {n: Evaluation.model_validate(e) for n in (NOOP, EXPERT, WINNER) if (e := self.study.get_attr(n))}
        if best is None:
            return finals
        if self.study.get_attr("final_trial") != best.number:  # a resumed search may have found a better one
            if finals.pop(WINNER, None) is not None:  # first, so that it is never taken for the new one's
                self.study.set_attr(WINNER, None)
            if (old := self.folder / "best").is_dir():
                shutil.rmtree(self.folder / "best.earlier", ignore_errors=True)
                old.rename(self.folder / "best.earlier")
            self.study.set_attr("final_trial", best.number)
        protocol = c.protocol.model_copy(update={"steps": c.final_steps, "eval_episodes": c.final_episodes,
                                                 "eval_seed": c.protocol.eval_seed + FINAL_SEEDS,
                                                 "stop_rank": None, "stop_dead": None})
        expert_won = best.ncode == self.plan.space.to_ncode(self.plan.expert)
        fresh = self.folder / "best.new"
        jobs: dict[str, RunRequest] = {}
        if WINNER not in finals or not (self.folder / "best").is_dir():
            shutil.rmtree(fresh, ignore_errors=True)
            jobs[WINNER] = self._request(best.spec, protocol, c.seed + 1, WINNER, fresh)
        if EXPERT not in finals and not expert_won:
            jobs[EXPERT] = self._request(self.plan.space.to_spec(self.plan.expert), protocol, c.seed + 1, EXPERT)
        if NOOP not in finals:
            jobs[NOOP] = self._request(None, protocol, c.seed + 1, NOOP)
        if jobs:
            who = f"the winner #{best.number}" + (" and the expert's encoder" if EXPERT in jobs else "")
            self.display.say(f"Training {who} with {c.final_steps:,} steps; {c.final_episodes} evaluation episodes on "
                             "fresh seeds.")
        waiting, busy = list(jobs), set[str]()
        while waiting or busy:
            while waiting and pool.free:
                name = waiting.pop(0)
                busy.add(name)
                pool.submit(name, jobs[name])
                self.display.started(name, f"final: {self._called(name)}", c.final_steps if jobs[name].encoder else 0)
            for event in pool.poll(0.1):
                if event.progress is not None:
                    self.display.progress(event.key, event.progress)
                elif event.evaluation is not None and event.key in busy:
                    busy.discard(event.key)
                    e = event.evaluation
                    o = self.card.objective
                    if event.key == WINNER and e.ok:
                        shutil.rmtree(self.folder / "best", ignore_errors=True)
                        fresh.rename(self.folder / "best")
                    finals[event.key] = e
                    self.study.set_attr(event.key, e.model_dump(mode="json"))
                    self.display.ended(event.key, c.final_steps if jobs[event.key].encoder else 0, (
                        f"  final: {self._called(event.key)}: {o.metric} {e.objective:.3f} {o.unit}" if e.ok
                        else f"  final: {self._called(event.key)} failed: {e.reason}"))
        if expert_won and WINNER in finals and EXPERT not in finals:
            finals[EXPERT] = finals[WINNER]
            self.study.set_attr(EXPERT, finals[EXPERT].model_dump(mode="json"))
        return finals

    def _called(self, name: str) -> str:
        return "acting at random" if name == NOOP and self.card.noop is None else name

    def outcome(self, finals: dict[str, Evaluation]) -> Outcome:
        """Everything found so far."""
        from lacer.search.llm.shown import exchanges  # which needs this module

        best = self.study.best
        provenance = read_json(self.folder / "versions.json")
        return Outcome(
            card=self.card, trials=self.study.trials, finals=finals, winner=None if best is None else best.number,
            config=self.config.model_dump(mode="json"),
            versions={**provenance["packages"], "platform": provenance["platform"], "git": provenance["git"] or "none"},
            command=f"lacer search --config {shlex.quote(str(self.folder / 'config.yaml'))} --out NEW_FOLDER",
            seconds=self.seconds, usage=total_usage(self.study.trials) | rates(self.study),
            prompts=exchanges(self.folder, self.study.trials))

    # -- trackers -----------------------------------------------------------------------------------------------------

    def _start_trackers(self) -> None:
        """Starts TensorBoard and W&B, and tells them what earlier sessions have found."""
        c, metric = self.config, self.card.objective.metric
        mode = wandb_mode(c.wandb)
        run_id = self.study.get_attr("wandb_id")
        if mode != "off" and run_id is None:
            run_id = uuid.uuid4().hex[:12]
            self.study.set_attr("wandb_id", run_id)
        starts: list[Callable[[], Tracker]] = [lambda: TensorBoard(self.folder / "events", metric)]
        if mode != "off":
            starts.append(lambda: WandB(
                self.folder, mode, runs=c.wandb_runs, project=c.wandb_project, group=c.wandb_group or self.folder.name,
                name=self.folder.name, run_id=run_id, config=c.model_dump(mode="json"), designer=self.plan.designer,
                metric=metric, say=self.display.say))
        for start in starts:
            try:
                self.trackers.append(start())
            except Exception as e:  # no disk, a broken installation: the search goes on without
                self.display.say(f"{'W&B' if self.trackers else 'TensorBoard'} is off: {type(e).__name__}: "
                                 f"{str(e)[:200]}")
        steps, values = 0, []
        for t in self.study.trials:
            steps += t.env_steps
            values += [] if t.objective is None else [t.objective]
            if t.evaluation is not None:
                totals = Totals(max(values, key=self.card.objective.signed, default=None), steps)
                self._track(partial(_tell, trial=t, totals=totals))

    def _track(self, call: Callable[[Tracker], None]) -> None:
        """Calls every tracker; one that fails is left out from then on: none stops a search."""
        for tracker in list(self.trackers):
            try:
                call(tracker)
            except Exception as e:
                self.trackers.remove(tracker)
                self.display.say(f"{type(tracker).__name__} is off: {type(e).__name__}: {str(e)[:200]}")

    def _close(self, exit_code: int, timeout: float) -> None:
        self._track(lambda tracker: tracker.close(exit_code, timeout))
        self.trackers = []

    def _media(self) -> Media:
        """Records the winner in a process of its own, where its environment can be rendered, unless an earlier session
        has done so; a search has no less to show without."""
        best = self.folder / "best"
        if not self.config.video or not best.is_dir():
            return Media()
        from lacer.agents.video import can_render, check_video

        kwargs = {**self.config.env_kwargs, **self.config.eval_env_kwargs}
        try:
            if not can_render(self.config.env, kwargs):
                return Media()
            video = best / "video.mp4"
            try:
                check_video(video)
            except LacerError:  # without the extra
                video = best / "video.gif"
            told = best / "frames.json"
            if video.is_file() and told.is_file():  # best/ is replaced as a whole, so they show this winner
                return _media_of(video, read_json(told))
            job = {"agent": str(best), "video": str(video), "frames": str(best / "frames"),
                   "seed": self.config.protocol.eval_seed + FINAL_SEEDS}
            done = subprocess.run([sys.executable, "-P", "-m", "lacer.agents.video", json.dumps(job)],
                                  env=clean_environment(), capture_output=True, text=True, timeout=600, check=False)
            if done.returncode:
                raise LacerError((done.stderr.strip().splitlines() or ["it was killed"])[-1])
            frames = json.loads(done.stdout.splitlines()[-1])["frames"]
            frames = {source: [Path(p).name for p in paths] for source, paths in frames.items()}
            write_whole(told, json.dumps(frames) + "\n")
        except (LacerError, OSError, ValueError, subprocess.TimeoutExpired) as e:
            self.display.say(f"No video of the winner: {str(e)[:300]}")
            return Media()
        self.display.say(f"Video of the winner: {video}")
        return _media_of(video, frames)


def _media_of(video: Path, frames: dict[str, list[str]]) -> Media:
    return Media(video, {source: tuple(video.parent / "frames" / name for name in names)
                         for source, names in frames.items()})


def _tell(tracker: Tracker, trial: Trial, totals: Totals) -> None:
    tracker.trial(trial, totals)


def summary(result: SearchResult) -> str:
    """The last lines of a search: what was gained, where things are, what to try next."""
    from lacer.search.report import headline

    folder, o = shlex.quote(str(result.folder)), result.outcome
    lines = [headline(o), "", f"Report: {result.report}   (took {clock(o.seconds)})"]
    failed = sum("llm_failed" in t.proposal.meta for t in o.trials)
    if o.usage or failed:
        others = f"; {failed} encoder{'s' if failed != 1 else ''} proposed in its place" if failed else ""
        lines.append(f"LLM: {describe_usage(o.usage)}{others}")
    if o.winner is not None:
        env = shlex.quote(str(o.config["env"]))
        lines += ["Next:", f"  lacer evaluate {folder}/best --episodes 20",
                  f"  lacer train --encoder {folder}/best/encoder.json --env {env} --steps 200000"]
    return "\n".join(lines)
