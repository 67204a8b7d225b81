"""A search whose study is in a real PostgreSQL server, started here. Needs Debian's postgresql and psycopg."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from lacer.envs import LacerError
from lacer.search import StoredStudy
from lacer.search.runs import StudyReader, read_study
from lacer.search.storage import without_password
from tests.search.conftest import Lacer, Start
from tests.search.test_storage import SPACE, fill

pytestmark = pytest.mark.postgres
PASSWORD = "planted-pg-password-77"


def binaries() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    assert found or on_path, "install PostgreSQL, e.g. apt-get install postgresql"
    return found[-1].parent if found else Path(str(on_path)).parent


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL, password included, of an empty server on a free port; the server refuses to run as root."""
    folder = tmp_path_factory.mktemp("pg")
    user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    if user:
        for parent in [folder, *folder.parents]:
            if parent != Path("/") and parent.stat().st_uid == 0 and parent != Path("/tmp"):
                parent.chmod(0o755)
        shutil.chown(folder, "postgres")
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o644)
    data, bin = folder / "data", binaries()
    subprocess.run([*user, bin / "initdb", "-D", data, "-U", "me", "-A", "scram-sha-256", "--pwfile",
                    folder / "password"], check=True, capture_output=True, cwd=folder)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = subprocess.Popen([*user, bin / "postgres", "-D", data, "-p", str(port), "-k", folder, "-h", "127.0.0.1"],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    time.sleep(0.5)
    yield f"postgresql+psycopg://me:{PASSWORD}@127.0.0.1:{port}/postgres"
    subprocess.run([*user, bin / "pg_ctl", "-D", data, "-m", "immediate", "stop"], check=True, capture_output=True,
                   cwd=folder)
    server.wait(timeout=20)


def test_study(url: str) -> None:
    study = StoredStudy(url, "plain", SPACE, create="yes")
    fill(study, 3)
    study.set_attr("x", {"a": 1})
    again = StoredStudy(url, "plain", SPACE, create="no")
    assert again.trials == study.trials
    assert again.get_attr("x") == {"a": 1}
    raw = optuna.load_study(storage=url, study_name="plain")
    assert [t.value for t in raw.trials] == [t.objective for t in study.trials]
    with pytest.raises(LacerError, match="holds a study 'plain' already") as e:
        StoredStudy(url, "plain", SPACE, create="yes")
    assert PASSWORD not in str(e.value)
    with pytest.raises(LacerError, match="there is no study 'other'"):
        StoredStudy(url, "other", SPACE, create="no")
    with pytest.raises(LacerError, match="password authentication failed") as e:
        StoredStudy(url.replace(PASSWORD, "wrong"), "plain", SPACE)


def test_kill_9_and_resume(url: str, tiny: Path, start: Start, lacer: Lacer, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start("search", "--config", tiny, "--out", folder, "--storage", url, "--wandb", "off", "--candidates", 6)
    end = time.monotonic() + 120
    done = 0
    while done < 2 and time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        time.sleep(0.3)
        if "run" in optuna.get_all_study_names(url):
            done = sum(t.state.name == "COMPLETE" for t in optuna.load_study(storage=url, study_name="run").trials)
    process.kill()
    process.communicate()
    before = [t.value for t in optuna.load_study(storage=url, study_name="run").trials if t.state.name == "COMPLETE"]
    assert len(before) >= 2
    forgotten = lacer("search", "--resume", folder)
    assert forgotten.returncode == 2
    assert "password" in forgotten.stderr
    finished = lacer("search", "--resume", folder, "--storage", url)
    assert finished.returncode == 0, finished.stderr
    trials = optuna.load_study(storage=url, study_name="run").trials
    assert [t.state.name for t in trials] == ["COMPLETE"] * 6
    assert {t.value for t in trials} >= set(before)
    again = lacer("search", "--config", tiny, "--out", tmp_path / "other" / "run", "--storage", url)
    assert again.returncode == 2
    assert "holds a study 'run' already; give another --study-name" in again.stderr
    for path in folder.rglob("*"):
        if path.is_file():
            assert PASSWORD.encode() not in path.read_bytes(), path
    assert PASSWORD not in finished.stdout + finished.stderr + again.stderr


def test_read_watched_and_compared(url: str, tmp_path: Path, lacer: Lacer) -> None:
    """What only reads, from another place, and a comparison whose searches share a database."""
    study = StoredStudy(url, "elsewhere", SPACE, create="yes")
    study.begin(0.0)
    fill(study, 4)
    study.end("")
    with StudyReader(url, "elsewhere") as reader:
        run = read_study(reader, "elsewhere", {}, {})
        assert tuple(t.trial for t in run.trials) == study.trials
        assert set(reader.states().values()) == {"COMPLETE"}
    assert (run.finished, run.objective.direction) == (True, "maximize")
    study.close()
    watched = lacer("watch", url, "--study-name", "elsewhere")
    assert watched.returncode == 0, watched.stderr
    assert "#3 score" in watched.stdout
    assert watched.stdout.splitlines()[-1].startswith("Finished after")
    small = ["compare", "quick", "--seeds", "0,1", "--designers", "random", "--base.candidates", 2,
             "--base.protocol.steps", 256, "--base.final-steps", 256]
    refused = lacer(*small, "--out", tmp_path / "c", "--base.storage", url)
    assert "put it into PGPASSWORD" in refused.stderr
    assert PASSWORD not in refused.stderr
    hidden = without_password(url)
    done = lacer(*small, "--out", tmp_path / "c", "--base.storage", hidden, PGPASSWORD=PASSWORD)
    assert done.returncode == 0, done.stderr
    assert {"c/random-0", "c/random-1"} <= set(optuna.get_all_study_names(url))
    exported = lacer("export", tmp_path / "c", PGPASSWORD=PASSWORD)
    assert len(exported.stdout.splitlines()) == 5
    assert lacer("watch", tmp_path / "c", PGPASSWORD=PASSWORD).stdout.count("winner #") == 2
