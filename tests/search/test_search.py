"""Searches from end to end, as a user runs them: processes, files, signals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lacer.agents import Evaluation, Protocol, RunRequest, load
from lacer.agents.stats import mean_interval
from lacer.envs import LacerError, make
from lacer.search import search
from lacer.search.config import SearchConfig, resumed
from lacer.search.executors import InProcess, Job
from lacer.search.files import write_whole
from lacer.search.loop import WITHOUT_LLM, plan, provenance
from lacer.search.runs import read_run
from tests.search.conftest import TINY, Lacer, Start
from tests.search.llm_server import Served
from tests.search.offline_wandb import read

KEY = "sk-planted-0123456789abcdef"


@pytest.fixture(scope="module")
def finished(tiny: Path, lacer: Lacer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A finished run with a planted key in the environment: its folder, standard output, standard error."""
    folder = tmp_path_factory.mktemp("runs") / "a run"
    done = lacer("search", "--config", tiny, "--out", folder, OPENAI_API_KEY=KEY, MY_SECRET_TOKEN=KEY)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, done.stderr


def trials(folder: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(storage=f"sqlite:///{folder}/study.db", study_name=None).trials


def test_the_folder_holds_everything(finished: tuple[Path, str, str]) -> None:
    folder, _, _ = finished
    for name in ("config.yaml", "versions.json", "study.db", "events", "wandb", "report.html", "best/encoder.json",
                 "best/policy.safetensors", "best/agent.json"):
        assert (folder / name).exists(), name
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["candidates"] == 5
    assert config["protocol"]["ppo"]["n_steps"] == 64
    about = json.loads((folder / "versions.json").read_text())
    assert about["packages"]["torch"]
    assert about["final_eval_seed"] != about["eval_seed"]
    assert "<html" in (folder / "report.html").read_text()[:500]


def test_what_is_shown(finished: tuple[Path, str, str]) -> None:
    folder, out, err = finished
    assert re.search(r"5/5 #\d score -?\d.*about .* left.*steps/s", err)
    assert "Folder:" in err
    for column in ("score", "return", "position", "words", "noise", "fusion", "param."):
        assert column in out
    assert len(re.findall(r"^│\d+ *│", out, re.MULTILINE)) == 5
    assert str(folder / "report.html") in out
    assert f"lacer evaluate '{folder}'/best --episodes 20" in out
    assert "lacer train --encoder" in out


def test_the_first_candidate_is_the_experts_and_no_encoder_comes_twice(finished: tuple[Path, str, str]) -> None:
    all_trials = trials(finished[0])
    assert [t.user_attrs["designer"] for t in all_trials] == ["expert"] + ["evolution"] * 4
    assert all_trials[0].user_attrs["encoder"]["sources"]["position"]["block"] == "mlp"
    codes = [t.user_attrs["ncode"] for t in all_trials]
    assert len(set(codes)) == 5
    for t in all_trials:
        e = t.user_attrs["evaluation"]
        assert t.value == e["objective"]
        assert e["episode_seeds"] == [1_000_000 + i for i in range(4)]
        used = set(t.user_attrs["encoder"]["sources"])
        assert set(e["probes"]) == {*used, "fused"}
        assert all({"effective_rank", "linear_probe"} <= set(p) for p in e["probes"].values())


def test_the_reported_seeds_did_not_choose(finished: tuple[Path, str, str]) -> None:
    agent = load(finished[0] / "best")
    assert agent.evaluation.episode_seeds == [1_500_000 + i for i in range(4)]
    assert agent.request.seed != TINY.get("seed", 0)


def test_tensorboard_reads_back(finished: tuple[Path, str, str]) -> None:
    events = finished[0] / "events"
    all_trials = trials(finished[0])
    overview = EventAccumulator(str(events / "search")).Reload()
    assert sorted((e.step, round(e.value, 5)) for e in overview.Scalars("score")) == [
        (t.number, pytest.approx(t.value, abs=1e-5)) for t in all_trials]
    assert "probes_fused/effective_rank" in overview.Tags()["scalars"]
    for t in all_trials:
        one = EventAccumulator(str(events / f"trial-{t.number:04d}")).Reload()
        curve = t.user_attrs["evaluation"]["curve"]
        assert [(e.step, pytest.approx(e.value, rel=1e-5)) for e in one.Scalars("train/return")] == [
            tuple(p) for p in curve]


def test_wandb_reads_back(finished: tuple[Path, str, str]) -> None:
    got, all_trials = read(finished[0]), trials(finished[0])
    assert got["exited"] == [True]
    rows = {r["trial"]: r for r in got["rows"] if "trial" in r}
    assert {n: r["score"] for n, r in rows.items()} == {t.number: t.value for t in all_trials}
    assert all(r["probes_fused/linear_probe"] is not None for r in rows.values())
    assert got["config"]["designer"] == "evolution"
    assert got["summary"]["winner"] == max(all_trials, key=lambda t: (t.value, -t.number)).number
    table = json.loads(next(finished[0].glob("wandb/*/files/media/table/*.json")).read_text())
    assert [row[0] for row in table["data"]] == [0, 1, 2, 3, 4]


def test_no_key_anywhere(finished: tuple[Path, str, str]) -> None:
    for path in finished[0].rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path
    assert KEY not in finished[1] + finished[2]


def test_files_cut_at_any_byte(finished: tuple[Path, str, str], tmp_path: Path) -> None:
    """Each file of ours, cut anywhere, is an error that names it; nothing is written over it."""
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder, ignore=shutil.ignore_patterns("wandb", "events"))
    (folder / "events").mkdir()
    files = ["config.yaml", "versions.json", "best/agent.json", "best/encoder.json", "best/policy.safetensors"]
    rng = np.random.default_rng(0)
    for name in files:
        path = folder / name
        data = path.read_bytes()
        for cut in [0, 1, len(data) - 2, *rng.integers(0, len(data) - 1, 12).tolist()]:
            path.write_bytes(data[:cut])
            with pytest.raises(LacerError, match=re.escape(str(path))):
                load(folder / "best") if name.startswith("best") else search(resume=folder, quiet=True)
            assert path.read_bytes() == data[:cut]
        path.write_bytes(data)
    assert load(folder / "best").evaluation.ok
    (folder / "study.db").unlink()
    with pytest.raises(LacerError, match=r"study\.db is missing"):
        search(resume=folder, quiet=True)


def test_optuna_plots_it(finished: tuple[Path, str, str]) -> None:
    study = optuna.load_study(storage=f"sqlite:///{finished[0]}/study.db", study_name=None)
    assert study.study_name == "a run"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        history = optuna.visualization.matplotlib.plot_optimization_history(study)
        assert len(history.collections[0].get_offsets()) == 5
        assert len(optuna.visualization.matplotlib.plot_intermediate_values(study).lines) == 5
        assert optuna.visualization.matplotlib.plot_slice(study, params=["fusion.block"]).get_xlabel() == "fusion.block"


def test_the_winner_plays(finished: tuple[Path, str, str]) -> None:
    agent = load(finished[0] / "best")
    env = make(agent.request.env, **agent.request.env_kwargs)
    obs, _ = env.reset(seed=agent.evaluation.episode_seeds[0])
    total, done = 0.0, False
    while not done:
        obs, reward, terminated, truncated, _ = env.step(agent.predict(obs))
        total, done = total + float(reward), terminated or truncated
    assert total == pytest.approx(agent.evaluation.returns[0], abs=1e-4)


def test_evaluate(finished: tuple[Path, str, str], lacer: Lacer) -> None:
    folder, _, _ = finished
    done = lacer("evaluate", folder / "best", "--episodes", 4, "--seed", 1_500_000, "--json")
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)["metrics"]
    agent = load(folder / "best")
    assert got["score"]["mean"] == pytest.approx(agent.evaluation.objective, abs=1e-6)
    assert got["score"]["low"] <= got["score"]["mean"] <= got["score"]["high"]
    text = lacer("evaluate", folder / "best", "--episodes", 4, "--seed", 1_500_000).stdout
    assert "mean, interquartile mean, 95 % bootstrap interval" in text
    shown = re.search(r"score +(\S+) +(\S+) +\[(\S+), (\S+)\]", text)
    assert shown is not None
    want = mean_interval(agent.evaluation.metrics["score"])
    assert [float(x) for x in shown.groups()] == pytest.approx(want, abs=1e-3)


@pytest.mark.slow
def test_train(finished: tuple[Path, str, str], lacer: Lacer, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "agent"
    args = ("train", "--encoder", finished[0] / "best" / "encoder.json", "--config", tiny, "--steps", 512,
            "--episodes", 4, "--out", out)
    done = lacer(*args)
    assert done.returncode == 0, done.stderr
    assert load(out).spec == load(finished[0] / "best").spec
    again = lacer(*args)
    assert again.returncode == 2
    assert "exists already" in again.stderr


@pytest.mark.slow
def test_python_api_repeats_the_result(finished: tuple[Path, str, str], tmp_path: Path) -> None:
    """Same configuration, same seed, another driver process: the same trials."""
    result = search(out=tmp_path / "again", quiet=True, wandb="off", **{**TINY, "workers": 1})
    first = {t.user_attrs["ncode"]: t.value for t in trials(finished[0])}
    again = {t.ncode: t.objective for t in result.outcome.trials}
    shared = set(first) & set(again)
    assert len(shared) >= 2, "the expert's and the first random encoder do not depend on the order of results"
    assert all(first[c] == again[c] for c in shared)
    assert result.best.evaluation.ok
    assert not (tmp_path / "again" / "wandb").exists()


def wait_for(folder: Path, finished_trials: int, process: subprocess.Popen[str]) -> None:
    """Waits until that many trials are finished in the study."""
    end = time.monotonic() + 90
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        if (folder / "study.db").exists():
            try:
                with sqlite3.connect(f"file:{folder}/study.db?mode=ro", uri=True) as db:
                    count = db.execute("select count(*) from trials where state = 'COMPLETE'").fetchone()[0]
                if count >= finished_trials:
                    return
            except sqlite3.OperationalError:
                pass  # the tables are being made
        time.sleep(0.05)
    raise AssertionError("the search did not get that far")


def children(pid: int) -> list[int]:
    out = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout.split("\n")[1:]
    direct = [int(p) for p, parent in (line.split() for line in out if line) if int(parent) == pid]
    return direct + [c for d in direct for c in children(d)]


def gone(pids: list[int], seconds: float = 10) -> bool:
    def running(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(map(running, pids)):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow  # make test-faults kills searches 200 times
def test_kill_9_and_resume(tiny: Path, start: Start, lacer: Lacer, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start("search", "--config", tiny, "--out", folder, "--candidates", 6, "--wandb", "off")
    wait_for(folder, 2, process)
    family = children(process.pid)
    assert len(family) >= 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert gone(family), "workers end with their driver"
    before = {t.number: (t.value, t.user_attrs["ncode"]) for t in trials(folder) if t.state.name == "COMPLETE"}
    assert len(before) >= 2
    done = lacer("search", "--resume", folder)
    assert done.returncode == 0, done.stderr
    after = trials(folder)
    assert {n: (after[n].value, after[n].user_attrs["ncode"]) for n in before} == before
    assert [t.state.name for t in after] == ["COMPLETE"] * 6
    assert len({t.user_attrs["ncode"] for t in after}) == 6
    assert (folder / "best" / "policy.safetensors").exists()
    # A finished search is extended by a larger budget, in a folder of another name too, and refuses changes that would
    # spoil the comparison.
    folder = folder.rename(tmp_path / "renamed")
    done = lacer("search", "--resume", folder, "--candidates", 7)
    assert done.returncode == 0, done.stderr
    assert len(trials(folder)) == 7
    assert [t.value for t in trials(folder)][:6] == [t.value for t in after]
    refused = lacer("search", "--resume", folder, "--seed", 5)
    assert refused.returncode == 2
    assert "seed cannot change" in refused.stderr


@pytest.mark.parametrize("sign", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c(sign: signal.Signals, tiny: Path, start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start("search", "--config", tiny, "--out", folder, "--protocol.steps", 1_000_000)
    end = time.monotonic() + 60
    while len(children(process.pid)) < 4 and time.monotonic() < end:  # two workers, each with a run (and W&B's service)
        time.sleep(0.1)
    family = children(process.pid)
    begin = time.monotonic()
    process.send_signal(sign)
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - begin < 3
    assert process.returncode == 130
    assert f"lacer search --resume {folder}" in err
    assert "Traceback" not in err
    assert gone(family)


@pytest.mark.slow
def test_two_drivers_on_one_run(tiny: Path, start: Start, lacer: Lacer, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start("search", "--config", tiny, "--out", folder, "--protocol.steps", 1_000_000, "--wandb", "off")
    try:
        end = time.monotonic() + 60
        while not (folder / "study.db").exists() and time.monotonic() < end:
            time.sleep(0.1)
        second = lacer("search", "--resume", folder)
        assert second.returncode == 2
        assert "another process is working on" in second.stderr
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)


def test_a_failing_candidate_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A time-out that every run hits: the search ends, says so, and keeps the reasons, but no key."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    result = search(out=tmp_path / "run", quiet=True, wandb="off", **{
        **TINY, "candidates": 3, "timeout": 1.0, "protocol": {**TINY["protocol"], "steps": 1_000_000}})
    assert [t.status for t in result.outcome.trials] == ["failed"] * 3
    assert {t.reason for t in result.outcome.trials} == {"time-out"}
    assert result.outcome.winner is None
    assert result.report.exists()
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_an_llm_over_http(tiny: Path, lacer: Lacer, serve: Callable[..., Served], tmp_path: Path) -> None:
    """A search with a language model that is sometimes right, sometimes wrong, and in the end only sends garbage."""
    def answer(width: int) -> str:
        encoder = {"sources": {"position": {"block": "linear", "width": width}},
                   "fusion": {"block": "gated_sum", "width": 32}}
        return json.dumps({"encoders": [{"rationale": "noise is noise", "based_on": [0], "expected": 0.5,
                                         "encoder": encoder}]})

    server = serve({"text": answer(16)}, {"text": answer(16)}, {"text": answer(7)}, {"text": answer(32)},
                   {"status": 500}, {"text": "I would rather talk about the weather."})
    folder = tmp_path / "run"
    done = lacer("search", "--config", tiny, "--designer", "lacer", "--llm", "openai:some-model", "--llm-base-url",
                 server.url, "--candidates", 4, "--workers", 1, "--out", folder, OPENAI_API_KEY=KEY)
    assert done.returncode == 0, done.stderr
    got = [(t.user_attrs["designer"], t.state.name) for t in trials(folder)]
    assert [g for g in got if g[1] == "COMPLETE"] == [
        ("expert", "COMPLETE"), ("lacer", "COMPLETE"), ("lacer", "COMPLETE"), ("evolution", "COMPLETE")]
    reasons = " ".join(t.user_attrs["rejected"] for t in trials(folder) if t.state.name == "FAIL")
    for reason in ("the same as #1", "position.linear.width = 7 is not in this search space", "no JSON object"):
        assert reason in reasons
    assert "rejected (lacer)" in done.stderr
    for path in folder.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path


@pytest.mark.slow
def test_the_expert_may_stay_out_of_the_search(tmp_path: Path) -> None:
    options = {**TINY, "candidates": 3, "executor": "inprocess", "wandb": "off", "expert_first": False}
    result = search(**options, out=tmp_path / "run", quiet=True)
    assert [t.proposal.designer for t in result.outcome.trials] == ["evolution"] * 3
    assert result.outcome.finals["expert"].ok, "it is trained with the winner, for comparison"
    assert result.outcome.finals["expert"].returns != result.outcome.finals["winner"].returns
    assert "designed by hand" in result.report.read_text(), "and drawn beside it"


@pytest.mark.slow
def test_a_video_is_recorded_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    protocol = {"steps": 64, "eval_episodes": 2, "ppo": {"n_envs": 2, "n_steps": 16, "batch_size": 32}}
    search("lacer/MixedTraffic-v0", env_kwargs={"scene": "sources", "horizon": 30.0, "warm_up": 10.0}, space="quick",
           protocol=protocol, designer="random", candidates=1, final_steps=64, final_episodes=2, wandb="off",
           quiet=True, executor="inprocess", text_model="hash", out=folder)
    [video] = (folder / "best").glob("video.*")
    before = video.stat().st_mtime_ns
    frames = json.loads((folder / "best" / "frames.json").read_text())
    assert {p.name for p in (folder / "best" / "frames").iterdir()} == set(frames["camera"])
    search(resume=folder, quiet=True)
    assert video.stat().st_mtime_ns == before
    (folder / "best" / "frames.json").unlink()
    search(resume=folder, quiet=True)
    assert video.stat().st_mtime_ns > before


def test_the_final_training_is_of_the_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed search finds a better encoder and is interrupted before that is trained: nothing of the earlier winner
    is taken for its result."""
    interrupt, scores = False, iter(range(1, 100))
    evaluate = InProcess._evaluate

    def rising(self: InProcess, job: Job, report: Any) -> Evaluation:
        assert isinstance(job, RunRequest)
        if interrupt and job.save_to is not None:
            raise KeyboardInterrupt
        e = evaluate(self, job, report)
        final = job.protocol.eval_seed != TINY["protocol"].get("eval_seed", Protocol().eval_seed)
        return e if final else e.model_copy(update={"objective": float(next(scores))})

    monkeypatch.setattr(InProcess, "_evaluate", rising)
    folder = tmp_path / "run"
    options = {**TINY, "designer": "random", "executor": "inprocess", "wandb": "off"}
    first = search(**{**options, "candidates": 1}, out=folder, quiet=True)
    assert first.outcome.winner == 0
    assert read_run(folder).attrs["expert"], "the expert's encoder won: its result is stored under that name too"
    interrupt = True
    with pytest.raises(KeyboardInterrupt):
        search(resume=folder, candidates=2, quiet=True)
    stored = read_run(folder)
    assert stored.winner is not None
    assert stored.winner.trial.number == 1
    assert "winner" not in stored.finals
    assert not (folder / "best").exists()
    interrupt = False
    last = search(resume=folder, quiet=True).outcome
    assert last.winner == 1
    assert last.finals["winner"].returns != first.outcome.finals["winner"].returns
    assert load(folder / "best").spec == last.trials[1].spec
    assert last.finals["expert"].returns == first.outcome.finals["expert"].returns


def test_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance(SearchConfig(env="lacer/KnownSources-v0"))["git"] is None


def test_a_resumed_search_keeps_its_designer(tmp_path: Path) -> None:
    """`auto` depends on whether there is a model, and one may be given later."""
    search(**{**TINY, "designer": "auto", "candidates": 1, "executor": "inprocess", "wandb": "off"},
           out=tmp_path / "run", quiet=True)
    assert plan(resumed(SearchConfig, tmp_path / "run", {"llm": "openai:x"})).designer == WITHOUT_LLM


def test_files_that_several_processes_write(tmp_path: Path) -> None:
    def write(i: int) -> None:
        for _ in range(50):
            write_whole(tmp_path / "file", str(i) * 1000)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert len(set((tmp_path / "file").read_text())) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
