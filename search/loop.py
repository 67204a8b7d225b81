"""The search from top to bottom: ask the designer, check, evaluate, record; then train the winner and report."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import platform
import queue
import shlex
import shutil
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

import lacer.encoders
from lacer.agents import Agent, Evaluation, Protocol, RunRequest, load, versions
from lacer.encoders import EncoderSpec
from lacer.envs import LacerError, TaskCard, task_card
from lacer.search.config import RESUMABLE, SearchConfig, expert_spec, validate, worker_count
from lacer.search.designers.base import Designer, designer_class
from lacer.search.executors import ProcessPool
from lacer.search.outcome import EXPERT, NOOP, WINNER, Outcome
from lacer.search.presets import read_yaml
from lacer.search.progress import Display, clock, result_line
from lacer.search.space import EncoderSpace, Point, load_space, read_space
from lacer.search.study import Proposal, Study, Trial, sqlite_url, study_name
from lacer.search.tracking import TensorBoard, WandB, wandb_mode

log = logging.getLogger("lacer")

WITHOUT_LLM = "evolution"
"""The designer that ``auto`` takes where there is no LLM."""

FINAL_SEEDS = 500_000
"""Distance between the seeds of the evaluation episodes that choose and of those that are reported."""

MAX_REJECTIONS = 50
"""Rejected proposals in a row after which a search ends: the designer has nothing new to offer. With limits on the
encoder ten times as many (an LLM's aside, which cost money), because designers do not know the limits."""


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
        return self.config.candidates * self.config.protocol.steps + 2 * self.config.final_steps


def plan(config: SearchConfig) -> Plan:
    """Checks a configuration.

    Raises:
        LacerError: unknown environment, designer, block or option; an expert's encoder that does not fit.
    """
    card = task_card(config.env, **config.env_kwargs)
    task_card(config.env, **{**config.env_kwargs, **config.eval_env_kwargs})
    name = config.designer
    if name == "auto":
        name = "lacer" if config.llm else WITHOUT_LLM
    cls = designer_class(name)
    if cls.needs_llm and not config.llm:
        raise LacerError(f"the designer {name!r} needs an LLM: add e.g. --llm openai:MODEL (and OPENAI_API_KEY, or "
                         "--llm-base-url for a local server), or choose one that needs none, see `lacer designers`")
    space = load_space(config.space, card)
    expert = space.expert if space.expert is not None and config.expert is None else expert_spec(card, config.expert)
    try:
        point = space.from_spec(expert)
    except LacerError as e:
        raise LacerError(f"the expert's encoder is not part of the search space: {e}. Widen the space, or give "
                         "another one with --expert encoder.json") from None
    lacer.encoders.build(expert, card, lacer.encoders.TextTable("hash"))
    return Plan(config, card, space, point, name)


def make_designer(plan: Plan, folder: Path) -> Designer:
    """The designer of a plan. Raises LacerError if an LLM designer's key or model is missing."""
    cls = designer_class(plan.designer)
    c = plan.config
    if not cls.needs_llm:
        return cls(c.seed)
    from lacer.search.llm.client import LLMConfig

    assert c.llm is not None
    llm = LLMConfig(model=c.llm, base_url=c.llm_base_url, temperature=c.llm_temperature, timeout=c.llm_timeout,
                    seed=c.seed)
    designer = cls(c.seed, llm=llm, run_dir=folder, batch=c.batch)  # type: ignore[call-arg]
    designer.check()  # type: ignore[attr-defined]
    return designer


def search(env: str | None = None, *, out: str | Path | None = None, resume: str | Path | None = None,
           quiet: bool = False, **options: Any) -> SearchResult:
    """Searches an encoder, trains the winner and writes a report.

    ::

        from lacer.search import search
        result = search("lacer/KnownSources-v0", designer="evolution", candidates=10, protocol={"steps": 5000})
        print(result.outcome.winner, result.report)
        action = result.best.predict(observation)

    Args:
        env: registered environment id.
        out: the run folder; default ``runs/<date-time-env-designer>``. Must not exist.
        resume: an existing run folder to go on with; only budgets, workers, LLM and tracking may be changed.
        quiet: nothing is printed.
        **options: fields of :class:`SearchConfig`; nested ones as dicts.

    Raises:
        LacerError: wrong input, before anything expensive starts.
        KeyboardInterrupt: on Ctrl-C, after everything is stopped and stored.
    """
    if env is not None:
        options["env"] = env
    if resume is not None:
        if out is not None:
            raise LacerError("out and resume exclude each other: a resumed search stays in its folder")
        return _search(resumed(Path(resume), options), Path(resume), quiet, fresh=False)
    return _search(validate(options, "search()"), None if out is None else Path(out), quiet, fresh=True)


def resumed(folder: Path, changes: dict[str, Any]) -> SearchConfig:
    """Configuration of a run folder with some fields changed.

    Raises:
        LacerError: no run there, or a change that would make the trials incomparable.
    """
    if not (folder / "config.yaml").is_file() or not (folder / "study.db").is_file():
        raise LacerError(f"{folder} is no run: it has no {'config.yaml' if folder.is_dir() else 'such folder'}"
                         if not (folder / "config.yaml").is_file() else f"{folder} is no run: it has no study.db")
    old = read_yaml(folder / "config.yaml")
    for key, value in changes.items():
        if key not in RESUMABLE and key in old and old[key] != value:
            raise LacerError(f"{key} cannot change when a search is resumed ({old[key]!r} -> {value!r}); trials would "
                             f"not be comparable. These can: {', '.join(sorted(RESUMABLE))}.")
    return validate({**old, **changes}, str(folder / "config.yaml"))


def _search(config: SearchConfig, folder: Path | None, quiet: bool, fresh: bool) -> SearchResult:
    if isinstance(config.space, str):  # its content is kept with the run: a file may change before the run is resumed
        config = config.model_copy(update={"space": read_space(config.space)})
    checked = plan(config)
    if folder is None:
        name = checked.card.env_id.split("/")[-1].split(":")[-1]
        folder = Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{name}-{checked.designer}"
    if fresh and folder.exists():
        raise LacerError(f"{folder} exists already. To go on with it: lacer search --resume "
                         f"{shlex.quote(str(folder))}. To start anew: choose another folder with --out.")
    if fresh:
        try:
            config.limits.check(checked.space.to_spec(checked.expert), checked.card, config.text_model)
        except LacerError as e:
            raise LacerError(f"the expert's encoder, the first candidate, breaks the limits: {e}. Raise the limits, or "
                             "give a smaller one with --expert encoder.json") from None
    designer = make_designer(checked, folder)
    try:
        folder.mkdir(parents=True, exist_ok=not fresh)
        (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        if fresh:
            (folder / "versions.json").write_text(json.dumps(_provenance(config), indent=1) + "\n")
    except OSError as e:
        raise LacerError(f"cannot write the run folder {folder}: {e.strerror}") from None
    with _only_driver(folder), _sigterm_as_interrupt():
        return _Driver(checked, designer, folder, quiet).run()


@contextlib.contextmanager
def _only_driver(folder: Path) -> Iterator[None]:
    with (folder / "driver.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LacerError(f"another process is working on {folder}") from None
        yield


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
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


def _provenance(config: SearchConfig) -> dict[str, Any]:
    git = subprocess.run(["git", "-C", str(Path(lacer.encoders.__file__).resolve().parent), "describe", "--always",
                          "--dirty", "--abbrev=12"], capture_output=True, text=True, check=False)
    return {"packages": versions(), "platform": platform.platform(), "git": git.stdout.strip() or None,
            "seed": config.seed, "eval_seed": config.protocol.eval_seed,
            "final_eval_seed": config.protocol.eval_seed + FINAL_SEEDS}


class _Asker:
    """Asks the designer in a thread of its own, so results are stored while an LLM thinks."""

    def __init__(self, designer: Designer, study: Study) -> None:
        self._answers: queue.Queue[list[Proposal] | BaseException] = queue.Queue()
        self._designer, self._study = designer, study
        self.busy = False

    def ask(self, n: int) -> None:
        self.busy = True
        threading.Thread(target=self._ask, args=(n,), daemon=True).start()

    def _ask(self, n: int) -> None:
        try:
            self._answers.put(self._designer.propose(self._study, n))
        except BaseException as e:  # handed to the driver, which raises it
            self._answers.put(e)

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


class _Driver:
    def __init__(self, plan: Plan, designer: Designer, folder: Path, quiet: bool) -> None:
        self.plan, self.config, self.card, self.designer, self.folder = plan, plan.config, plan.card, designer, folder
        url = sqlite_url(folder / "study.db")
        self.study = Study(url, study_name(url) or folder.name, plan.space)
        self.display = Display(plan.card, plan.total_steps, quiet)
        self.start = time.monotonic()
        self.before = float(self.study.get_attr("seconds") or 0.0)
        self.running: dict[str, int] = {}

    # -- the search ---------------------------------------------------------------------------------------------------

    def run(self) -> SearchResult:
        c, say = self.config, self.display.say
        workers = worker_count(c)
        say(f"Searching an encoder for {self.card.env_id}: {c.candidates} candidates x {c.protocol.steps:,} steps, "
            f"{workers} at once, {self.plan.space.size():.3g} encoders possible. Folder: {self.folder}")
        if c.designer == "auto":
            say(f"Designer: {self.plan.designer} " + ("" if c.llm else "(no LLM given; the best that needs none)"))
        pool = ProcessPool(workers, self.folder / "workers.log", c.timeout)
        self.trackers: list[TensorBoard | WandB] = [TensorBoard(self.folder / "events")]
        try:
            wandb = self._wandb()
            if wandb is not None:
                self.trackers.append(wandb)
            self._candidates(pool)
            finals = self._finals(pool)
            outcome = self.outcome(finals)
            from lacer.search.report import write_report

            write_report(outcome, self.folder / "report.html")
            if wandb is not None:
                wandb.finish(outcome)
            self._close(0, 60)
        except KeyboardInterrupt:
            pool.close()
            self.display.close()
            self._close(255, 0.5)
            say(f"Stopped. Nothing finished is lost. To go on: lacer search --resume {shlex.quote(str(self.folder))}")
            raise
        finally:
            self.study.set_attr("seconds", self.before + time.monotonic() - self.start)
            pool.close()
            self.display.close()
        return SearchResult(self.folder, outcome)

    def _candidates(self, pool: ProcessPool) -> None:
        c, study = self.config, self.study
        pending = [t for t in study.trials if t.status == "running"]
        for t in study.trials:
            if t.status in ("ok", "failed"):
                self.display.skip(c.protocol.steps)
                self.designer.observe(t)
        if not study.trials:
            pending.append(study.start(Proposal(self.plan.expert, "expert", "a sensible encoder made by hand")))
        asker = _Asker(self.designer, study)
        rejected_in_a_row, patience = 0, MAX_REJECTIONS * (10 if c.limits and not self.designer.needs_llm else 1)
        while True:
            counted = sum(t.status != "rejected" for t in study.trials)
            while pending and pool.free:
                self._submit(pool, pending.pop(0))
            wanted = min(pool.free - len(pending), c.candidates - counted)
            if wanted > 0 and not asker.busy and rejected_in_a_row < patience:
                asker.ask(wanted)
            if not self.running and not pending and not asker.busy:
                break
            for proposal in asker.answers():
                trial = self._record(proposal)
                if trial.status == "rejected":
                    rejected_in_a_row += 1
                    self.display.say(f"        #{trial.number} rejected ({trial.proposal.designer}): "
                                     f"{trial.reason[:160]}")
                else:
                    rejected_in_a_row = 0
                    pending.append(trial)
            for event in pool.poll(0.05):
                if event.progress is not None:
                    self.display.progress(event.key, event.progress)
                elif event.evaluation is not None:
                    self._finished(event.key, event.evaluation)
        if rejected_in_a_row >= patience:
            self.display.say(f"{patience} proposals in a row were rejected: the search ends early.")

    def _record(self, proposal: Proposal) -> Trial:
        """Stores a proposal: running if it is new and within the limits, else rejected with the reason."""
        if not proposal.rejected and proposal.point is not None:
            reason = self._why_not(proposal.point)
            if not reason:
                return self.study.start(proposal)
            proposal = replace(proposal, rejected=reason)
        return self.study.reject(proposal)

    def _why_not(self, point: Point) -> str:
        code = self.study.space.to_ncode(point)
        for t in self.study.trials:
            if t.ncode == code and t.status != "rejected":
                return f"the same encoder as #{t.number}"
        try:
            self.config.limits.check(self.study.space.to_spec(point), self.card, self.config.text_model)
        except LacerError as e:
            return str(e)
        return ""

    def _submit(self, pool: ProcessPool, trial: Trial) -> None:
        assert trial.spec is not None
        key = f"#{trial.number}"
        self.running[key] = trial.number
        pool.submit(key, self._request(trial.spec, self.config.protocol, self.config.seed))
        self.display.started(key, f"{key} {trial.spec.short()}", self.config.protocol.steps)

    def _request(self, spec: EncoderSpec | None, protocol: Protocol, seed: int,
                 save_to: Path | None = None) -> RunRequest:
        c = self.config
        return RunRequest(env=c.env, env_kwargs=c.env_kwargs, eval_env_kwargs=c.eval_env_kwargs,
                          encoder=None if spec is None else spec.to_dict(), protocol=protocol, seed=seed,
                          text_model=c.text_model, save_to=None if save_to is None else str(save_to.resolve()))

    def _finished(self, key: str, evaluation: Evaluation) -> None:
        trial = self.study.finish(self.running.pop(key), evaluation)
        self.designer.observe(trial)
        best = self.study.best
        done = sum(t.status in ("ok", "failed") for t in self.study.trials)
        o = self.card.objective
        self.display.ended(key, self.config.protocol.steps, result_line(trial, self.card, self.config.candidates, done))
        name = o.metric.replace("_", " ")
        self.display.headline(f"candidate {done} of {self.config.candidates} done" + (
            f", best {name} so far {best.objective:.3f} {o.unit} (#{best.number})" if best else ""))
        for tracker in list(self.trackers):
            try:
                tracker.trial(trial, o.metric, best.objective if best else None)
            except Exception as e:  # a tracker never stops a search
                self._drop(tracker, e)

    # -- what comes after ---------------------------------------------------------------------------------------------

    def _finals(self, pool: ProcessPool) -> dict[str, Evaluation]:
        """Trains winner and expert with the final budget; evaluates them and doing nothing on fresh seeds."""
        c, best = self.config, self.study.best
        finals = {n: Evaluation.model_validate(e) for n in (NOOP, EXPERT, WINNER) if (e := self.study.get_attr(n))}
        if best is None:
            return finals
        if self.study.get_attr("final_trial") != best.number:  # a resumed search may have found a better one
            finals.pop(WINNER, None)
            self.study.set_attr("final_trial", best.number)
        protocol = c.protocol.model_copy(update={"steps": c.final_steps, "eval_episodes": c.final_episodes,
                                                 "eval_seed": c.protocol.eval_seed + FINAL_SEEDS})
        expert = self.study.trials[0]
        fresh = self.folder / "best.new"
        jobs: dict[str, RunRequest] = {}
        if WINNER not in finals or not (self.folder / "best").is_dir():
            shutil.rmtree(fresh, ignore_errors=True)
            jobs[WINNER] = self._request(best.spec, protocol, c.seed + 1, fresh)
        if EXPERT not in finals and best.number != expert.number:
            jobs[EXPERT] = self._request(expert.spec, protocol, c.seed + 1)
        if NOOP not in finals:
            jobs[NOOP] = self._request(None, protocol, c.seed + 1)
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
                self.display.started(name, f"final: {name}", c.final_steps if jobs[name].encoder else 0)
            for event in pool.poll(0.1):
                if event.progress is not None:
                    self.display.progress(event.key, event.progress)
                elif event.evaluation is not None:
                    busy.discard(event.key)
                    e = event.evaluation
                    o = self.card.objective
                    if event.key == WINNER and e.ok:
                        shutil.rmtree(self.folder / "best", ignore_errors=True)
                        fresh.rename(self.folder / "best")
                    finals[event.key] = e
                    self.study.set_attr(event.key, e.model_dump(mode="json"))
                    self.display.ended(event.key, c.final_steps if jobs[event.key].encoder else 0, (
                        f"  final: {event.key}: {o.metric} {e.objective:.3f} {o.unit}" if e.ok
                        else f"  final: {event.key} failed: {e.reason}"))
        if best.number == expert.number and WINNER in finals:
            finals[EXPERT] = finals[WINNER]
        return finals

    def outcome(self, finals: dict[str, Evaluation]) -> Outcome:
        """Everything found so far."""
        best = self.study.best
        usage: dict[str, float] = {}
        for t in self.study.trials:
            for key in ("tokens_in", "tokens_out", "requests"):
                usage[key] = usage.get(key, 0) + float(t.proposal.meta.get(key) or 0)
        provenance = json.loads((self.folder / "versions.json").read_text())
        return Outcome(
            card=self.card, trials=self.study.trials, finals=finals, winner=None if best is None else best.number,
            config=self.config.model_dump(mode="json"),
            versions={**provenance["packages"], "platform": provenance["platform"], "git": provenance["git"] or "none"},
            command=f"lacer search --config {shlex.quote(str(self.folder / 'config.yaml'))} --out NEW_FOLDER",
            seconds=self.before + time.monotonic() - self.start, usage=usage if any(usage.values()) else {})

    def _wandb(self) -> WandB | None:
        mode = wandb_mode(self.config.wandb)
        if mode == "off":
            return None
        run_id = self.study.get_attr("wandb_id") or uuid.uuid4().hex[:12]
        self.study.set_attr("wandb_id", run_id)
        try:
            return WandB(self.folder, mode, self.config.wandb_project, run_id, self.folder.name,
                         self.config.model_dump(mode="json"), self.plan.designer)
        except Exception as e:  # no disk, no network, a broken installation: the search goes on without W&B
            self.display.say(f"W&B is off: {type(e).__name__}: {str(e)[:200]}")
            return None

    def _drop(self, tracker: TensorBoard | WandB, error: Exception) -> None:
        self.trackers.remove(tracker)
        self.display.say(f"{type(tracker).__name__} is off: {type(error).__name__}: {str(error)[:200]}")

    def _close(self, exit_code: int, timeout: float) -> None:
        for tracker in self.trackers:
            if isinstance(tracker, WandB):
                tracker.close(exit_code, timeout)
            else:
                tracker.close()
        self.trackers = []


def summary(result: SearchResult) -> str:
    """The last lines of a search: what was gained, where things are, what to try next."""
    from lacer.search.report import headline

    folder, o = shlex.quote(str(result.folder)), result.outcome
    lines = [headline(o), "", f"Report: {result.report}   (took {clock(o.seconds)})"]
    if o.winner is not None:
        env = shlex.quote(str(o.config["env"]))
        lines += ["Next:", f"  lacer evaluate {folder}/best --episodes 20",
                  f"  lacer train --encoder {folder}/best/encoder.json --env {env} --steps 200000"]
    return "\n".join(lines)
