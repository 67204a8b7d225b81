"""Where a study is kept: an Optuna study in a relational database, SQLite in the run folder by default.

Optuna's own calls query the database for every parameter of a trial, 50 ms for 20 decisions; here a trial is added, and
finished, in one transaction of a few statements on Optuna's tables (schema v3.2.0.a, that of Optuna 3.2 to 5). What is
written is an ordinary Optuna study: its dashboard, plots and samplers read it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sqlite3
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import optuna
import sqlalchemy as sa
from optuna.distributions import CategoricalDistribution, distribution_to_json
from optuna.storages import RDBStorage
from sqlalchemy.engine import Connection, make_url

from lacer.envs import LacerError, Objective

optuna.logging.set_verbosity(optuna.logging.WARNING)

State = Literal["RUNNING", "COMPLETE", "PRUNED", "FAIL"]

BUSY_SECONDS = 60
"""How long a write waits for another process that has locked the database."""

_TABLES = ("trials", "trial_params", "trial_user_attributes", "trial_values", "trial_intermediate_values",
           "study_user_attributes")


class Row(NamedTuple):
    """A trial as it is stored."""

    number: int
    id: int
    state: str
    params: dict[str, Any]
    attrs: dict[str, Any]


class Store:
    """One study in a database; a single process writes.

    SQLite is kept in write-ahead mode: a reader (``optuna-dashboard``) does not disturb the writer, and after
    ``kill -9`` or a cut of the log, every transaction up to there is whole.

    Args:
        url: Optuna storage URL, e.g. ``sqlite:////runs/x/study.db`` or ``postgresql+psycopg://host/database``.
        name: Optuna study name.
        objective: metric and direction of a new study.
        create: ``"no"`` opens an existing study only, ``"yes"`` makes a new one, ``"if missing"`` does either.

    Raises:
        LacerError: the study cannot be opened or created; the database is damaged; it exists already.
    """

    def __init__(self, url: str, name: str, objective: Objective, create: Literal["no", "yes", "if missing"]) -> None:
        self.url, self.name = url, name
        self.shown = hidden_password(url)
        self._file = sqlite_file(url)
        with self._errors("open"):
            if self._file is not None:
                if self._file.exists():
                    check_sqlite(self._file)
                elif create == "no":
                    raise LacerError(f"there is no study in {self._file}")
                else:
                    _create_sqlite(self._file, name, objective)
            self.storage = self._connect(url)
            self.study = self._study(objective, create if self._file is None else "if missing")
            self._id = self.study._study_id
            tables = sa.MetaData()
            tables.reflect(self.storage.engine, only=_TABLES)
            self._table = tables.tables

    def _connect(self, url: str) -> RDBStorage:
        # A server may close connections that idle for an hour.
        kwargs = {"connect_args": {"timeout": BUSY_SECONDS}} if self._file is not None else {"pool_pre_ping": True}
        storage = RDBStorage(url, engine_kwargs=kwargs)
        if self._file is not None:
            sa.event.listen(storage.engine, "connect", _write_ahead)
            storage.engine.dispose()
        return storage

    def _study(self, objective: Objective, create: str) -> optuna.Study:
        exists = any(s.study_name == self.name for s in self.storage.get_all_studies())
        if exists and create == "yes":
            raise LacerError(f"{self.shown} holds a study {self.name!r} already; give another --study-name")
        if not exists and create == "no":
            raise LacerError(f"there is no study {self.name!r} in {self.shown}")
        study = _optuna_study(self.storage, self.name, objective)
        if [d.name.lower() for d in study.directions] != [objective.direction]:
            raise LacerError(f"the study {self.name!r} in {self.shown} has another objective")
        return study

    @contextlib.contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        """Says what the many errors of as many database drivers mean."""
        try:
            yield
        except LacerError:
            raise
        except ImportError as e:
            raise LacerError(_no_driver(self.url, e)) from None
        except (sa.exc.SQLAlchemyError, sqlite3.Error, optuna.exceptions.StorageInternalError, OSError) as e:
            raise LacerError(f"cannot {doing} the study in {self._file or self.shown}: {_why(e)}") from e

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Connection]:
        with self._errors("write"), self.storage.engine.begin() as connection:
            yield connection

    def trials(self, distributions: Mapping[str, CategoricalDistribution]) -> list[Row]:
        """All trials, by number. ``distributions`` are those of the search space, by decision.

        Raises:
            LacerError: trials are missing, or have decisions or options that the space does not have.
        """
        with self._errors("read"), self.storage.engine.connect() as c:
            t, p, a = (self._table[n] for n in ("trials", "trial_params", "trial_user_attributes"))
            rows = {r.trial_id: Row(r.number, r.trial_id, str(r.state), {}, {}) for r in c.execute(
                sa.select(t.c.trial_id, t.c.number, t.c.state).where(t.c.study_id == self._id).order_by(t.c.number))}
            params = sa.select(p.c.trial_id, p.c.param_name, p.c.param_value, p.c.distribution_json).join(
                t, t.c.trial_id == p.c.trial_id).where(t.c.study_id == self._id).order_by(p.c.param_id)
            for trial_id, name, value, kind in c.execute(params):
                if name not in distributions or kind != _json_of(distributions[name]):
                    raise LacerError(f"trial {rows[trial_id].number} is not of this search space: it has another "
                                     f"decision {name!r}")
                rows[trial_id].params[name] = distributions[name].to_external_repr(value)
            attrs = sa.select(a.c.trial_id, a.c.key, a.c.value_json).join(
                t, t.c.trial_id == a.c.trial_id).where(t.c.study_id == self._id)
            for trial_id, key, text in c.execute(attrs):
                rows[trial_id].attrs[key] = json.loads(text)
        if [r.number for r in rows.values()] != list(range(len(rows))):
            raise LacerError("trials are missing: the study is damaged")
        return list(rows.values())

    def add(self, number: int, state: State, params: Mapping[str, Any],
            distributions: Mapping[str, CategoricalDistribution], attrs: Mapping[str, Any]) -> int:
        """Adds a trial and returns its id in the database."""
        now = datetime.now()
        with self._transaction() as c:
            made = c.execute(self._table["trials"].insert().values(
                number=number, study_id=self._id, state=state, datetime_start=now,
                datetime_complete=None if state == "RUNNING" else now))
            assert made.inserted_primary_key is not None
            trial_id = int(made.inserted_primary_key[0])
            self._insert(c, "trial_params", ({
                "trial_id": trial_id, "param_name": name, "param_value": distributions[name].to_internal_repr(value),
                "distribution_json": _json_of(distributions[name])} for name, value in params.items()))
            self._attrs(c, trial_id, attrs)
        return trial_id

    def finish(self, trial_id: int, state: State, value: float | None, curve: Iterable[tuple[int, float]],
               attrs: Mapping[str, Any]) -> None:
        """Ends a running trial: its value, its learning curve (step, value) and further attributes."""
        with self._transaction() as c:
            self._attrs(c, trial_id, attrs)
            if value is not None:
                c.execute(self._table["trial_values"].insert().values(
                    trial_id=trial_id, objective=0, value=value, value_type="FINITE"))
            steps = {int(step): float(v) for step, v in curve if math.isfinite(v)}
            self._insert(c, "trial_intermediate_values", ({
                "trial_id": trial_id, "step": step, "intermediate_value": v, "intermediate_value_type": "FINITE"}
                for step, v in steps.items()))
            trials = self._table["trials"]
            c.execute(trials.update().where(trials.c.trial_id == trial_id).values(
                state=state, datetime_complete=datetime.now()))

    def _insert(self, c: Connection, table: str, rows: Iterable[dict[str, Any]]) -> None:
        rows = list(rows)
        if rows:
            c.execute(self._table[table].insert(), rows)

    def _attrs(self, c: Connection, trial_id: int, attrs: Mapping[str, Any]) -> None:
        self._insert(c, "trial_user_attributes", (
            {"trial_id": trial_id, "key": k, "value_json": json.dumps(v)} for k, v in attrs.items()))

    def set_trial_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Stores a JSON value with a trial."""
        table = self._table["trial_user_attributes"]
        with self._transaction() as c:
            c.execute(table.delete().where(table.c.trial_id == trial_id, table.c.key == key))
            self._attrs(c, trial_id, {key: value})

    def get_attr(self, key: str) -> Any:
        """A value stored with the study, or None."""
        with self._errors("read"):
            return self.storage.get_study_user_attrs(self._id).get(key)

    def set_attr(self, key: str, value: Any) -> None:
        """Stores a JSON value with the study."""
        with self._errors("write"):
            self.storage.set_study_user_attr(self._id, key, value)

    def close(self) -> None:
        """Closes all connections; SQLite's log is merged into its file."""
        self.storage.remove_session()
        self.storage.engine.dispose()


_JSON: dict[CategoricalDistribution, str] = {}


def _json_of(distribution: CategoricalDistribution) -> str:
    if distribution not in _JSON:
        _JSON[distribution] = distribution_to_json(distribution)
    return _JSON[distribution]


def _write_ahead(connection: Any, _: Any) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")


def _optuna_study(storage: RDBStorage, name: str, objective: Objective) -> optuna.Study:
    study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True, direction=objective.direction)
    if not study.metric_names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([objective.metric])
    return study


def _create_sqlite(path: Path, name: str, objective: Objective) -> None:
    """Makes the file under another name first, so a study file is whole whenever it is there."""
    new = path.with_name(path.name + ".new")
    for suffix in ("", "-journal", "-wal", "-shm"):
        Path(f"{new}{suffix}").unlink(missing_ok=True)
    storage = RDBStorage(sqlite_url(new))
    _optuna_study(storage, name, objective)
    storage.remove_session()
    storage.engine.dispose()
    os.replace(new, path)


def check_sqlite(path: Path) -> None:
    """Looks through a SQLite file before anything is written to it.

    Raises:
        LacerError: it is no database, cut or damaged, or cannot be read.
    """
    if not path.stat().st_size:
        raise LacerError(f"{path} is damaged: it is empty. Restore it from a copy, or start a new run.")
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as db:
            said = [row[0] for row in db.execute("PRAGMA integrity_check(3)")]
            if said == ["ok"]:
                db.execute("SELECT 1 FROM studies, trials LIMIT 1")
    except sqlite3.DatabaseError as e:
        if isinstance(e, sqlite3.OperationalError) and ("locked" in str(e) or "unable to open" in str(e)):
            raise LacerError(f"cannot open the study in {path}: {_why(e)}") from None
        said = [str(e)]
    if said != ["ok"]:
        raise LacerError(f"{path} is damaged: {'; '.join(said)[:300]}. Restore it from a copy, or start a new run; the "
                         "file was left as it is.")


def study_names(url: str) -> list[str]:
    """Names of the studies in a database. Raises LacerError if it cannot be read."""
    path = sqlite_file(url)
    if path is not None:
        check_sqlite(path)
    try:
        return optuna.get_all_study_names(url)
    except ImportError as e:
        raise LacerError(_no_driver(url, e)) from None
    except Exception as e:  # the many errors of as many database drivers
        raise LacerError(f"cannot open the study in {hidden_password(url)}: {_why(e)}") from e


def check_server(url: str, name: str | None = None) -> None:
    """Looks whether a database can be reached before anything else is done.

    Args:
        url: a storage URL.
        name: of a study that is to be made.

    Raises:
        LacerError: no such driver or server, or the server has a study of that name.
    """
    path = sqlite_file(url)
    if path is not None and not path.exists():
        if not path.parent.is_dir():
            raise LacerError(f"there is no folder {path.parent} for the study")
    elif name in study_names(url):
        raise LacerError(f"{hidden_password(url)} holds a study {name!r} already; give another --study-name")


def sqlite_url(path: Path) -> str:
    """Optuna storage URL of a SQLite file."""
    return f"sqlite:///{path.resolve()}"


def sqlite_file(url: str) -> Path | None:
    """The file of a SQLite URL; None for other databases."""
    parsed = _parsed(url)
    return Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None


def hidden_password(url: str) -> str:
    """A storage URL that can be shown."""
    return _parsed(url).render_as_string(hide_password=True)


def has_password(url: str) -> bool:
    """Whether a storage URL holds a password."""
    return _parsed(url).password is not None


def without_password(url: str) -> str:
    """A storage URL that can be written down."""
    return _parsed(url)._replace(password=None).render_as_string(hide_password=False)


def _parsed(url: str) -> sa.URL:
    try:
        return make_url(url)
    except sa.exc.ArgumentError:
        raise LacerError("storage must be a database URL such as sqlite:////folder/study.db or "
                         "postgresql+psycopg://user@host/database") from None


def _no_driver(url: str, error: ImportError) -> str:
    return f"the driver of {hidden_password(url)} is missing ({error}); for PostgreSQL: pip install 'lacer[postgres]'"


def _why(error: BaseException) -> str:
    """The innermost message, with what to do where that is known."""
    root: BaseException = error
    seen: Callable[[BaseException], BaseException | None] = lambda e: getattr(e, "orig", None) or e.__cause__  # noqa: E731
    while (inner := seen(root)) is not None:
        root = inner
    text = " ".join(str(root).split())[:300] or type(root).__name__
    hints = {"disk is full": "free some space, then resume", "No space left": "free some space, then resume",
             "disk I/O error": "the disk may be full or gone", "readonly": "the folder cannot be written",
             "locked": f"another process has kept it locked for {BUSY_SECONDS} s",
             "unable to open": "is the folder there, and may it be written?"}
    return text + next((f" ({hint})" for key, hint in hints.items() if key in text), "")
