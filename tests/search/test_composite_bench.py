"""Measuring a table of encoders: rows, resuming, and searching it afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lacer.encoders import EncoderSpec
from lacer.envs import LacerError, task_card
from lacer.search.bench import play
from lacer.search.cli import main
from lacer.search.composite_bench import encoders_of, make_table
from lacer.search.config import SearchConfig, TableConfig, resumed
from lacer.search.designers.base import make_plain
from lacer.search.space import EncoderSpace
from lacer.search.tables import METADATA, arrow, read_table

SMALL: dict[str, Any] = {
    "env": "lacer/KnownSources-v0", "env_kwargs": {"sources": ["position", "noise"]}, "text_model": "hash",
    "executor": "inprocess",
    "protocol": {"steps": 64, "eval_episodes": 2, "ppo": {"n_envs": 2, "n_steps": 16, "n_epochs": 1}},
    "space": {"decisions": {
        "position.block": ["linear", "unused"], "noise.block": ["linear", "unused"], "vector:*.linear.width": [8],
        "fusion.block": ["gated_sum"], "fusion.gated_sum.width": [16, 32], "fusion.*.modality_dropout": [0.0]}},
}


def test_makes_resumes_and_searches_a_table(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    path = make_table(TableConfig(**SMALL, seeds=1), folder, quiet=True)
    first = pd.read_parquet(path)
    assert len(first) == first.ncode.nunique() == 6, "all but the two without a source"
    with pytest.raises(LacerError, match="exists already"):
        make_table(TableConfig(**SMALL, seeds=1), folder, quiet=True)
    make_table(resumed(TableConfig, folder, {"seeds": 2}), folder, resume=True, quiet=True)
    with pytest.raises(LacerError, match="the run of a table; go on with it by `lacer bench make --resume"):
        resumed(SearchConfig, folder, {})
    searched = tmp_path / "searched"
    searched.mkdir()
    (searched / "config.yaml").write_text("env: lacer/KnownSources-v0\n# end of the configuration\n")
    with pytest.raises(LacerError, match="the run of a search; go on with it by `lacer search --resume"):
        resumed(TableConfig, searched, {})
    frame = pd.read_parquet(path)
    pd.testing.assert_frame_equal(frame.iloc[:6], first)
    assert list(frame.groupby("ncode").seed.nunique()) == [2] * 6
    assert set(frame.status) == {"ok"}
    card = task_card("lacer/KnownSources-v0", sources=["position", "noise"])
    row = frame.iloc[0]
    spec = EncoderSpec.parse(json.loads(row.encoder), card)
    assert spec.sources
    assert row.objective == pytest.approx(row.returns.mean() / 16), "score: mean reward of a step"
    assert list(row.curve_steps) == [32, 64]
    assert row["cost/env_steps"] == 64 + 32
    assert frame["probe/fused/effective_rank"].notna().all()

    _, parquet = arrow()
    about = json.loads(parquet.read_schema(path).metadata[METADATA])
    assert about["config"]["protocol"]["steps"] == 64
    assert about["versions"]["packages"]["torch"]
    table = read_table(path, ["ncode"], "objective", repeated=True)
    assert {d.name for d in table.space.decisions} >= {"position.block", "fusion.gated_sum.width"}
    assert table.reported[row.ncode] == pytest.approx(frame[frame.ncode == row.ncode].objective.mean())
    run = play(make_plain("evolution", 0), table, 6, 0, "evolution")
    assert len(set(run.ncode)) == 6


def test_which_encoders() -> None:
    space = EncoderSpace(task_card("lacer/KnownSources-v0"))
    some = encoders_of(space, 5, 3)
    assert some == encoders_of(space, 5, 3) != encoders_of(space, 5, 4)
    assert len({space.to_ncode(p) for p in some}) == 5
    with pytest.raises(LacerError, match="say how many to measure"):
        encoders_of(space, 0, 0)
    small = EncoderSpace(task_card("lacer/KnownSources-v0", sources=["position", "noise"]), SMALL["space"]["decisions"])
    assert len({small.to_ncode(p) for p in encoders_of(small, 5, 0)}) == 5
    with pytest.raises(LacerError, match="holds 6 encoders, fewer than"):
        encoders_of(small, 7, 0)


@pytest.mark.parametrize(("options", "message"), [
    (["--config", "composit"], "did you mean 'composite'"),
    (["--config", "composite", "--protocol.steps", "0"], "--protocol.steps"),
    (["--encoders", "3", "--env", "lacer/KnownSource-v0"], "did you mean"),
    (["--resume", "nowhere"], "is no run"),
    (["--resume", "nowhere", "--config", "composite"], "leave --config and --out out"),
    (["--designer", "bo"], "unrecognized"),
])
def test_wrong_options(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as e:
        main(["bench", "make", *options])
    assert e.value.code == 2
    assert message.lower() in capsys.readouterr().err.lower()
