"""Runs that the protocol ends early: recorded with their reason, told to the designer, passed over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from lacer.agents import Evaluation
from lacer.envs import task_card
from lacer.search import search
from lacer.search.designers.spark import errors
from lacer.search.llm import facts
from lacer.search.space import EncoderSpace
from lacer.search.study import Proposal, Study
from tests.search.conftest import TINY

REASON = "collapsed rank: the fused state's effective rank is 0.02 of its width after 256 steps, below 0.1"


def settings(**protocol: Any) -> dict[str, Any]:
    return {**TINY, "wandb": "off", "executor": "inprocess", "limits": {}, "candidates": 2, "quiet": True,
            "env_kwargs": {"sources": ["position", "noise"]},
            "protocol": {**TINY["protocol"], "probe_at": [0.5], "probes": ["effective_rank"], **protocol}}


def test_a_search_goes_on_after_hopeless_runs(tmp_path: Path) -> None:
    """No encoder reaches an effective rank of 1, so with this threshold every run ends, the expert's too."""
    result = search(out=tmp_path / "run", **settings(stop_rank=1.0))
    assert [t.status for t in result.outcome.trials] == ["pruned", "pruned"]
    for t in result.outcome.trials:
        assert t.reason.startswith("collapsed rank")
        assert t.env_steps == 256
        assert t.evaluation is not None
        assert [s for s, _ in t.evaluation.probe_curve] == [256]
    stored = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path}/run/study.db").trials
    assert [t.state.name for t in stored] == ["PRUNED", "PRUNED"]
    assert "collapsed rank" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_final_trainings_are_not_ended(tmp_path: Path) -> None:
    """The rule is for candidates: it lets some of them through, and the winner's training to its end."""
    result = search(out=tmp_path / "run", **{**settings(stop_dead=1.0, probes=["dead_units"]), "candidates": 3})
    assert {t.status for t in result.outcome.trials} == {"ok"}
    assert all(e.ok for e in result.outcome.finals.values())


def test_what_models_and_spark_are_told() -> None:
    space = EncoderSpace(task_card("lacer/KnownSources-v0"))
    study, rng = Study(space), np.random.default_rng(0)
    for i in range(3):
        t = study.start(Proposal(space.sample(rng), "spark", "because"))
        study.finish(t.number, Evaluation(objective=0.5) if i == 0 else Evaluation(status="pruned", reason=REASON))
    assert study.count("pruned") == 2
    assert study.best is study[0]
    told = facts.history(study, ("failures",), 4, 4, 4)
    assert [t.number for t in told["failed"]] == [1, 2]
    assert facts.outcome(study[1], study) == f"pruned: {REASON}"
    assert [m["outcome"] for m in facts.memory(study, 1, ["spark"])] == [f"pruned: {REASON}"]
    assert errors(study, "spark") == [("training", 2)]
