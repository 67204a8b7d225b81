"""Contracts that every designer without an LLM keeps; new ones are tested by being registered."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest

from lacer.agents import Evaluation
from lacer.envs import LacerError, task_card
from lacer.search import Decision, SearchSpace, search
from lacer.search.bench import bench
from lacer.search.config import BenchConfig
from lacer.search.designers import bo
from lacer.search.designers.base import Designer, designer_class, designer_names, make_plain
from lacer.search.designers.evolution import Evolution
from lacer.search.space import EncoderSpace, Point
from lacer.search.storage import sqlite_url
from lacer.search.study import StoredStudy, Study
from lacer.search.tables import ListedSpace
from lacer.search.testing import DesignerConformance

CARD = task_card("lacer/KnownSources-v0")
SPACE = EncoderSpace(CARD)


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


class NumericConformance(DesignerConformance):
    """For designers that take numbers only."""

    def spaces(self) -> dict[str, SearchSpace]:
        points = [(i, j) for i in range(12) for j in range(12) if (i + j) % 3]
        return {"one decision": SearchSpace([Decision("only", tuple(range(30)))]),
                "one option": SearchSpace([Decision("a", (3,)), Decision("b", (64, 16, 32, 8)), Decision("c", (1, 2))]),
                "10^12 points": SearchSpace([Decision(f"d{i}", tuple(range(10))) for i in range(12)]),
                "200 decisions": SearchSpace([Decision(f"d{i}", (False, True)) for i in range(200)]),
                "holes": ListedSpace([Decision(n, tuple(range(12))) for n in "ab"], [f"{i}.{j}" for i, j in points])}

    def space(self) -> SearchSpace:
        return SearchSpace([Decision("width", (16, 32, 64, 128)), Decision("rate", (0.1, 0.01, 0.001)),
                            *(Decision(f"d{i}", tuple(range(5))) for i in range(4))])


NUMERIC = ("cmaes",)

for _name in designer_names():  # every designer that needs nothing but a seed
    if not (designer_class(_name).needs_llm or designer_class(_name).trains or _name.startswith("test-")):
        _base = NumericConformance if _name in NUMERIC else DesignerConformance
        _cls = type(f"Test_{_name.replace(':', '_')}", (_base,), {
            "designer": _name, "length": 11 if "GP" in _name else 14})
        globals()[_cls.__name__] = pytest.mark.slow(_cls) if "GP" in _name else _cls  # Optuna's GP takes its time


@pytest.mark.parametrize("name", ["evolution", "optuna:NSGAIISampler"])  # NSGA-II keeps generations with the trials
def test_resumes_from_a_database(name: str, tmp_path: Path) -> None:
    whole = play(make_plain(name, 3), new_study(), 12)
    url = sqlite_url(tmp_path / "study.db")
    first = play(make_plain(name, 3), StoredStudy(url, "s", SPACE), 6)
    assert first + play(make_plain(name, 3), StoredStudy(url, "s", SPACE), 6) == whole


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


# -- Bayesian optimisation and Optuna's samplers ----------------------------------------------------------------------

TABLE = Path(__file__).parents[2] / "benchmarks" / "data" / "nasbench_macro.csv.gz"


@pytest.fixture(scope="module")
def table() -> dict[str, float]:
    with gzip.open(TABLE, "rt") as f:
        return {row["arch"]: float(row["mean_acc"]) for row in csv.DictReader(f)}


def best_of(name: str, seed: int, scores: dict[str, float], n: int) -> float:
    space = SearchSpace.from_table(scores)
    study, designer = Study(space), make_plain(name, seed)
    for _ in range(n):
        [p] = designer.propose(study, 1)
        assert p.point is not None
        study.finish(study.start(p).number, Evaluation(objective=scores[space.to_string(p.point)]))
    assert study.best is not None
    return float(study.best.objective or 0.0)


def test_bo_beats_random_on_a_table(table: dict[str, float]) -> None:
    bo, random = ([best_of(name, seed, table, 30) for seed in range(4)] for name in ("bo", "random"))
    assert np.mean(bo) > 93.0 > np.mean(random)
    assert min(bo) > max(random)


def test_the_gaussian_process_against_its_definition() -> None:
    space = SearchSpace([Decision("a", (0, 1, 2)), Decision("b", (0, 1, 2)), Decision("c", ("x", "y"), ("a", 1))])
    coder = bo.Coder(space)
    assert len(coder.points) == space.size() == 12
    codes, rng = coder.encode(coder.points), np.random.default_rng(0)
    seen, y = codes[:7], rng.normal(size=7)
    gp = bo.GP.fit(seen, y, coder)
    a, b, noise, scale = np.exp(gp.log[:4])

    def kernel(p: Point, q: Point) -> float:
        names = ("a", "b", "c")
        differ = sum(np.exp(gp.log[4 + i]) for i, n in enumerate(names) if p.get(n) != q.get(n))
        counts = [np.array([(r["a"] == o) + (r["b"] == o) for o in (0, 1, 2)]) / 2 for r in (p, q)]
        return float(a * np.exp(-differ) + b * np.exp(-scale * ((counts[0] - counts[1]) ** 2).sum()))

    every = np.array([[kernel(p, q) for q in coder.points] for p in coder.points])
    inverse = np.linalg.inv(every[:7, :7] + noise * np.eye(7))
    mean, deviation = gp.predict(codes)
    np.testing.assert_allclose(mean, every[:, :7] @ inverse @ y, atol=1e-8)
    np.testing.assert_allclose(deviation ** 2, a + b - np.diag(every[:, :7] @ inverse @ every[:7]), atol=1e-8)
    np.testing.assert_allclose(gp.mean_at_data(), mean[:7], atol=1e-8)
    dense = gp.with_fantasy(codes[9:10])
    assert dense.predict(codes[9:10])[1] < deviation[9]
    np.testing.assert_allclose(dense.predict(codes)[0], mean, atol=1e-6)


def test_expected_improvement_and_ranks() -> None:
    rng = np.random.default_rng(0)
    draws = rng.normal(0.3, 0.7, 2_000_000)
    np.testing.assert_allclose(bo.expected_improvement(np.array([0.3]), np.array([0.7]), 0.5),
                               np.maximum(draws - 0.5, 0).mean(), rtol=5e-3)
    scores = bo.normal_scores(np.array([5.0, -1e9, 7.0, 5.0]))
    assert scores[0] == scores[3]
    assert scores[1] < scores[0] < scores[2]
    assert abs(scores.sum()) < 0.5


def test_names_with_variants() -> None:
    assert isinstance(make_plain("optuna:NSGAIISampler", 3), Designer)
    assert "optuna:TPESampler" in designer_names()
    for wrong in ("optuna:TPESamplr", "optuna:NopeSampler", "bo:TPESampler"):
        with pytest.raises(LacerError, match="unknown designer"):
            designer_class(wrong)


# -- CMA-ES ---------------------------------


def bowl(point: Point) -> float:
    return -sum((v - 13) ** 2 for v in point.values())


def test_cma_es_finds_the_bottom_of_a_bowl() -> None:
    space = SearchSpace([Decision(f"x{i}", tuple(range(21))) for i in range(5)])
    for seed in range(3):
        study, designer = Study(space), make_plain("cmaes", seed)
        for _ in range(200):
            [p] = designer.propose(study, 1)
            assert p.point is not None
            study.finish(study.start(p).number, Evaluation(objective=bowl(p.point)))
        assert study.best is not None
        assert study.best.objective is not None
        assert study.best.objective >= -2, "of 4 million points; random search finds about -60"


def test_cma_es_asks_while_a_generation_is_evaluated() -> None:
    """Twenty workers; results come in another order than that of the proposals."""
    space = SearchSpace([Decision(f"x{i}", tuple(range(21))) for i in range(5)])
    study, designer, rng = Study(space), make_plain("cmaes", 0), np.random.default_rng(0)
    running = []
    for _ in range(300):
        [p] = designer.propose(study, 1)
        running.append(study.start(p))
        if len(running) == 20:
            t = running.pop(int(rng.integers(20)))
            study.finish(t.number, Evaluation(objective=bowl(t.proposal.point or {})))
    assert study.best is not None
    assert (study.best.objective or -99) >= -8
    copy = Study(space, trials=study.trials)
    again = make_plain("cmaes", 0).propose(copy, 3)
    assert [p.point for p in again] == [p.point for p in designer.propose(study, 3)], "rebuilt from the study alone"


def test_cma_es_needs_numbers() -> None:
    def check(*decisions: Decision) -> None:
        make_plain("cmaes", 0).check_space(SearchSpace(decisions))

    with pytest.raises(LacerError, match="option 'a'; CMA-ES needs numbers"):
        check(Decision("x", (1, 2)), Decision("y", ("a", "b")))
    with pytest.raises(LacerError, match="asked only in some cases"):
        check(Decision("x", (1, 2)), Decision("y", (1, 2), ("x", 2)))
    with pytest.raises(LacerError, match="nothing to decide"):
        check(Decision("x", (1,)))
    with pytest.raises(LacerError, match="population be at least 3"):
        make_plain("cmaes", 0, population=2)
    with pytest.raises(LacerError, match=r"CMA-ES needs .* always asked|CMA-ES needs numbers"):
        search("lacer/KnownSources-v0", designer="cmaes", quiet=True)
    with pytest.raises(LacerError, match="CMA-ES needs numbers"):
        search(space=SearchSpace([Decision("y", ("a", "b"))]), objective=len, designer="cmaes", quiet=True)
    with pytest.raises(LacerError, match="CMA-ES needs numbers"):
        bench(BenchConfig(table=str(TABLE), score="mean_acc", designers="cmaes"), "unused")
