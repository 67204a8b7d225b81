"""What can go wrong around a search: hundreds of kills, full and read-only disks, a clock that goes back.

Run with ``make test-faults``; the number of kills is LACER_KILLS (200). Needs Linux; mounting needs root.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from lacer.search.cli import main
from tests.search.conftest import Lacer, Start
from tests.search.test_search import children, gone

pytestmark = pytest.mark.faults

KILLS = int(os.environ.get("LACER_KILLS", "200"))
FAST: dict[str, Any] = {
    "env": "lacer/KnownSources-v0", "env_kwargs": {"sources": ["position", "words", "noise"]},
    "designer": "evolution", "candidates": 16, "text_model": "hash", "workers": 2, "deterministic": True,
    "wandb": "off", "final_steps": 128, "final_episodes": 2,
    "protocol": {"steps": 128, "eval_episodes": 2, "ppo": {"n_envs": 2, "n_steps": 32, "batch_size": 32,
                                                           "n_epochs": 1, "gamma": 0.5}},
}


@pytest.fixture
def fast(tmp_path: Path) -> Path:
    path = tmp_path / "fast.yaml"
    path.write_text(yaml.safe_dump(FAST))
    return path


def result(folder: Path) -> dict[str, Any]:
    """Everything that must not depend on what happened on the way."""
    study = optuna.load_study(storage=f"sqlite:///{folder}/study.db", study_name=None)
    finals = {k: v["objective"] for k, v in study.user_attrs.items() if isinstance(v, dict) and "objective" in v}
    return {"trials": [(t.number, t.state.name, t.user_attrs.get("ncode"), t.value,
                        t.user_attrs.get("evaluation", {}).get("returns")) for t in study.trials], "finals": finals}


def finished(folder: Path) -> dict[int, tuple[str, float]]:
    if not (folder / "study.db").exists():
        return {}
    study = optuna.load_study(storage=f"sqlite:///{folder}/study.db", study_name=None)
    return {t.number: (t.user_attrs["ncode"], t.value) for t in study.trials if t.state.name == "COMPLETE"}


class Forked:
    """``lacer ARGS`` in a fork of this process, which has imported everything: a session starts at once."""

    def __init__(self, *args: object) -> None:
        self.process = multiprocessing.get_context("fork").Process(target=self._main, args=(list(map(str, args)),))
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    @staticmethod
    def _main(args: list[str]) -> None:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        main(args)

    def ended(self, seconds: float) -> bool:
        """Whether it ended by itself in that time."""
        self.process.join(seconds)
        assert self.process.exitcode in (None, 0)
        return self.process.exitcode == 0


class Started:
    """``lacer ARGS`` as a user starts it, with worker processes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.pid = process, process.pid

    def ended(self, seconds: float) -> bool:
        """Whether it ended by itself in that time."""
        try:
            _, err = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        assert self.process.returncode == 0, err
        return True


@pytest.mark.parametrize("executor", ["process", "inprocess"])
def test_kill_9_at_random_moments(executor: str, fast: Path, start: Start, tmp_path: Path) -> None:
    """Every finished evaluation is there exactly once, the study opens, the result is that of a search in peace.

    A tenth of the kills hit drivers with worker processes, the others drivers that do all by themselves.
    """
    def session(*args: object) -> Forked | Started:
        if executor == "process":
            return Started(start("search", *args, "--executor", executor))
        return Forked("search", *args, "--executor", executor)

    rng, kills, rounds, during = random.Random(0), 0, 0, []
    wanted = max(1, KILLS // 10) if executor == "process" else KILLS - KILLS // 10
    while kills < wanted:
        rounds += 1
        quiet = tmp_path / f"quiet{rounds}"
        begin = time.monotonic()
        assert session("--config", fast, "--seed", rounds, "--out", quiet).ended(600)
        whole = time.monotonic() - begin
        folder = tmp_path / f"run{rounds}"
        kept: dict[int, tuple[str, float]] = {}
        while True:
            args = ["--resume", folder] if folder.exists() else [
                "--config", fast, "--seed", rounds, "--out", folder]
            process = session(*args)
            # From before the first import to the end; short times more often, so that a search is hit many times.
            moment = whole * (0.9 if executor == "process" else 0.35) * rng.random() ** 2
            if process.ended(moment if kills < wanted else 600):
                break
            family = children(process.pid)
            os.kill(process.pid, signal.SIGKILL)
            assert gone([process.pid, *family], 30), "nothing is left of it"
            kills += 1
            now = finished(folder)
            assert {n: now.get(n) for n in kept} == kept, "what was finished is still there, and the same"
            during.append(len(now))
            kept = now
        assert result(folder) == result(quiet)
        assert (folder / "best" / "policy.safetensors").read_bytes() == (
            quiet / "best" / "policy.safetensors").read_bytes()
    print(f"{executor}: {kills} kills in {rounds} searches; candidates finished at the kill: {sorted(during)}")
    if wanted >= 20:
        assert len(set(during)) > 5, "the moments were spread over the whole search"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder]
    if os.getuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("cannot mount")
    yield folder
    subprocess.run(["umount", "-l", folder], check=False)


def wait_for(folder: Path, n: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while len(finished(folder)) < n and time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


def test_disk_full(fast: Path, start: Start, lacer: Lacer, small_disk: Path) -> None:
    folder = small_disk / "run"
    process = start("search", "--config", fast, "--out", folder, "--candidates", 60)
    wait_for(folder, 3, process)
    filler = small_disk / "filler"
    subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=4096"], capture_output=True, check=False)
    assert shutil.disk_usage(small_disk).free == 0
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "Traceback" not in err
    assert "full" in err or "No space" in err
    assert "lacer search --resume" in err
    # Starting on the full disk says so, too, and harms nothing.
    full = lacer("search", "--resume", folder)
    assert full.returncode == 2
    assert "No space left" in full.stderr or "full" in full.stderr
    assert "Traceback" not in full.stderr
    filler.unlink()
    before = finished(folder)
    assert len(before) >= 3
    done = lacer("search", "--resume", folder, "--candidates", len(before) + 3)
    assert done.returncode == 0, done.stderr
    after = finished(folder)
    assert {n: after[n] for n in before} == before
    assert len(after) == len(before) + 3


def test_read_only_folder(fast: Path, lacer: Lacer, small_disk: Path) -> None:
    folder = small_disk / "run"
    assert lacer("search", "--config", fast, "--out", folder, "--candidates", 2).returncode == 0
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for args in (("--resume", folder), ("--config", fast, "--out", small_disk / "other")):
        done = lacer("search", *args)
        assert done.returncode == 2
        assert "Read-only file system" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_clock_that_goes_back(fast: Path, start: Start, lacer: Lacer, tmp_path: Path) -> None:
    """A search that begins tomorrow goes on today: Debian's faketime."""
    library = next(iter(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)
    assert library is not None, "install it: apt-get install faketime"
    folder, quiet = tmp_path / "run", tmp_path / "quiet"
    assert lacer("search", "--config", fast, "--out", quiet).returncode == 0
    process = start("search", "--config", fast, "--out", folder, LD_PRELOAD=str(library), FAKETIME="+1d",
                    DONT_FAKE_MONOTONIC="1")
    wait_for(folder, 4, process)
    process.kill()
    process.communicate()
    done = lacer("search", "--resume", folder)
    assert done.returncode == 0, done.stderr
    assert result(folder) == result(quiet)
    assert " -" not in done.stdout.split("took ")[1][:20]


def test_kill_9_of_a_simulation(start: Start, tmp_path: Path) -> None:
    """SUMO dies: the candidate fails with a reason, the search goes on."""
    path = tmp_path / "sumo.yaml"
    path.write_text(yaml.safe_dump({
        **FAST, "env": "lacer/MixedTraffic-v0", "env_kwargs": {"scene": "small"}, "candidates": 3, "workers": 1,
        "protocol": {**FAST["protocol"], "steps": 2048}}))
    folder = tmp_path / "run"
    process = start("search", "--config", path, "--out", folder)
    simulation = 0
    end = time.monotonic() + 120
    while not simulation and time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        for worker in children(process.pid):
            for run in children(worker):
                simulation = next(iter(children(run)), simulation)
        time.sleep(0.1)
    time.sleep(1)
    os.kill(simulation, signal.SIGKILL)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    study = optuna.load_study(storage=f"sqlite:///{folder}/study.db", study_name=None)
    assert [t.state.name for t in study.trials].count("FAIL") == 1
    assert "an environment's process died" in study.trials[0].user_attrs["evaluation"]["reason"]
    assert study.trials[0].user_attrs["evaluation"]["cost"]["env_steps"] >= 0
    assert [t.state.name for t in study.trials[1:]] == ["COMPLETE"] * 2
