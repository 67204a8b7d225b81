"""Contracts that every designer without an LLM keeps; new ones are tested by being registered."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lacer.agents import Evaluation
from lacer.envs import LacerError, task_card
from lacer.search.designers.base import Designer, designer_class, designers
from lacer.search.designers.evolution import Evolution
from lacer.search.space import EncoderSpace, Point
from lacer.search.storage import sqlite_url
from lacer.search.study import Proposal, StoredStudy, Study

PLAIN = [name for name, cls in designers().items() if not cls.needs_llm]
CARD = task_card("lacer/KnownSources-v0")
SPACE = EncoderSpace(CARD)
TINY = EncoderSpace(CARD, {f"{s}.block": [b] for s, b in {
    "position": "linear", "trend": "unused", "picture": "unused", "words": "unused", "noise": "unused"}.items()}
    | {"position.linear.width": [8], "fusion.block": ["gated_sum"], "fusion.gated_sum.width": [16, 32],
       "fusion.*.modality_dropout": [0.0]})


def score(point: Point) -> float:
    """A known objective: 1 for a CNN, plus 1 for a GRU, minus 1 for reading noise."""
    good = (point["picture.block"] == "cnn") + (point["trend.block"] == "gru")
    return good - 1.0 * (point["noise.block"] != "unused")


def play(designer: Designer, study: Study, n: int, batch: int = 1, failing: bool = False) -> list[Point]:
    out: list[Point] = []
    while len(out) < n:
        for p in designer.propose(study, min(batch, n - len(out))):
            assert p.point is not None
            study.space.check(p.point)
            trial = study.start(p)
            out.append(p.point)
            bad = failing and len(out) % 3 == 0
            done = study.finish(trial.number, Evaluation.failure("NaN") if bad else Evaluation(
                objective=score(p.point) if study.space is SPACE else 1.0, mean_return=0.0))
            designer.observe(done)
    return out


def new_study(space: EncoderSpace = SPACE) -> Study:
    return Study(space)


@pytest.mark.parametrize("name", PLAIN)
class TestContract:
    def test_deterministic_and_resumes_from_the_study_alone(self, name: str, tmp_path: Path) -> None:
        whole = play(designer_class(name)(3), new_study(), 14)
        url = sqlite_url(tmp_path / "study.db")
        first = play(designer_class(name)(3), StoredStudy(url, "s", SPACE), 7)
        assert first + play(designer_class(name)(3), StoredStudy(url, "s", SPACE), 7) == whole
        assert play(designer_class(name)(4), new_study(), 14) != whole

    @pytest.mark.parametrize("batch", [1, 16])
    def test_no_repeats_and_copes_with_failures(self, name: str, batch: int) -> None:
        points = play(designer_class(name)(0), new_study(), 32, batch, failing=True)
        assert len({SPACE.to_ncode(p) for p in points}) == 32

    def test_exhausted_space_of_two(self, name: str) -> None:
        study = new_study(TINY)
        designer = designer_class(name)(0)
        assert TINY.size() == 2
        assert len({TINY.to_ncode(p) for p in play(designer, study, 2)}) == 2
        for p in designer.propose(study, 3):
            assert p.point is not None

    def test_nothing_but_failures_and_rejections(self, name: str) -> None:
        study = new_study()
        designer = designer_class(name)(0)
        for _ in range(12):
            study.reject(Proposal(None, "x", rejected="bad"))
            [p] = designer.propose(study, 1)
            study.finish(study.start(p).number, Evaluation.failure("out of memory"))
        assert designer.propose(study, 1)[0].point is not None

    def test_says_what_it_is(self, name: str) -> None:
        cls = designer_class(name)
        assert cls.summary()
        assert cls.paper


def test_unknown_designer() -> None:
    with pytest.raises(LacerError, match="did you mean 'evolution'"):
        designer_class("evolutoin")


def test_evolution_climbs_and_drops_its_oldest() -> None:
    gained = []
    for seed in range(4):
        study = new_study()
        points = play(Evolution(seed, population=8, tournament=3), study, 60)
        gained.append(np.mean([score(p) for p in points[-15:]]) - np.mean([score(p) for p in points[:15]]))
    assert np.mean(gained) > 0.4
    for t in study.trials[8:]:
        if t.proposal.parents:
            assert t.number - 8 <= t.proposal.parents[0] < t.number, "a parent is one of the eight youngest"


def test_evolution_mutates_one_decision() -> None:
    study = new_study()
    play(Evolution(0), study, 20)
    children = [t for t in study.trials if t.proposal.parents]
    assert len(children) >= 12
    single = 0
    for t in children:
        parent = study.trials[t.proposal.parents[0]].proposal.point
        assert parent is not None
        assert t.proposal.point is not None
        changed = [k for k, v in t.proposal.point.items() if k in parent and parent[k] != v]
        assert 1 <= len(changed) <= 2, "one, or two where the first child was in the study already"
        single += len(changed) == 1
    assert single >= 0.8 * len(children)
