"""Files of a run that were cut, damaged, locked or moved: the state up to there, or an error that names the file."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optuna
import pytest

from lacer.agents import Evaluation
from lacer.envs import LacerError, Objective
from lacer.search import Decision, Proposal, SearchSpace, StoredStudy, storage
from lacer.search.storage import hidden_password, sqlite_url, without_password

SPACE = SearchSpace([Decision(f"d{i}", (0, 1, 2, 3)) for i in range(8)])
SCORE = Objective("score")
EVALUATION = Evaluation(curve=[(i * 100, 0.5 * i) for i in range(30)], metrics={"speed": [1.5] * 20})


def open_study(folder: Path) -> StoredStudy:
    return StoredStudy(sqlite_url(folder / "study.db"), "s", SPACE, create="no")


def fill(study: StoredStudy, n: int) -> None:
    rng = np.random.default_rng(len(study))
    for _ in range(n):
        t = study.start(Proposal(SPACE.sample(rng), "random", "because " * 20))
        study.finish(t.number, EVALUATION.model_copy(update={"objective": float(rng.random())}))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the study of a process that was killed: a database and a log that is not merged yet."""
    folder = tmp_path_factory.mktemp("killed")
    script = (
        "import sys, os, signal; sys.path[:0] = sys.argv[2:]\n"
        "from pathlib import Path; from tests.search.test_storage import *\n"
        "study = StoredStudy(sqlite_url(Path(sys.argv[1]) / 'study.db'), 's', SPACE, create='yes')\n"
        "fill(study, 12); os.kill(os.getpid(), signal.SIGKILL)\n")
    subprocess.run([sys.executable, "-c", script, str(folder), *sys.path], timeout=120, check=False)
    assert (folder / "study.db-wal").stat().st_size > 100_000
    return folder


def content(study: StoredStudy) -> list[tuple[str, str, float | None]]:
    return [(t.status, t.ncode, t.objective) for t in study.trials]


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def test_a_log_cut_at_any_byte_gives_the_state_up_to_there(killed: Path, tmp_path: Path) -> None:
    whole = open_study(copy(killed, tmp_path / "whole"))
    everything = content(whole)
    whole.close()
    assert [s for s, _, _ in everything] == ["ok"] * 12
    size = (killed / "study.db-wal").stat().st_size
    lengths = set()
    cuts = [0, 1, 31, 32, 33, size - 1, *np.random.default_rng(0).integers(0, size, 12).tolist()]
    for cut in sorted(cuts):
        folder = copy(killed, tmp_path / f"cut{cut}")
        with (folder / "study.db-wal").open("r+b") as f:
            f.truncate(cut)
        study = open_study(folder)
        got = content(study)
        # The last one may be running: its result was cut off.
        assert got[:-1] == everything[:max(0, len(got) - 1)]
        if got:
            assert got[-1] == everything[len(got) - 1] or got[-1] == ("running", everything[len(got) - 1][1], None)
        lengths.add(len(got))
        fill(study, 1)  # it goes on
        study.close()
        shutil.rmtree(folder)
    assert len(lengths) > 5


def test_a_database_cut_at_any_byte_is_an_error_that_leaves_it_alone(killed: Path, tmp_path: Path) -> None:
    folder = copy(killed, tmp_path / "whole")
    open_study(folder).close()
    assert not (folder / "study.db-wal").exists(), "closing merges the log"
    data = (folder / "study.db").read_bytes()
    study = open_study(folder)
    everything = content(study)
    study.close()
    for cut in [0, 1, 15, 16, 99, 100, 4096, len(data) - 1, *np.random.default_rng(0).integers(0, len(data), 30)]:
        path = tmp_path / f"cut{cut}"
        path.mkdir(exist_ok=True)
        (path / "study.db").write_bytes(data[:cut])
        with pytest.raises(LacerError, match="is damaged") as e:
            open_study(path)
        assert str(path / "study.db") in str(e.value)
        assert (path / "study.db").read_bytes() == data[:cut], "nothing is overwritten"
    assert len(everything) == 12


@pytest.mark.parametrize("seed", range(8))
def test_bytes_that_were_changed(killed: Path, tmp_path: Path, seed: int) -> None:
    """Bad blocks: an error, or (where the bytes belong to no trial, or are text) a study that opens."""
    folder = copy(killed, tmp_path / "run")
    open_study(folder).close()
    data = bytearray((folder / "study.db").read_bytes())
    rng = np.random.default_rng(seed)
    at = int(rng.integers(0, len(data) - 64))
    data[at:at + 64] = rng.bytes(64)
    (folder / "study.db").write_bytes(data)
    why = ""
    try:
        study = open_study(folder)
        assert len(study) == 12
        study.close()
    except LacerError as e:
        why = str(e)
    assert not why or "study.db" in why


def test_a_locked_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may hold a lock for a while; if it keeps it, that is said, and nothing is lost."""
    monkeypatch.setattr(storage, "BUSY_SECONDS", 1)
    study = StoredStudy(sqlite_url(tmp_path / "study.db"), "s", SPACE, create="yes")
    fill(study, 2)
    other = sqlite3.connect(tmp_path / "study.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    start = time.monotonic()
    with pytest.raises(LacerError, match=r"cannot write the study in .*study.db: database is locked"):
        fill(study, 1)
    assert 0.5 < time.monotonic() - start < 10
    other.execute("ROLLBACK")
    assert len(study) == 2
    fill(study, 1)
    study.close()
    again = open_study(tmp_path)
    assert [t.status for t in again.trials] == ["ok"] * 3


def test_readers_do_not_disturb_the_writer(tmp_path: Path) -> None:
    """As ``optuna-dashboard`` reads while a search runs."""
    study = StoredStudy(sqlite_url(tmp_path / "study.db"), "s", SPACE, create="yes")
    reader = sqlite3.connect(f"file:{tmp_path}/study.db?mode=ro", uri=True, isolation_level=None)
    reader.execute("BEGIN")
    assert reader.execute("SELECT count(*) FROM trials").fetchone() == (0,)
    fill(study, 3)
    assert len(optuna.load_study(storage=sqlite_url(tmp_path / "study.db"), study_name="s").trials) == 3
    reader.execute("COMMIT")
    assert reader.execute("SELECT count(*) FROM trials").fetchone() == (3,)


def test_the_study_is_an_ordinary_one(tmp_path: Path) -> None:
    """What Optuna reads back is what Optuna itself would have stored."""
    study = StoredStudy(sqlite_url(tmp_path / "study.db"), "s", SPACE, Objective("speed", "m/s"), create="yes")
    fill(study, 2)
    study.reject(Proposal({"d0": 0, **{f"d{i}": 1 for i in range(1, 8)}}, "x", rejected="too large"))
    study.start(Proposal({f"d{i}": 2 for i in range(8)}, "x"))
    raw = optuna.load_study(storage=sqlite_url(tmp_path / "study.db"), study_name="s")
    reference = optuna.create_study(storage=f"sqlite:///{tmp_path}/other.db", direction="maximize")
    reference.add_trials(list(raw.trials))
    for ours, theirs in zip(raw.trials, reference.trials, strict=True):
        assert ours == theirs
    assert [t.state.name for t in raw.trials] == ["COMPLETE", "COMPLETE", "FAIL", "RUNNING"]
    assert raw.trials[0].intermediate_values == dict(EVALUATION.curve)
    assert raw.trials[0].params == study.trials[0].proposal.point
    raw.sampler = optuna.samplers.TPESampler(seed=0)
    assert set(raw.ask({f"d{i}": optuna.distributions.CategoricalDistribution((0, 1, 2, 3)) for i in range(8)}).params)


def test_urls(tmp_path: Path) -> None:
    url = "postgresql+psycopg://me:s3cret@host/db"
    assert hidden_password(url) == "postgresql+psycopg://me:***@host/db"
    assert without_password(url) == "postgresql+psycopg://me@host/db"
    with pytest.raises(LacerError, match="storage must be a database URL"):
        StoredStudy("study.db", "s", SPACE)
    with pytest.raises(LacerError, match="there is no study in"):
        open_study(tmp_path)
    with pytest.raises(LacerError, match=r"cannot open the study|driver of"):
        StoredStudy("postgresql+psycopg://nobody:s3cret@127.0.0.1:1/db", "s", SPACE)
    missing = tmp_path / "no folder"
    with pytest.raises(LacerError, match="is the folder there"):
        StoredStudy(sqlite_url(missing / "study.db"), "s", SPACE, create="yes")
