"""Comparisons: designers x seeds x environments at equal budgets, or finished runs side by side."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import math
import re
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from lacer.envs import LacerError, Objective, did_you_mean
from lacer.search.config import RESUMABLE, SearchConfig, merge, own_steps, resumed, validate, validate_as
from lacer.search.files import is_locked, locked, read_config, write_config, write_whole
from lacer.search.outcome import WINNER
from lacer.search.runs import StoredRun, StudyReader, read_run
from lacer.search.storage import check_server, has_password

if TYPE_CHECKING:
    from lacer.search.compare_tables import Compared
    from lacer.search.executors import Executor
    from lacer.search.loop import Plan
    from lacer.search.progress import Display

FILE = "comparison.yaml"
_LABEL = re.compile(r"[\w+=,-][\w+=,. -]{0,59}")

PER_DESIGNER = {"designer", "designer_kwargs", "designer_steps", "batch", "ahead", "space", "limits"} | {
    f for f in SearchConfig.model_fields if f.startswith("llm")}
"""Fields that may differ between the designers of a comparison."""

FREE = {"seed", "workers", "timeout", "memory", "deterministic", "executor", "ray_address", "cpus_per_candidate",
        "gpus_per_candidate", "storage", "study_name", "video"} | {
            f for f in SearchConfig.model_fields if f.startswith("wandb")}
"""Fields that may differ between all runs: they change no score, or only by chance."""

_ENV = ("env", "env_kwargs", "eval_env_kwargs")
_BUDGET = ("candidates", "max_env_steps", "max_seconds", "max_tokens")
_SPACE = ("space", "limits")

SAME: dict[str, tuple[str, ...]] = {
    "env": _ENV,
    "protocol": tuple(f for f in SearchConfig.model_fields
                      if f not in {*_ENV, *_BUDGET, *_SPACE, *FREE, *PER_DESIGNER}),
    "budget": _BUDGET,
    "space": _SPACE,
}
"""What runs must have in common to be compared, by the word that allows them to differ; ``protocol`` is all the rest,
so a new field is compared unless it is named above."""

PACKAGES = ("lacer", "torch", "stable-baselines3", "gymnasium", "numpy", "eclipse-sumo")
"""Packages whose versions must agree (``version``)."""

ALLOW = (*SAME, "version")

PER_ENV = {"env", "env_kwargs", "eval_env_kwargs", "protocol", "fidelity", "space", "limits", "expert",
           "final_steps", "final_episodes", "text_model", "candidates", "max_env_steps"}
"""Fields that may differ between its environments."""


class ComparisonConfig(BaseModel):
    """What `lacer compare FILE` runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: dict[str, Any] = Field({}, description="fields of a search's configuration that all searches share")
    seeds: tuple[int, ...] = Field((0, 1, 2, 3, 4), min_length=1, description="one search of every designer for each")
    designers: dict[str, dict[str, Any]] = Field(description="fields that differ, by the designer's label")
    envs: dict[str, dict[str, Any]] = Field({}, description="fields that differ, by the environment's label; without "
                                                            "it, the one of base")
    levels: tuple[float, ...] = Field((), description="scores that designers are to reach; default: the expert's, and "
                                                      "the best tenth and hundredth of all candidates")

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError("each seed once, none below 0")
        return seeds

    @field_validator("designers", "envs")
    @classmethod
    def _labels(cls, entries: dict[str, dict[str, Any]], info: Any) -> dict[str, dict[str, Any]]:
        allowed = PER_DESIGNER if info.field_name == "designers" else PER_ENV
        for label, fields in entries.items():
            if not _LABEL.fullmatch(label):
                raise ValueError(f"{label!r} is no label: letters, digits and + = , - . _ only, at most 60")
            wrong = sorted(set(fields) - allowed)
            if wrong:
                why = did_you_mean(wrong[0], allowed) if wrong[0] not in SearchConfig.model_fields else (
                    "; it is the same for all, so it belongs into base" if info.field_name == "designers"
                    else "; it belongs into base or designers")
                raise ValueError(f"{label}: {wrong[0]!r} cannot differ between {info.field_name}{why}")
        if info.field_name == "designers" and not entries:
            raise ValueError("at least one designer")
        return entries

    def searches(self) -> list[Search]:
        """All searches, seeds outermost, so that a comparison that is stopped has each designer about as often."""
        out = []
        for seed in self.seeds:
            for env, env_fields in (self.envs or {"": {}}).items():
                for label, fields in self.designers.items():
                    data = merge(merge(self.base, env_fields), fields)
                    where = f"designers.{label}" + (f", envs.{env}" if env else "")
                    out.append(Search(env, label, seed, validate({**data, "seed": seed}, where)))
        return out


@dataclass(frozen=True)
class Search:
    """One search of a comparison.

    Attributes:
        env, label: labels of environment ("" where there is one only) and designer.
        seed: of the search.
        config: its configuration.
    """

    env: str
    label: str
    seed: int
    config: SearchConfig

    @property
    def name(self) -> str:
        """``env/label-seed``."""
        return f"{self.env}/{self.label}-{self.seed}" if self.env else f"{self.label}-{self.seed}"

    def folder(self, comparison: Path) -> Path:
        """Its run folder."""
        return comparison / "runs" / self.name

    def placed(self, comparison: Path) -> SearchConfig:
        """Its configuration with a name of its own in a shared database, in W&B's group of the comparison."""
        update: dict[str, Any] = {}
        if self.config.storage is not None:
            update["study_name"] = f"{comparison.name}/{self.name}"
        if self.config.wandb_group is None:
            update["wandb_group"] = comparison.name
        return self.config.model_copy(update=update)


@dataclass(frozen=True)
class ComparisonPlan:
    """A checked comparison.

    Attributes:
        config: the comparison, presets of spaces replaced by what they hold.
        searches: all searches.
        plans: what each would do, in the same order.
    """

    config: ComparisonConfig
    searches: list[Search]
    plans: list[Plan]


def plan_comparison(config: ComparisonConfig) -> ComparisonPlan:
    """Checks a comparison completely before anything is run.

    Raises:
        LacerError: a search that would not start; budgets that are not equal.
    """
    from lacer.search.designers.base import designer_class
    from lacer.search.loop import make_designer, plan
    from lacer.search.space import read_space

    def whole(fields: Mapping[str, Any]) -> dict[str, Any]:
        space = fields.get("space")  # its content is kept: a file may change before the comparison is gone on with
        return {**fields, "space": read_space(space)} if isinstance(space, str) else dict(fields)

    config = config.model_copy(update={
        "base": whole(config.base), "envs": {k: whole(v) for k, v in config.envs.items()},
        "designers": {k: whole(v) for k, v in config.designers.items()}})
    searches = config.searches()
    known: dict[tuple[str, str], Plan] = {}
    for s in searches:
        if (s.env, s.label) in known:
            continue
        made = known[s.env, s.label] = plan(s.config)
        cls = designer_class(made.designer)
        if not cls.trains:
            make_designer(made.designer, s.config, None)
        if s.config.expert_first:
            s.config.limits.check(made.space.to_spec(made.expert), made.card, s.config.text_model)
    trains = {label: made for (_, label), made in known.items() if designer_class(made.designer).trains}
    if trains and len(known) > len(trains):
        label, made = next(iter(trains.items()))
        c = made.config
        most = c.candidates * c.protocol.steps
        if c.max_env_steps is None or c.max_env_steps > most:
            why = "the number of candidates does not count" if c.max_env_steps is None else (
                f"the others do not get: their {c.candidates} candidates are trained for {most:,} steps, less than "
                "max_env_steps")
            raise LacerError(f"{label} trains by itself, {own_steps(c):,} environment steps that {why}, so budgets "
                             f"would not be equal. Give all the same number of steps, e.g. base.max_env_steps: {most}")
    return ComparisonPlan(config, searches, [replace(known[s.env, s.label], config=s.config) for s in searches])


def default_folder(name: str) -> Path:
    """``comparisons/<date-time-name>``."""
    return Path("comparisons") / f"{datetime.now():%Y%m%d-%H%M%S}-{name}"


def read_comparison(folder: Path) -> ComparisonConfig:
    """The configuration of a comparison's folder. Raises LacerError if there is none or it is damaged."""
    if not (folder / FILE).is_file():
        raise LacerError(f"{folder} is no comparison: it has no {FILE if folder.is_dir() else 'such folder'}")
    data = read_config(folder / FILE)
    try:
        return validate_as(ComparisonConfig, data, str(folder / FILE))
    except LacerError as e:
        raise LacerError(f"{e}\nThe folder is of another version of lacer, or was edited.") from None


def run_comparison(config: ComparisonConfig, folder: Path, *, resume: bool = False, quiet: bool = False) -> Compared:
    """Runs all searches of a comparison one after the other on one executor, and writes the comparison.

    A finished search is taken over; one that was killed goes on. Several processes may work on one folder at once, on
    one machine or on several that share its file system: each takes the searches that no other is working on.

    Args:
        config: what to run.
        folder: the comparison's folder.
        resume: go on with a folder that is there.
        quiet: print nothing.

    Raises:
        LacerError: wrong input, before anything is run; a search cannot go on.
    """
    from lacer.search.loop import sigterm_as_interrupt

    planned = plan_comparison(config)
    if folder.exists() and not resume:
        raise LacerError(f"{folder} exists already. To go on with it: lacer compare --resume "
                         f"{shlex.quote(str(folder))}. To start anew: choose another folder with --out.")
    storage = planned.searches[0].config.storage
    if storage is not None:
        if has_password(storage):
            raise LacerError("a comparison keeps no password, and its page is written from the database: leave it out "
                             "of storage and put it into PGPASSWORD or ~/.pgpass")
        check_server(storage)
    changes: dict[str, Any] = {}
    if resume:
        changes = _check_changes(read_comparison(folder), planned.config)
    try:
        (folder / "locks").mkdir(parents=True, exist_ok=True)
        with sigterm_as_interrupt(), (folder / "driver.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)  # with all others that work on it; `lacer watch` looks at it
            _write_start(planned, folder)
            _Runner(planned, folder, changes, quiet).run()
    except OSError as e:
        raise LacerError(f"cannot write {folder}: {e.strerror or e}") from None
    return report_comparison(folder)


def _write_start(planned: ComparisonPlan, folder: Path) -> None:
    from lacer.search.loop import provenance

    write_config(folder / FILE, planned.config.model_dump(mode="json"))
    if not (folder / "versions.json").exists():
        write_whole(folder / "versions.json", json.dumps(provenance(planned.searches[0].config), indent=1) + "\n")


def _check_changes(before: ComparisonConfig, now: ComparisonConfig) -> dict[str, Any]:
    """Fields of base that were changed for a resumed comparison. Raises LacerError if results would not be
    comparable."""
    old, new = before.model_dump(mode="json"), now.model_dump(mode="json")
    for part in ("designers", "envs"):
        for label in old[part]:
            if label in new[part] and old[part][label] != new[part][label]:
                raise LacerError(f"{part}.{label} cannot change when a comparison is resumed: give it another label")
    fields = {**old["base"], **new["base"]}
    plain = SearchConfig.model_fields  # a field that was taken out has its default
    changes = {k: new["base"][k] if k in new["base"] else plain[k].get_default(call_default_factory=True)
               for k in fields if old["base"].get(k) != new["base"].get(k)}
    wrong = sorted(set(changes) - (RESUMABLE - {"candidates", "max_env_steps", "max_tokens", "max_seconds"}))
    if wrong:
        raise LacerError(f"base.{wrong[0]} cannot change when a comparison is resumed "
                         f"({old['base'].get(wrong[0])!r} -> {new['base'].get(wrong[0])!r}); searches would not be "
                         "comparable")
    return changes


class _Runner:
    """Works through the searches of a comparison."""

    def __init__(self, planned: ComparisonPlan, folder: Path, changes: Mapping[str, Any], quiet: bool) -> None:
        from lacer.search.progress import Display

        self._work = list(zip(planned.searches, planned.plans, strict=True))
        self._folder, self._changes = folder, changes
        total = sum(p.total_steps for p in planned.plans)
        self._display = Display(planned.plans[0].card, total, quiet)
        self._executor: Any = None
        self._of, self._done = len(self._work), 0

    def run(self) -> None:
        say = self._display.say
        say(f"Comparing {len({s.label for s, _ in self._work})} designers over {len({s.seed for s, _ in self._work})} "
            f"seeds{self._places()}: {self._of} searches. Folder: {self._folder}")
        waiting = []
        for search, plan in self._work:
            if is_finished(search.folder(self._folder), search.placed(self._folder)):
                self._display.skip(plan.total_steps)
            else:
                waiting.append((search, plan))
        self._done = self._of - len(waiting)
        if self._done:
            say(f"{self._done} of them are finished.")
        try:
            told = False
            while waiting:
                busy = [item for item in waiting if not self._take(*item)]
                if busy and not told:
                    told = True
                    say(f"Waiting for {len(busy)} searches that other processes are working on.")
                waiting = busy
                if waiting:
                    time.sleep(2)
        except KeyboardInterrupt:
            self._close()
            say(f"Stopped. Nothing finished is lost. To go on: lacer compare --resume "
                f"{shlex.quote(str(self._folder))}")
            raise
        except LacerError as e:
            raise LacerError(f"{e}\nNothing finished is lost. To go on: lacer compare --resume "
                             f"{shlex.quote(str(self._folder))}") from e
        finally:
            self._close()

    def _places(self) -> str:
        envs = len({s.env for s, _ in self._work})
        return f" in {envs} environments" if envs > 1 else f" on {self._work[0][0].config.env}"

    def _close(self) -> None:
        if self._executor is not None:
            self._executor.close()
            self._executor = None
        self._display.close()

    def _take(self, search: Search, plan: Plan) -> bool:
        """Runs a search, unless another process is working on it; one that has been finished there counts as run."""
        from lacer.search.loop import Shared, make_executor, run_search

        folder, config = search.folder(self._folder), search.placed(self._folder)
        with locked(self._folder / "locks" / f"{search.name.replace('/', '%')}.lock") as mine:
            if not mine:
                return False
            if is_finished(folder, config):
                self._display.skip(plan.total_steps)
                self._done += 1
                return True
            if self._executor is None:
                self._executor = make_executor(search.config, self._folder / "workers.log")
                _warm_up(self._executor, search.config)
            part = Part(self._display, plan.total_steps, f"[{self._done + 1}/{self._of} {search.name}]")
            fresh = not (folder / "config.yaml").exists()
            if fresh and folder.exists():  # it was killed before it had begun
                shutil.rmtree(folder)
            if not fresh:
                config = resumed(SearchConfig, folder, dict(self._changes))
            result = run_search(config, folder, True, fresh, Shared(self._executor, part))  # type: ignore[arg-type]
            part.done(_said(result.outcome, search))
            self._done += 1
        return True


def _warm_up(executor: Executor, config: SearchConfig) -> None:
    """Waits until the workers of a pool have started, so that the first search does not pay for it in wall time."""
    from lacer.search.executors import ProcessPool
    from lacer.search.loop import run_request

    if not isinstance(executor, ProcessPool):
        return
    request = run_request(config, None, config.protocol.model_copy(update={"eval_episodes": 1}), config.seed)
    left = executor.free
    for i in range(left):
        executor.submit(f"warm-up {i}", request)
    while left:
        left -= sum(event.evaluation is not None for event in executor.poll(1.0))


def _said(outcome: Any, search: Search) -> str:
    o, final = outcome.card.objective, outcome.finals.get(WINNER)
    if final is None or not final.ok:
        return f"{search.name}: no result" + (f": {final.reason[:200]}" if final is not None else "")
    return f"{search.name}: winner #{outcome.winner}, final {o.metric} {final.objective:.3f} {o.unit}".rstrip()


class Part:
    """What one search of a comparison shows: its results as lines that begin with its name, its steps as part of the
    whole.

    Args:
        display: of the comparison.
        steps: environment steps that the search was planned with.
        name: what its lines begin with.
    """

    def __init__(self, display: Display, steps: int, name: str) -> None:
        self._display, self._left, self._name = display, steps, name
        self.headline(name)

    def skip(self, steps: int) -> None:
        """Steps of an earlier session."""
        self._left -= steps
        self._display.skip(steps)

    def say(self, text: str) -> None:
        """Says nothing: a comparison of hundreds of searches would drown in it."""

    def headline(self, text: str) -> None:
        """The line above the bars."""
        self._display.headline(text if text.startswith("[") else f"{self._name} {text}")

    def started(self, key: str, label: str, steps: int) -> None:
        """A run has started."""
        self._display.started(key, label, steps)

    def progress(self, key: str, p: Mapping[str, Any]) -> None:
        """News of a run."""
        self._display.progress(key, p)

    def ended(self, key: str, steps: int, text: str) -> None:
        """A run has ended."""
        steps = min(steps, self._left)
        self._left -= steps
        self._display.ended(key, steps, "")

    def done(self, text: str) -> None:
        """The search has ended; what it did not use of its steps counts as done."""
        self._display.ended("", max(0, self._left), f"{self._name.split()[0]}] {text}")
        self._left = 0

    def close(self) -> None:
        """The comparison's display stays."""


def is_compared(folder: Path) -> bool:
    """Whether a process of this machine is working on a comparison."""
    return is_locked(folder / "driver.lock", shared=True)


def is_finished(folder: Path, config: SearchConfig) -> bool:
    """Whether the search of a run folder came to its end. Raises LacerError if its study is damaged."""
    if not (folder / "config.yaml").exists():
        return False
    if config.storage is None:
        if not (folder / "study.db").exists():
            return False
        with StudyReader(f"sqlite:///{(folder / 'study.db').resolve()}", None) as reader:
            return reader.attrs().get("finished") is not None
    try:
        with StudyReader(config.storage, config.study_name) as reader:
            return reader.attrs().get("finished") is not None
    except LacerError as e:
        if "there is no study" in str(e) or "holds no study" in str(e):
            return False
        raise


# -- finished runs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A run in a comparison: labels of its environment and its designer, and the run."""

    env: str
    label: str
    run: StoredRun


def find_runs(words: Sequence[str]) -> list[Entry]:
    """Runs named on a command line: folders, or ``label=pattern``; the folder of a comparison stands for all its runs.

    Runs of one designer with the same options are one group, named after it; a label names the group itself.

    Raises:
        LacerError: no such run, one that is not finished or has nothing to compare, or one that is named twice.
    """
    found: list[tuple[str, Path, str, str]] = []
    for word in words:
        label, _, pattern = word.rpartition("=") if "=" in word and not Path(word).exists() else ("", "", word)
        paths = sorted(glob.glob(pattern)) if label or not Path(pattern).exists() else [pattern]
        if not paths:
            raise LacerError(f"{pattern} is no run: there is no such folder")
        for p in map(Path, paths):
            if (p / FILE).exists():
                found += [(label or s.label, s.folder(p), s.env, s.label) for s in read_comparison(p).searches()]
            else:
                found.append((label, p, "", ""))
    twice = [str(p) for p, n in Counter(p.resolve() for _, p, _, _ in found).items() if n > 1]
    if twice:
        raise LacerError(f"{twice[0]} is given twice")
    entries = [Entry(env, label, check_run(read_run(path))) for label, path, env, _ in found]
    return _labelled(entries)


def check_run(run: StoredRun) -> StoredRun:
    """A run that can be compared. Raises LacerError saying what is missing and what to do."""
    done = sum(t.trial.status != "rejected" and t.trial.status != "running" for t in run.trials)
    if not run.finished:
        raise LacerError(f"{run.place} is not finished ({done} candidates so far): go on with it: lacer search "
                         f"--resume {shlex.quote(run.place)}")
    if not any(t.trial.objective is not None for t in run.trials):
        reason = next((t.trial.reason for t in run.trials if t.trial.reason), "it has no trials")
        raise LacerError(f"{run.place} has no candidate with a result, so there is nothing to compare: {reason[:200]}")
    return run


def _labelled(entries: list[Entry]) -> list[Entry]:
    """Gives runs without a label their designer's name, with what tells groups of one designer apart."""
    options = {}
    for i, e in enumerate(entries):
        if not e.label:
            c = e.run.config
            name = str(c.get("designer", "auto"))
            if name == "auto":
                from lacer.search.loop import WITHOUT_LLM

                name = "lacer" if c.get("llm") else WITHOUT_LLM
            options[i] = (name, {**(c.get("designer_kwargs") or {}),
                                 **{k: c[k] for k in ("llm", "batch", "designer_steps", "llm_temperature")
                                    if c.get(k) != SearchConfig.model_fields[k].default and k in c}})
    by_name: dict[str, list[dict[str, Any]]] = {}
    for name, kwargs in options.values():
        by_name.setdefault(name, []).append(kwargs)

    def label(name: str, kwargs: dict[str, Any]) -> str:
        differ = sorted({k for other in by_name[name] for k in {**other, **kwargs} if other.get(k) != kwargs.get(k)})
        return name + "".join(f" {k}={kwargs.get(k)}" for k in differ)

    return [replace(e, label=label(*options[i])) if i in options else e for i, e in enumerate(entries)]


def check_comparable(entries: Sequence[Entry], allow: Sequence[str] = ()) -> tuple[list[Entry], list[str]]:
    """Refuses to compare what is not alike.

    Args:
        entries: the runs.
        allow: what may differ, out of ``ALLOW``.

    Returns:
        The runs, labelled by environment where environments differ, and notes on what differs.

    Raises:
        LacerError: names what differs, in which runs, and the option that allows it.
    """
    for word in allow:
        if word not in ALLOW:
            raise LacerError(f"--allow {word}: one of {', '.join(ALLOW)}{did_you_mean(word, ALLOW)}")
    kinds = {e.run.plain for e in entries}
    if len(kinds) > 1:
        raise LacerError("some of these runs searched with a function as the objective, others with an environment: "
                         "they cannot be compared")
    entries, notes = list(entries), []
    defaults = SearchConfig().model_dump(mode="json")  # for fields that are younger than a run
    places = _places(entries)
    if any(e.env for e in entries):  # of one comparison, which says what its environments are
        groups = [[e for e in entries if e.env == env] for env in dict.fromkeys(e.env for e in entries)]
    elif "env" in allow and len(set(places)) > 1:
        entries = [replace(e, env=place) for e, place in zip(entries, places, strict=True)]
        groups = [[e for e in entries if e.env == env] for env in dict.fromkeys(places)]
    else:
        groups = [entries]
    for group in groups:
        objectives = {(e.run.objective.metric, e.run.objective.direction): e.run.place for e in group}
        if len(objectives) > 1:
            raise LacerError("these runs have different objectives: " + ", ".join(
                f"{metric}, {direction}d in {place}" for (metric, direction), place in objectives.items()))
        for word, keys in SAME.items():
            for key in keys:
                notes += _differ(group, word, key, [e.run.config.get(key, defaults[key]) for e in group], allow)
        for name in PACKAGES:
            found = [(e.run.versions.get("packages") or {}).get(name) for e in group]
            notes += _differ(group, "version", f"the version of {name}", found, allow)
        again = Counter((e.label, e.run.config.get("seed", 0)) for e in group)
        (label, seed), most = again.most_common(1)[0]
        if most > 1:
            which = [e.run.place for e in group if (e.label, e.run.config.get("seed", 0)) == (label, seed)]
            raise LacerError(f"{which[0]} and {which[1]} are {label!r} with the same seed, {seed}: they are no "
                             "independent runs. Give them different labels, NAME=RUN, or leave one out.")
    workers = {json.dumps([e.run.config.get(k) for k in ("workers", "executor")]) for e in entries}
    machines = {str(e.run.versions.get("platform")) for e in entries}
    if len(workers) > 1 or len(machines) > 1:
        notes.append("The runs had different workers or machines: wall times cannot be compared.")
    return entries, notes


def _places(entries: Sequence[Entry]) -> list[str]:
    """Names of environments, with their arguments where one environment comes with several."""
    ids = [str(e.run.config.get("env", "")) for e in entries]
    kwargs = [json.dumps(e.run.config.get("env_kwargs") or {}, sort_keys=True) for e in entries]
    several = {i for i in ids if len({k for j, k in zip(ids, kwargs, strict=True) if j == i}) > 1}
    return [f"{i} {k}" if i in several else i for i, k in zip(ids, kwargs, strict=True)]


def _differ(group: Sequence[Entry], word: str, key: str, values: Sequence[Any], allow: Sequence[str]) -> list[str]:
    shown = [json.dumps(v, sort_keys=True, default=str) for v in values]
    if len(set(shown)) < 2:
        return []
    where: dict[str, Entry] = {}
    for e, text in zip(group, shown, strict=True):
        where.setdefault(text, e)
    parts = ", ".join(f"{text[:80]} in {e.run.place}" for text, e in list(where.items())[:3])
    if word in allow:
        return [f"The runs differ in {key}: {parts}."]
    raise LacerError(f"these runs differ in {key}, so they cannot be compared as they are: {parts}. If that is what "
                     f"you want: --allow {word}")


def compare_runs(entries: Sequence[Entry], folder: Path, *, allow: Sequence[str] = (), levels: Sequence[float] = (),
                 title: str = "") -> Compared:
    """Compares finished runs and writes the comparison into a folder.

    Args:
        entries: from :func:`find_runs`.
        folder: to write; must not exist.
        allow: what may differ, see :func:`check_comparable`.
        levels: scores to be reached.
        title: of the page.

    Raises:
        LacerError: runs that cannot be compared, or the folder exists.
    """
    compared = gather(entries, folder, allow=allow, levels=levels, title=title)
    if folder.exists():
        raise LacerError(f"{folder} exists already; choose another folder with --out")
    try:
        folder.mkdir(parents=True)
        _write(compared)
    except OSError as e:
        raise LacerError(f"cannot write {folder}: {e.strerror or e}") from None
    return compared


def gather(entries: Sequence[Entry], folder: Path, *, allow: Sequence[str] = (), levels: Sequence[float] = (),
           title: str = "") -> Compared:
    """A comparison of runs, nothing written yet. Raises LacerError as :func:`check_comparable`."""
    from lacer.search.compare_tables import Compared

    if not entries:
        raise LacerError("there are no runs to compare")
    for level in levels:
        if not math.isfinite(level):
            raise LacerError(f"a level must be a number, not {level}")
    checked, notes = check_comparable(entries, allow)
    places = list(dict.fromkeys(e.env or str(e.run.config.get("env", "a function")) for e in checked))
    labels = list(dict.fromkeys(e.label for e in checked))
    title = title or f"{_listed(labels, 'designers')} on {_listed(places, 'environments')}"
    return Compared(folder, title, checked, tuple(levels), notes, _objectives(checked))


def report_comparison(folder: Path) -> Compared:
    """Writes tables, pictures and page of a comparison whose searches are finished. Raises LacerError."""
    config = read_comparison(folder)
    entries = [Entry(s.env, s.label, check_run(read_run(s.folder(folder)))) for s in config.searches()]
    # Its configuration says what is the same; spaces that differ by designer stand there.
    compared = gather(entries, folder, allow=("space",), levels=config.levels)
    try:
        with (folder / "locks" / "report.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _write(compared)
    except OSError as e:
        raise LacerError(f"cannot write {folder}: {e.strerror or e}") from None
    return compared


def _listed(names: Sequence[str], what: str) -> str:
    """``a, b and c``; of many only their number."""
    if len(names) > 6:
        return f"{len(names)} {what}"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _write(compared: Compared) -> None:
    from lacer.search.compare_report import write

    write(compared)


def _objectives(entries: Sequence[Entry]) -> dict[str, Objective]:
    """Objective by environment's label, with its unit where the environment is installed."""
    from lacer.envs import task_card

    out = {}
    for e in entries:
        if e.env in out:
            continue
        out[e.env] = e.run.objective
        if not e.run.plain:
            with contextlib.suppress(LacerError):
                card = task_card(str(e.run.config["env"]), **dict(e.run.config.get("env_kwargs") or {}))
                if card.objective.metric == e.run.objective.metric:
                    out[e.env] = card.objective
    return out


