"""TensorBoard and W&B hold everything, under the same names, and never stop a search."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lacer.envs import LacerError
from lacer.search.outcome import Outcome
from lacer.search.tracking import Media, TensorBoard, Totals, decisions, key, scalars
from lacer.search.wandb_files import log_files, scan
from lacer.search.wandb_sync import sync
from lacer.search.wandb_tracker import WandB
from tests.search.offline_wandb import read
from tests.search.test_report import HOSTILE, make_outcome
from tests.search.wandb_server import WandBServer

CONFIG: dict[str, Any] = {"env": "lacer/KnownSources-v0", "env_kwargs": {}, "seed": 3, "protocol": {"steps": 10_000},
                          "designer": "auto"}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no netrc"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandBServer]:
    """A W&B server to which this process is logged in."""
    out = WandBServer()
    monkeypatch.setenv("WANDB_BASE_URL", out.url)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    wandb.teardown()  # else the settings of an earlier test hold
    yield out
    out.close()
    wandb.teardown()


def tracker(folder: Path, mode: str = "offline", said: list[str] | None = None, **options: Any) -> WandB:
    """A tracker of a made-up search in ``folder``, which is made to look like a run."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("{}")
    return WandB(folder, mode, **{
        "runs": "search", "project": "p", "group": "a comparison", "name": folder.name, "run_id": "theid",
        "config": CONFIG, "designer": "evolution", "metric": "score", "say": (said if said is not None else []).append,
        **options})


def log_all(to: Any, outcome: Outcome, folder: Path, media: Media = Media()) -> None:  # noqa: B008 (it is frozen)
    best = None
    for t in outcome.trials:
        if t.evaluation is not None:
            best = max(x for x in (best, t.objective) if x is not None) if t.objective is not None else best
            to.trial(t, Totals(best, 1000 * t.number, 1.0 * t.number))
    to.finish(outcome, folder, media)
    to.close(0, 60)


def agent_files(folder: Path) -> None:
    (folder / "best").mkdir(parents=True)
    for name in ("policy.safetensors", "agent.json", "encoder.json", "private.txt"):
        (folder / "best" / name).write_text(name)


def test_every_row_table_and_artifact_is_there(tmp_path: Path) -> None:
    outcome, folder = make_outcome(6, failed=1, rejected=1), tmp_path / "run"
    agent_files(folder)
    frame = folder / "best" / "frame.png"
    Image.new("RGB", (8, 8), (200, 30, 30)).save(frame)
    video = folder / "best" / "video.gif"
    Image.new("P", (8, 8)).save(video, save_all=True, append_images=[Image.new("P", (8, 8), 1)])
    log_all(tracker(folder), outcome, folder, Media(video, {"the camera": (frame,)}))
    got = read(folder)
    ended = [t for t in outcome.trials if t.evaluation is not None]
    assert got["exited"] == [True]
    assert got["ids"] == {"theid"}
    assert (got["groups"], got["kinds"]) == ({"a comparison"}, {"search"})
    assert {"evolution", "seed-3"} <= got["tags"]
    assert {"comparison": "a comparison", "designer": "evolution", "seed": 3}.items() <= got["config"].items()
    rows = {r["trial"]: r for r in got["rows"] if "trial" in r}
    assert len(rows) == len(ended) == 7
    for t in ended:
        assert t.evaluation is not None
        assert rows[t.number]["status"] == t.status
        for name, value in scalars(t.evaluation, "score").items():
            assert rows[t.number][name] == pytest.approx(value, nan_ok=True), name
        curve = [(r["env_steps"], r[f"train/return_{t.number:04d}"]) for r in got["rows"]
                 if f"train/return_{t.number:04d}" in r]
        assert curve == t.evaluation.curve
    points = sum(len(t.evaluation.curve) for t in ended if t.evaluation)
    final = sum(len(e.curve) for e in outcome.finals.values())
    assert len(got["rows"]) == points + final + len(ended) + 2, "the table and the pictures are a row each"
    assert [r["_step"] for r in got["rows"]] == list(range(len(got["rows"])))
    assert got["axes"]["*"] == "trial"
    assert got["axes"]["train/*"] == "env_steps"
    assert got["summary"]["winner"] == outcome.winner
    table = json.loads(next(folder.glob("wandb/*/files/media/table/*.json")).read_text())
    assert [r[0] for r in table["data"]] == [t.number for t in outcome.trials]
    at = {c: i for i, c in enumerate(table["columns"])}
    for t, r in zip(outcome.trials, table["data"], strict=True):
        assert r[at["score"]] == t.objective
        assert r[at["status"]] == t.status
        assert json.loads(r[at["encoder"]] or "null") == (t.spec.to_dict() if t.spec else None)
    artifacts = {name: (kind, used, files) for name, kind, used, files in got["artifacts"]
                 if not name.startswith("run-")}
    assert artifacts == {
        "KnownSources-v0-encoder": ("encoder", True, ["encoder.json"]),
        "KnownSources-v0-policy": ("policy", False, ["agent.json", "encoder.json", "policy.safetensors"])}
    media = next(r for r in got["rows"] if "media/video" in r or "media/video._type" in r)
    assert any(k.startswith("media/the_camera") for k in media)
    assert any(k.startswith("media/encoder") for k in media)


def test_a_run_per_candidate(tmp_path: Path) -> None:
    outcome, folder = make_outcome(4, failed=1, rejected=0), tmp_path / "run"
    log_all(tracker(folder, runs="candidate"), outcome, folder)
    assert len(log_files(folder)) == 6
    for t in outcome.trials:
        got = read(folder, f"theid-{t.number:04d}")
        assert got["exited"] == [True]
        assert (got["groups"], got["kinds"]) == ({"a comparison"}, {"candidate"})
        assert got["config"]["decisions"] == decisions(t)
        assert got["config"]["trial"] == t.number
        assert got["config"]["search"] == "theid"
        assert t.evaluation is not None
        assert [(r["env_steps"], r["train/return"]) for r in got["rows"] if "train/return" in r] == t.evaluation.curve
        assert len(got["rows"]) == len(t.evaluation.curve) + 1
        if t.objective is not None:
            assert got["summary"]["score"] == pytest.approx(t.objective)
    assert len([r for r in read(folder, "theid")["rows"] if "trial" in r]) == 5


def test_a_resumed_search_continues_its_run(tmp_path: Path, server: WandBServer) -> None:
    outcome, folder = make_outcome(5, failed=0, rejected=0), tmp_path / "run"
    first = tracker(folder)
    for t in outcome.trials[:2]:
        first.trial(t, Totals(None, 0))
    first.close(1, 60)
    time.sleep(1.1)  # W&B names its folders by the second
    log_all(tracker(folder), outcome, folder)  # which tells the first two once more
    assert len(log_files(folder)) == 2
    got = read(folder)
    assert got["ids"] == {"theid"}
    assert [r["trial"] for r in got["rows"] if "trial" in r] == [0, 1, 2, 3, 4]
    assert [r["_step"] for r in got["rows"]] == list(range(len(got["rows"])))
    assert "Uploaded 2 W&B files" in sync(folder)
    rows = server.rows["theid"]
    assert [rows[i].get("trial") for i in sorted(rows) if "trial" in rows[i]] == [0, 1, 2, 3, 4]
    assert len(rows) == len(got["rows"])
    run = server.runs["theid"]
    assert (run["groupName"], run["jobType"]) == ("a comparison", "search")
    names = {server.artifact_name(i) for i in range(len(server.artifacts))}
    assert "KnownSources-v0-encoder" in names
    assert len(server.used) == 1
    assert "were uploaded before" in sync(folder)


def test_online(tmp_path: Path, server: WandBServer) -> None:
    outcome, folder = make_outcome(3, failed=0, rejected=0), tmp_path / "run"
    agent_files(folder)
    said: list[str] = []
    log_all(tracker(folder, "online", said, runs="candidate"), outcome, folder)
    assert said == []
    assert set(server.runs) == {"theid", *(f"theid-{n:04d}" for n in range(3))}
    assert [r["trial"] for r in server.rows["theid"].values() if "trial" in r] == [0, 1, 2]
    assert {"KnownSources-v0-encoder", "KnownSources-v0-policy"} <= {
        server.artifact_name(i) for i in range(len(server.artifacts))}
    policy = next(i for i in range(len(server.artifacts)) if server.artifact_name(i).endswith("policy"))
    assert server.files[f"A{policy + 1}/policy.safetensors"] == b"policy.safetensors"
    assert len(server.used) == 1, "the run uses the encoder"
    with pytest.raises(LacerError, match="logged online"):
        sync(folder)


@pytest.mark.slow
def test_an_unreachable_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is logged offline then, and nobody waits for the server but the thread that writes."""
    wandb.teardown()
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    outcome, folder = make_outcome(2, failed=0, rejected=0), tmp_path / "run"
    said: list[str] = []
    start = time.monotonic()
    to = tracker(folder, "online", said)
    for t in outcome.trials:
        to.trial(t, Totals(None, 0))
    to.finish(outcome, folder, Media())
    assert time.monotonic() - start < 1
    to.close(0, 60)
    assert len(said) == 1
    assert "cannot be reached" in said[0]
    assert f"lacer sync {folder}" in said[0]
    got = read(folder)
    assert got["exited"] == [True]
    assert [r["trial"] for r in got["rows"] if "trial" in r] == [0, 1]
    with pytest.raises(LacerError, match=r"1 of 1 W&B files .* were not uploaded to http://127.0.0.1:9"):
        sync(folder, timeout=5)


def test_a_server_that_goes_away(tmp_path: Path, server: WandBServer) -> None:
    outcome, folder = make_outcome(2, failed=0, rejected=0), tmp_path / "run"
    to = tracker(folder, "online")
    to.trial(outcome.trials[0], Totals(None, 0))
    for _ in range(600):
        if "theid" in server.runs:
            break
        time.sleep(0.1)
    assert "theid" in server.runs
    server.close()
    start = time.monotonic()
    to.trial(outcome.trials[1], Totals(None, 0))
    to.close(0, 3)
    assert time.monotonic() - start < 4


FULL = """
import resource, sys, time
from pathlib import Path
sys.path[:0] = {path!r}
from tests.search.test_tracking import *
said = []
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
start = time.monotonic()
log_all(tracker(Path({folder!r}), "offline", said), make_outcome(30, failed=0, rejected=0), Path({folder!r}))
print(json.dumps([said, time.monotonic() - start]))
"""


@pytest.mark.slow
def test_no_room_for_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = subprocess.run([sys.executable, "-c", FULL.format(path=sys.path, folder=str(folder))], capture_output=True,
                          text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    said, seconds = json.loads(done.stdout.splitlines()[-1])
    assert len(said) == 1
    assert "W&B is off" in said[0]
    assert seconds < 60
    assert not any(scan(p).ended for p in log_files(folder))


@pytest.mark.slow
def test_long_searches_leak_nothing(tmp_path: Path) -> None:
    outcome, folder = make_outcome(24, failed=0, rejected=0), tmp_path / "run"
    to = tracker(folder, runs="candidate")

    def in_use() -> tuple[int, int, int]:
        while to._work.qsize() or to._busy:
            time.sleep(0.02)
        children = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "comm="], capture_output=True, text=True,
                                  check=False).stdout.split()
        return threading.active_count(), len(os.listdir("/proc/self/fd")), children.count("wandb-core")

    to.trial(outcome.trials[0], Totals(None, 0))
    to.trial(outcome.trials[1], Totals(None, 0))
    before, memory = in_use(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for t in outcome.trials[2:]:
        to.trial(t, Totals(None, 0))
    after = in_use()
    assert after[2] == before[2] == 1
    assert after[0] <= before[0] + 1
    assert after[1] <= before[1] + 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 30_000, "kB"
    to.close(0, 60)
    assert all(scan(p).ended for p in log_files(folder))
    assert len(log_files(folder)) == 25
    end = time.monotonic() + 30
    while any(t.name == "wandb" for t in threading.enumerate()):
        assert time.monotonic() < end, "the thread that writes has not ended"
        time.sleep(0.1)


def test_what_cannot_be_synced(tmp_path: Path) -> None:
    with pytest.raises(LacerError, match="is no run"):
        sync(tmp_path / "nothing")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({}))
    with pytest.raises(LacerError, match="W&B was off"):
        sync(folder)
    tracker(folder).close(0, 60)
    with pytest.raises(LacerError, match=r"no W&B account: run `wandb login` or set WANDB_API_KEY"):
        sync(folder)


def test_tensorboard_has_the_same_names(tmp_path: Path) -> None:
    outcome, folder = make_outcome(3, failed=1, rejected=1), tmp_path / "run"
    log_all(TensorBoard(folder / "events", "score"), outcome, folder)
    log_all(tracker(folder), outcome, folder)
    for t in outcome.trials:
        if t.evaluation is None:
            assert not (folder / "events" / f"trial-{t.number:04d}").exists()
            continue
        one = EventAccumulator(str(folder / "events" / f"trial-{t.number:04d}")).Reload()
        assert [(e.step, pytest.approx(e.value)) for e in one.Scalars("train/return")] == t.evaluation.curve \
            if t.evaluation.curve else True
        if t.objective is not None:
            assert set(scalars(t.evaluation, "score")) <= set(one.Tags()["scalars"])
            assert "_hparams_/session_start_info" in one.summary_metadata
    search = set(EventAccumulator(str(folder / "events" / "search")).Reload().Tags()["scalars"])
    rows = read(folder)["rows"]
    logged = {k for r in rows for k, v in r.items() if isinstance(v, float) and not k.startswith(("_", "train/"))}
    assert logged - {"trial"} <= search
    writer = TensorBoard(folder / "events", "score")
    writer.trial(outcome.trials[0], Totals(None, 0))  # once more
    writer.close()
    assert len(list((folder / "events" / "trial-0000").iterdir())) == 1


def test_names_are_plain(tmp_path: Path) -> None:
    assert key("probes_a b", "x/y") == "probes_a_b/x_y"
    outcome, folder = make_outcome(2, failed=1, rejected=1, text=HOSTILE), tmp_path / "run"
    odd = replace(outcome.trials[0], proposal=replace(outcome.trials[0].proposal, designer=HOSTILE))
    said: list[str] = []
    log_all(tracker(folder, said=said, runs="candidate", designer=HOSTILE, name=HOSTILE[:100]),
            replace(outcome, trials=(odd, *outcome.trials[1:])), folder)
    log_all(TensorBoard(folder / "events", "score"), outcome, folder)
    assert said == []
    assert read(folder, "theid")["exited"] == [True]
