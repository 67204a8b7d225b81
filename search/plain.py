"""Searching any space with any function as the objective: no environment, no training."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lacer.agents import Call
from lacer.agents.calls import reference
from lacer.envs import LacerError, Objective
from lacer.search.config import SearchConfig, worker_count
from lacer.search.designers.base import designer_class
from lacer.search.engine import MAX_REJECTIONS, Budget, Engine, Listener
from lacer.search.executors import InProcess
from lacer.search.loop import (
    WITHOUT_LLM,
    asks_a_person,
    make_designer,
    make_executor,
    only_driver,
    sigterm_as_interrupt,
    store_config,
    study_place,
)
from lacer.search.progress import PointDisplay
from lacer.search.space import EncoderSpace, Point, SearchSpace
from lacer.search.storage import check_server
from lacer.search.study import StoredStudy, Study, Trial

Function = Callable[[Point], Any]

_ELSEWHERE = {"env", "env_kwargs", "eval_env_kwargs", "designer_steps", "protocol", "fidelity", "final_steps",
              "final_episodes", "space", "limits", "expert", "expert_first", "text_model", "wandb", "wandb_project"}
"""Fields of the configuration that only a search with an environment has."""


@dataclass(frozen=True)
class PointResult:
    """What a search with a function as its objective returns.

    Attributes:
        study: all trials.
        ended: why it ended before all candidates were evaluated, else "".
        folder: the run folder, None if nothing was stored.
    """

    study: Study
    ended: str
    folder: Path | None

    @property
    def best(self) -> Trial | None:
        """The best trial, None if none finished."""
        return self.study.best

    @property
    def best_point(self) -> Point | None:
        """The best architecture."""
        return None if self.best is None else self.best.proposal.point

    @property
    def best_value(self) -> float | None:
        """Its objective; the mean where it was evaluated several times."""
        return self.study.best_value


def search_points(space: SearchSpace, function: Function, config: SearchConfig, given: set[str], *,
                  objective: Objective, folder: Path | None, resume: bool, quiet: bool) -> PointResult:
    """See :func:`lacer.search.search`. ``given`` are the names of the options that were given."""
    wrong = sorted(given & _ELSEWHERE)
    if wrong:
        raise LacerError(f"{', '.join(wrong)}: only for a search with an environment, not with objective=")
    if "executor" not in given and (not resume or "workers" in given):
        config = config.model_copy(update={"executor": "process" if config.workers > 1 else "inprocess"})
    if config.deterministic:
        config = config.model_copy(update={"workers": worker_count(config)})
    name = WITHOUT_LLM if config.designer == "auto" else config.designer
    if designer_class(name).trains:
        raise LacerError(f"the designer {name!r} trains on an environment by itself, so it cannot search with "
                         "objective=; choose another one, see `lacer designers`")
    if config.executor != "inprocess":
        reference(function)
    if folder is not None and not resume and folder.exists():
        raise LacerError(f"{folder} exists already; to go on with it: resume={str(folder)!r}")
    if not designer_class(name).any_space and not isinstance(space, EncoderSpace):
        raise LacerError(f"the designer {name!r} searches encoders; for other spaces choose lm-searcher, or one that "
                         "needs no LLM, see `lacer designers`")
    designer = make_designer(name, config, folder)
    designer.check_space(space)
    if folder is None and config.storage is None:
        return _run(Study(space, objective), designer, function, config, None, quiet)
    if folder is None:
        raise LacerError("storage needs a run folder: give out=")
    if config.storage is not None:
        check_server(config.storage, None if resume else config.study_name or folder.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with only_driver(folder), sigterm_as_interrupt():
            url, name = study_place(config, folder)
            store_config(config, folder, name, _ELSEWHERE)
            study = StoredStudy(url, name, space, objective, create="if missing" if resume else "yes")
            try:
                return _run(study, designer, function, config, folder, quiet)
            finally:
                study.close()
    except OSError as e:
        raise LacerError(f"cannot write the run folder {folder}: {e}") from None


def _run(study: Study, designer: Any, function: Function, config: SearchConfig, folder: Path | None,
         quiet: bool) -> PointResult:
    executor = make_executor(config, Path("/dev/null") if folder is None else folder / "workers.log", function)
    name = "" if isinstance(executor, InProcess) else reference(function)
    before = float(study.get_attr("seconds") or 0.0) if isinstance(study, StoredStudy) else 0.0
    display = PointDisplay(study, config.candidates, quiet, live=not asks_a_person(config))
    engine = Engine(
        study, designer, executor,
        lambda trial, repeat: Call(function=name, point=trial.proposal.point or {}, seed=config.seed + repeat),
        budget=Budget(config.candidates, config.max_env_steps, config.max_seconds, config.max_tokens),
        repeats=config.repeats, lag=config.workers if config.deterministic else None,
        ahead=config.ahead if config.ahead is not None else int(designer.needs_llm), elapsed=before,
        patience=MAX_REJECTIONS, listener=Shown(display))
    try:
        if isinstance(study, StoredStudy):
            study.begin(before)
        ended = engine.run()
        if isinstance(study, StoredStudy):
            study.end(ended)
    finally:
        executor.close()
        display.close()
        if isinstance(study, StoredStudy):
            study.set_attr("seconds", engine.seconds)
    if study.best is None and study.count("failed"):
        why = next(t.reason for t in study.trials if t.status == "failed")
        warnings.warn(f"no candidate has a result; the first one failed: {why}", stacklevel=4)
    return PointResult(study, ended, folder)


class Shown(Listener):
    """Tells a display of every result."""

    def __init__(self, display: PointDisplay) -> None:
        self._display = display

    def finished(self, key: str | None, trial: Trial) -> None:
        self._display.finished(trial)
