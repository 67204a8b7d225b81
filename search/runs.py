"""Runs as they are stored, for comparing, exporting and watching: read without disturbing a search that is still
writing, without its environment, and whatever its search space was."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from optuna.distributions import BaseDistribution, json_to_distribution
from pydantic import ValidationError
from sqlalchemy.engine import Connection

from lacer.agents import Evaluation
from lacer.envs import LacerError, Objective
from lacer.search.config import SearchConfig, resumed
from lacer.search.files import read_config, read_json
from lacer.search.outcome import EXPERT, NOOP, WINNER, total_usage
from lacer.search.storage import BUSY_SECONDS, hidden_password, sqlite_file, sqlite_url
from lacer.search.study import Proposal, Trial, TrialStatus

_TABLES = ("studies", "study_directions", "study_system_attributes", "study_user_attributes", "trials", "trial_params",
           "trial_user_attributes")


@dataclass(frozen=True)
class StoredTrial:
    """A trial as it is stored.

    Attributes:
        trial: the trial; its ``spec`` is None, because the environment is not asked.
        encoder: the encoder as plain data, None where there is none.
        started, ended: when it was proposed, and when its result came.
    """

    trial: Trial
    encoder: dict[str, Any] | None
    started: datetime
    ended: datetime | None


@dataclass(frozen=True)
class StoredRun:
    """A run folder, or a study in a database.

    Attributes:
        place: the folder, or the study's name.
        config: the search's configuration as plain data.
        versions: what is in ``versions.json``; empty for a study without a folder.
        objective: metric and direction; the unit is not stored.
        attrs: what is stored with the study.
        trials: all of them, by number.
    """

    place: str
    config: Mapping[str, Any]
    versions: Mapping[str, Any]
    objective: Objective
    attrs: Mapping[str, Any]
    trials: tuple[StoredTrial, ...] = field(repr=False)

    @property
    def plain(self) -> bool:
        """Whether a function was its objective, so that nothing was trained."""
        return "env" not in self.config

    @property
    def finished(self) -> bool:
        """Whether the search came to its end."""
        return self.attrs.get("finished") is not None

    @property
    def ended(self) -> str:
        """Why it ended before all candidates were evaluated, else ""."""
        return str((self.attrs.get("finished") or {}).get("why", ""))

    @property
    def seconds(self) -> float:
        """Wall time of all sessions."""
        return float(self.attrs.get("seconds") or 0.0)

    @cached_property
    def finals(self) -> dict[str, Evaluation]:
        """Final evaluations by name; the expert's is the winner's where its encoder won."""
        out = {n: Evaluation.model_validate(self.attrs[n]) for n in (NOOP, EXPERT, WINNER) if self.attrs.get(n)}
        winner = self.winner
        if EXPERT not in out and WINNER in out and winner is not None and winner.trial.proposal.designer == EXPERT:
            out[EXPERT] = out[WINNER]
        return out

    @property
    def results(self) -> list[StoredTrial]:
        """Trials that ended (failed and pruned ones too), in the order in which they did."""
        done = [t for t in self.trials if t.trial.status in ("ok", "failed", "pruned") and t.ended is not None]
        return sorted(done, key=lambda t: (t.ended, t.trial.number))

    @property
    def winner(self) -> StoredTrial | None:
        """The trial that the final training was of; without one, the best."""
        number = self.attrs.get("final_trial")
        if number is not None and int(number) < len(self.trials):
            return self.trials[int(number)]
        ok = [t for t in self.trials if t.trial.objective is not None]
        return max(ok, key=lambda t: (self.objective.signed(t.trial.objective or 0.0), -t.trial.number), default=None)

    def clock(self, when: datetime) -> float:
        """Seconds of the search, pauses between its sessions left out, at a time."""
        begun = [(datetime.fromisoformat(s["start"]), float(s["seconds"])) for s in self.attrs.get("sessions") or ()]
        if not begun:
            begun = [(min((t.started for t in self.trials), default=when), 0.0)]
        start, before = max((b for b in begun if b[0] <= when), default=begun[0])
        return before + max(0.0, (when - start).total_seconds())

    @property
    def usage(self) -> dict[str, float]:
        """What a language model took; empty without one."""
        return total_usage(t.trial for t in self.trials)

    def repeated(self) -> set[int]:
        """Rejected trials whose encoder had been proposed before."""
        seen, out = set[str](), set[int]()
        for t in self.trials:
            code = t.trial.ncode
            if code and code in seen and t.trial.status == "rejected":
                out.add(t.trial.number)
            if code:
                seen.add(code)
        return out


def read_run(folder: Path) -> StoredRun:
    """Reads a run folder, finished or not.

    Raises:
        LacerError: no run, a half-written or damaged one, or one of another version; the message names the file.
    """
    if not folder.is_dir():
        raise LacerError(f"{folder} is no run: there is no such folder")
    if not (folder / "config.yaml").is_file():
        raise LacerError(f"{folder} is no run: it has no config.yaml" + (
            ", only the beginning of one; start it again" if (folder / "driver.lock").exists() else ""))
    config = read_config(folder / "config.yaml")
    versions = read_json(folder / "versions.json") if (folder / "versions.json").exists() else {}
    made_by = (versions.get("packages") or {}).get("lacer", "another version")
    try:
        resumed(SearchConfig, folder, {})
    except LacerError as e:
        raise LacerError(f"{folder} was made by lacer {made_by}, whose configuration this version cannot read: "
                         f"{e}") from None
    url = config.get("storage") or sqlite_url(folder / "study.db")
    if config.get("storage") is None and not (folder / "study.db").exists():
        raise LacerError(f"{folder} is half-written: it has no study.db yet. Go on with it: lacer search --resume "
                         f"{folder}")
    with StudyReader(url, None if config.get("storage") is None else str(config.get("study_name"))) as reader:
        return read_study(reader, str(folder), config, versions)


def read_study(reader: StudyReader, place: str, config: Mapping[str, Any], versions: Mapping[str, Any]) -> StoredRun:
    """A run from an open study. Raises LacerError if it cannot be read."""
    try:
        return StoredRun(place, config, versions, reader.objective, reader.attrs(), tuple(reader.trials()))
    except ValidationError as e:
        made_by = (versions.get("packages") or {}).get("lacer", "another version")
        raise LacerError(f"{place} holds evaluations that this version cannot read (it was made by lacer {made_by}): "
                         f"{str(e)[:200]}") from None


class StudyReader:
    """Reads an Optuna study of ours and never writes; SQLite files are opened read-only.

    Args:
        url: storage URL.
        name: of the study; None: the only one that is there.

    Raises:
        LacerError: no such study, or the database cannot be read.
    """

    def __init__(self, url: str, name: str | None) -> None:
        self.shown, self._file = hidden_password(url), sqlite_file(url)
        if self._file is not None and not self._file.exists():
            raise LacerError(f"there is no study in {self._file}")
        with self._errors():
            self._engine = sa.create_engine(url, poolclass=sa.NullPool) if self._file is None else sa.create_engine(
                "sqlite://", creator=self._open, poolclass=sa.NullPool)
        try:
            with self._connection() as c:
                tables = sa.MetaData()
                tables.reflect(c, only=_TABLES)
                self._table = tables.tables
                studies = {str(n): int(i) for i, n in c.execute(sa.select(
                    self._table["studies"].c.study_id, self._table["studies"].c.study_name))}
        except sa.exc.InvalidRequestError:
            raise LacerError(f"{self._file or self.shown} holds no study") from None
        if name is None:
            if len(studies) != 1:
                raise LacerError(f"{self.shown} holds {len(studies)} studies: name one with --study-name: "
                                 f"{', '.join(sorted(studies)[:20])}")
            name = next(iter(studies))
        if name not in studies:
            raise LacerError(f"there is no study {name!r} in {self.shown}; there are: "
                             f"{', '.join(sorted(studies)[:20]) or 'none'}")
        self.name, self._id = name, studies[name]
        self._kinds: dict[str, BaseDistribution] = {}

    def _open(self) -> sqlite3.Connection:
        assert self._file is not None
        uri = self._file.resolve().as_uri()
        # Without a log nobody has it open, so it is read as it is; a reader's own log would stay in the folder.
        how = "mode=ro" if Path(f"{self._file}-wal").exists() else "immutable=1"
        return sqlite3.connect(f"{uri}?{how}", uri=True, timeout=BUSY_SECONDS, check_same_thread=False)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except ImportError as e:
            raise LacerError(f"the driver of {self.shown} is missing ({e}); for PostgreSQL: pip install "
                             "'lacer[postgres]'") from None
        except (sa.exc.DBAPIError, sqlite3.Error, json.JSONDecodeError) as e:
            why = str(getattr(e, "orig", None) or e).strip().splitlines()[0][:300]
            damaged = "malformed" in why or "not a database" in why or isinstance(e, json.JSONDecodeError)
            raise LacerError(f"{self._file} is damaged: {why}. Restore it from a copy." if damaged and self._file else
                             f"cannot read the study in {self._file or self.shown}: {why}") from None

    @contextlib.contextmanager
    def _connection(self) -> Iterator[Connection]:
        with self._errors(), self._engine.connect() as c:
            yield c

    @property
    def objective(self) -> Objective:
        """Metric and direction."""
        with self._connection() as c:
            directions, attrs = self._table["study_directions"], self._table["study_system_attributes"]
            direction = c.execute(sa.select(directions.c.direction).where(directions.c.study_id == self._id)).scalar()
            names = c.execute(sa.select(attrs.c.value_json).where(
                attrs.c.study_id == self._id, attrs.c.key == "study:metric_names")).scalar()
        low = str(getattr(direction, "name", direction)).lower() == "minimize"
        return Objective(json.loads(names)[0] if names else "score", "", "minimize" if low else "maximize")

    def attrs(self) -> dict[str, Any]:
        """What is stored with the study."""
        with self._connection() as c:
            t = self._table["study_user_attributes"]
            return {k: json.loads(v) for k, v in c.execute(
                sa.select(t.c.key, t.c.value_json).where(t.c.study_id == self._id))}

    def states(self) -> dict[int, str]:
        """State of every trial in Optuna's words, by number."""
        with self._connection() as c:
            t = self._table["trials"]
            return {int(n): str(getattr(s, "name", s)) for n, s in c.execute(
                sa.select(t.c.number, t.c.state).where(t.c.study_id == self._id).order_by(t.c.number))}

    def trials(self, numbers: Collection[int] | None = None) -> list[StoredTrial]:
        """Some trials, or all, by number. Raises LacerError; ValidationError for an evaluation of another version."""
        if numbers is not None and not numbers:
            return []
        t, p, a = (self._table[n] for n in ("trials", "trial_params", "trial_user_attributes"))
        chosen = [t.c.study_id == self._id, *([] if numbers is None else [t.c.number.in_(list(numbers))])]
        with self._connection() as c:
            rows = c.execute(sa.select(t.c.trial_id, t.c.number, t.c.state, t.c.datetime_start, t.c.datetime_complete)
                             .where(*chosen).order_by(t.c.number)).all()
            params: dict[int, dict[str, Any]] = {r.trial_id: {} for r in rows}
            attrs: dict[int, dict[str, Any]] = {r.trial_id: {} for r in rows}
            for i, name, value, kind in c.execute(
                    sa.select(p.c.trial_id, p.c.param_name, p.c.param_value, p.c.distribution_json)
                    .join(t, t.c.trial_id == p.c.trial_id).where(*chosen).order_by(p.c.param_id)):
                if kind not in self._kinds:
                    self._kinds[kind] = json_to_distribution(kind)
                params[i][name] = self._kinds[kind].to_external_repr(value)
            for i, key, text in c.execute(sa.select(a.c.trial_id, a.c.key, a.c.value_json)
                                          .join(t, t.c.trial_id == a.c.trial_id).where(*chosen)):
                attrs[i][key] = json.loads(text)
        return [_trial(r.number, str(getattr(r.state, "name", r.state)), params[r.trial_id], attrs[r.trial_id],
                       r.datetime_start, r.datetime_complete) for r in rows]

    def close(self) -> None:
        """Closes the connections."""
        self._engine.dispose()

    def __enter__(self) -> StudyReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _trial(number: int, state: str, params: dict[str, Any], a: Mapping[str, Any], started: datetime,
           ended: datetime | None) -> StoredTrial:
    evaluation = Evaluation.model_validate(a["evaluation"]) if "evaluation" in a else None
    status: TrialStatus = "running" if state == "RUNNING" else "rejected"
    if evaluation is not None:
        status = "ok" if evaluation.ok else "pruned" if evaluation.status == "pruned" else "failed"
    proposal = Proposal(params or None, a.get("designer", "?"), a.get("rationale", ""), tuple(a.get("parents", ())),
                        a.get("rejected", ""), a.get("meta", {}))
    return StoredTrial(Trial(number, status, proposal, None, a.get("ncode", ""), evaluation), a.get("encoder"), started,
                       ended)
