"""Stored runs: reading beside a writer, exporting, watching, planning."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from lacer.agents import Cost, Evaluation
from lacer.envs import LacerError
from lacer.search import Decision, Proposal, SearchSpace, StoredStudy, search
from lacer.search.cli import main
from lacer.search.config import validate
from lacer.search.export import export
from lacer.search.files import write_config
from lacer.search.loop import is_driven, only_driver, plan
from lacer.search.outcome import WINNER
from lacer.search.presets import presets, read_yaml
from lacer.search.runs import StudyReader, read_run
from lacer.search.storage import sqlite_url
from lacer.search.watch import IDLE, watch
from tests import helper_objectives
from tests.search.conftest import TINY, Lacer

SPACE = SearchSpace([Decision("a", (0, 1, 2, 3)), Decision("b", (True, False)), Decision("c", (0.5, "x"))])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of 6 candidates with a function."""
    path = tmp_path / "a run"
    search(space=SPACE, objective=helper_objectives.smooth, designer="random", candidates=6, quiet=True, out=path)
    return path


def open_study(folder: Path) -> StoredStudy:
    return StoredStudy(sqlite_url(folder / "study.db"), "a run", SPACE, create="no")


def test_a_run_is_read_as_it_was_written(folder: Path) -> None:
    study = open_study(folder)
    study.reject(Proposal(None, "llm", rejected="no JSON", meta={"requests": 2, "tokens_in": 10, "cost": 0.5}))
    study.reject(Proposal(study[0].proposal.point, "llm", rejected="the same encoder as #0"))
    beside = read_run(folder)
    expected = study.trials
    study.close()
    files = sorted(p.name for p in folder.iterdir())
    alone = read_run(folder)
    assert sorted(p.name for p in folder.iterdir()) == files, "reading leaves no log behind"
    for run in (beside, alone):
        assert tuple(t.trial for t in run.trials) == expected
        assert run.repeated() == {7}
        assert run.usage == {"requests": 2.0, "tokens_in": 10.0, "cost": 0.5}
        assert (run.plain, run.finished, run.objective.metric) == (True, True, "score")
        assert all(t.ended is not None and t.ended >= t.started for t in run.trials)
        assert all(0 <= run.clock(t.started) <= run.seconds + 0.5 for t in run.trials[:6])
    best = max(expected, key=lambda t: (-np.inf if t.objective is None else t.objective, -t.number))
    assert alone.winner is not None
    assert alone.winner.trial == best


def test_reader_of_a_database_with_several_studies(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "many.db")
    for name in ("one", "two"):
        StoredStudy(url, name, SPACE).close()
    with pytest.raises(LacerError, match=r"holds 2 studies: name one with --study-name: one, two"):
        StudyReader(url, None)
    with pytest.raises(LacerError, match=r"no study 'three' in .*there are: one, two"):
        StudyReader(url, "three")
    with StudyReader(url, "two") as reader:
        assert reader.states() == {}
    with pytest.raises(LacerError, match="there is no study in"):
        StudyReader(sqlite_url(tmp_path / "none.db"), None)


# -- watching ---------------------------------------------------------------------------------------------------------


def test_watch_follows_a_search_to_its_end(folder: Path) -> None:
    study, said, looks = open_study(folder), list[str](), list[int]()
    study.begin(3.0)
    with only_driver(folder):
        assert is_driven(folder)

        def work(_: float) -> None:
            """Between two looks: a trial begins, ends, one is rejected, the search ends."""
            looks.append(len(said))
            if len(looks) == 1:
                t = study.start(Proposal({"a": 3, "b": True, "c": "x"}, "evolution"))
                study.finish(t.number, Evaluation(objective=9.0, cost=Cost(env_steps=5)))
            elif len(looks) == 2:
                study.reject(Proposal(None, "llm", rejected="no JSON"))
                study.start(Proposal({"a": 3, "b": False, "c": "x"}, "evolution"))
            else:
                study.finish(8, Evaluation.failure("boom"))
                study.set_attr(WINNER, Evaluation(objective=8.5).model_dump(mode="json"))
                study.set_attr("seconds", 75.0)
                study.end("the budget is spent")

        assert watch(str(folder), said.append, wait=work)
    study.close()
    assert looks == [6, 7, 8], "what was there at first, then what came"
    assert said[6].startswith('  7/6 #6 score 9.000 (evolution)  {"a": 3')
    assert "[best 9.000 (#6)]" in said[6]
    assert said[7].strip() == "#7 rejected (llm): no JSON"
    assert said[8:] == ["  8/6 #8 failed: boom", "  final: winner: score 8.500",
                        "Finished after 1:15: winner #6, chosen by score 9.000, final 8.500 (the budget is spent)"]
    assert not is_driven(folder)
    again = list[str]()
    assert watch(sqlite_url(folder / "study.db"), again.append)
    assert again[-1] == said[-1]


def test_watch_ends_with_the_process(folder: Path) -> None:
    study, said = open_study(folder), list[str]()
    study.begin(0.0)
    study.close()
    assert not watch(str(folder), said.append)
    assert said[-1] == (f"No process of this machine is working on it; 6 candidates are done. To go on: lacer search "
                        f"--resume '{folder}'")
    with pytest.raises(LacerError, match="no such folder"):
        watch(str(folder / "nothing"), said.append)


def test_watch_of_a_comparison_that_is_left(tmp_path: Path) -> None:
    folder, said, waited = tmp_path / "a comparison", list[str](), list[float]()
    folder.mkdir()
    write_config(folder / "comparison.yaml", {"seeds": [0, 1], "designers": {"random": {"designer": "random"}}})
    assert not watch(str(folder), said.append, interval=5.0, wait=waited.append)
    assert sum(waited) == IDLE, "another process may be starting"
    assert said == ["No process of this machine is working on it; 0 of 2 searches are finished. To go on: lacer "
                    f"compare --resume '{folder}'"]


def test_a_look_at_the_lock_stops_no_search(folder: Path) -> None:
    """`is_driven` holds the lock for a moment, in which a driver may start."""
    end = threading.Event()

    def look() -> None:
        while not end.is_set():
            is_driven(folder)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(30):
            with only_driver(folder):
                pass
    finally:
        end.set()
        thread.join()
    with only_driver(folder), pytest.raises(LacerError, match="another process is working"), only_driver(folder):
        pass


# -- exporting --------------------------------------------------------------------------------------------------------


def test_export(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = open_study(folder)
    t = study.start(Proposal({"a": 1, "b": True, "c": "x"}, "lacer", "because, \"so\"\nand so", (2,),
                             meta={"requests": 1, "tokens_in": 7, "expected": 4.5}))
    study.finish(t.number, Evaluation(
        objective=2.0, mean_return=3.0, returns=[2.5, 3.5], metrics={"speed": [1.0, 3.0]},
        curve=[(100, 0.5), (200, 0.75)], probes={"fused": {"effective_rank": 0.25}},
        cost=Cost(parameters=12, env_steps=300), seed=4))
    study.close()
    tables = {}
    for name in ("t.csv", "t.csv.gz", "t.parquet"):
        main(["export", str(folder), "--out", str(tmp_path / name)])
        tables[name] = pd.read_parquet(tmp_path / name) if "parquet" in name else pd.read_csv(tmp_path / name)
    assert capsys.readouterr().out.startswith("7 rows: ")
    for table in tables.values():
        assert len(table) == 7
        row = table.iloc[6]
        assert row["rationale"] == "because, \"so\"\nand so"
        values = {"status": "ok", "designer": "lacer", "objective": 2, "mean_return": 3, "metric/speed": 2, "seed": 4,
                  "expected": 4.5, "decision/a": 1, "probe/fused/effective_rank": 0.25, "cost/parameters": 12,
                  "llm/tokens_in": 7, "env_steps": 300}
        assert {k: row[k] for k in values} == values
        assert json.loads(row["returns"]) == [2.5, 3.5]
        assert json.loads(row["parents"]) == [2]
        assert str(row["decision/c"]) == "x"
        assert table["winner"].sum() == 1
    main(["export", str(folder), "--curves"])
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["number,env_steps,return", "6,100,0.5", "6,200,0.75"]
    with pytest.raises(LacerError, match=r"must end in \.csv"):
        export(folder, tmp_path / "t.xlsx")
    with pytest.raises(LacerError, match="there is no folder"):
        export(folder, tmp_path / "nowhere" / "t.csv")


@pytest.mark.parametrize("command", [["envs"], ["export", "RUN"]])
def test_a_reader_that_goes_away(command: list[str], folder: Path) -> None:
    """As with ``| head``: the pipe is closed before anything is written."""
    process = subprocess.Popen([sys.executable, "-P", "-m", "lacer.search.cli", *(
        str(folder) if a == "RUN" else a for a in command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == ""
    process.stderr.close()


# -- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", presets())
def test_presets_are_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["search", "--config", name, "--dry-run", "--measured-steps", "0", "--json"])
    data, config = json.loads(capsys.readouterr().out), validate(read_yaml(name), name)
    total = data["total"]
    assert total["candidates"] == config.candidates
    assert total["env_steps"] == config.candidates * config.protocol.steps + 2 * config.final_steps
    assert total["hours"] is None
    assert data["searches"][0]["env"] == config.env


def test_dry_run_measures_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "executor": "inprocess", "designer": "lacer", "llm": "openai:x",
                                    "llm_base_url": "http://127.0.0.1:9/v1", "llm_price_in": 2.0, "batch": 2}))
    main(["search", "--config", str(path), "--dry-run", "--measured-steps", "256", "--json"])
    out, err = capsys.readouterr()
    data = json.loads(out)
    [s], [speed] = data["searches"], data["speeds"]
    assert "Measuring 256 steps of lacer/KnownSources-v0" in err
    assert speed["steps_per_second"] > 10
    assert speed["episode_steps"] == 16, "an episode of this environment has 16 steps"
    assert s["episode_steps"] == (5 * 4 + 3 * 4) * 16
    assert (s["requests"], s["tokens"]) == (2, 16_000), "four encoders, two a request"
    one = 512 / speed["steps_per_second"] + 4 * speed["episode_seconds"] + speed["other_seconds"]
    assert s["seconds"] == pytest.approx(7 * one)
    main(["search", "--config", str(path), "--dry-run", "--measured-steps", "0"])
    shown = capsys.readouterr().out
    assert "Environment steps:  3,584" in shown
    assert "at most 0.03 US dollars" in shown
    assert list(tmp_path.iterdir()) == [path]


def test_plan_of_equal_steps() -> None:
    from lacer.search.estimate import Speed, estimate

    config = validate({**TINY, "designer": "darts", "designer_steps": 1000, "max_env_steps": 2600}, "x")
    assert estimate(plan(config), None).candidates == 3
    e = estimate(plan(config), Speed(100.0, 0.0, 100.0, 0.0))
    assert (e.candidates, e.designer_steps) == (1, 1000), "evaluations count"
    assert e.limits == ("max_env_steps 2,600",)
    asked = validate({**TINY, "designer": "lacer", "llm": "openai:x", "max_env_steps": TINY["protocol"]["steps"]}, "x")
    e = estimate(plan(asked), Speed(100.0, 0.0, 100.0, 0.0))
    assert (e.candidates, e.requests, e.tokens) == (1, 0, 0), "the expert's encoder is evaluated in any case"


@pytest.mark.slow
def test_search_for_scripts(tiny: Path, lacer: Lacer, tmp_path: Path) -> None:
    done = lacer("search", "--config", tiny, "--candidates", 2, "--out", tmp_path / "r", "--json", "--quiet", "--wandb",
                 "off")
    assert done.returncode == 0
    assert not done.stderr
    data: dict[str, Any] = json.loads(done.stdout)
    run = read_run(tmp_path / "r")
    assert data["folder"] == str(tmp_path / "r")
    assert data["winner"]["number"] == run.attrs["final_trial"]
    assert data["finals"]["winner"]["objective"] == run.finals["winner"].objective
    assert data["candidates"]["ok"] == 2
    assert data["env_steps"] == sum(t.trial.env_steps for t in run.trials)
