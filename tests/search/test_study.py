"""The study: what is stored comes back, whatever was interrupted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import optuna
import pytest

from lacer.agents import Evaluation
from lacer.envs import LacerError, task_card
from lacer.search.space import EncoderSpace
from lacer.search.storage import sqlite_url
from lacer.search.study import Proposal, StoredStudy, Study

SPACE = EncoderSpace(task_card("lacer/KnownSources-v0"))


def fill(study: Study, n: int) -> None:
    rng = np.random.default_rng(1)
    for i in range(n):
        trial = study.start(Proposal(SPACE.sample(rng), "random", f"why {i}", (0,), meta={"tokens_in": i}))
        study.finish(trial.number, Evaluation.failure("boom") if i == 2 else Evaluation(
            objective=float(i % 4), mean_return=1.5 * i, curve=[(10, 0.5)], probes={"fused": {"effective_rank": 0.5}}))


def test_everything_comes_back(tmp_path: Path) -> None:
    study = StoredStudy(sqlite_url(tmp_path / "study.db"), "s", SPACE)
    fill(study, 6)
    study.reject(Proposal(None, "lacer", "no idea", rejected="not JSON", meta={"reply": "```"}))
    running = study.start(Proposal(SPACE.sample(np.random.default_rng(9)), "random"))
    study.set_attr("final", {"a": [1, 2]})
    again = StoredStudy(sqlite_url(tmp_path / "study.db"), "s", SPACE, create="no")
    assert again.trials == study.trials
    assert [t.status for t in again.trials] == ["ok", "ok", "failed", "ok", "ok", "ok", "rejected", "running"]
    assert again.trials[6].reason == "not JSON"
    assert again.trials[2].reason == "boom"
    assert again.best is not None
    assert again.best.number == 3, "the earlier of equals is the best"
    assert again.get_attr("final") == {"a": [1, 2]}
    again.finish(running.number, Evaluation(objective=9.0, mean_return=0.0))
    assert again.best.number == running.number
    with pytest.raises(ValueError, match="is ok"):
        again.finish(running.number, Evaluation(objective=1.0))


def test_optuna_sees_meaningful_names(tmp_path: Path) -> None:
    fill(StoredStudy(sqlite_url(tmp_path / "study.db"), "s", SPACE), 6)
    raw = optuna.load_study(storage=sqlite_url(tmp_path / "study.db"), study_name="s")
    assert raw.metric_names == ["score"]
    assert raw.best_value == 3.0
    assert "picture.block" in raw.trials[0].params
    assert {t.state.name for t in raw.trials} == {"COMPLETE", "FAIL"}
    assert optuna.importance.get_param_importances(raw, params=["picture.block", "fusion.block"])


def test_minimised_objective(tmp_path: Path) -> None:
    from dataclasses import replace

    from lacer.envs import Objective

    space = EncoderSpace(replace(SPACE.card, objective=Objective("delay", "s", "minimize")))
    study = StoredStudy(sqlite_url(tmp_path / "study.db"), "s", space)
    fill(study, 5)
    assert study.best is not None
    assert study.best.objective == 0.0
    assert study.store.study.best_value == 0.0


@pytest.mark.parametrize("content", [b"", b"not a database at all", None])
def test_no_study_there(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "study.db"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LacerError, match=r"no study|is damaged"):
        StoredStudy(sqlite_url(path), "s", SPACE, create="no")
