"""Comparisons: what is compared, what is said of it, and what is refused."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import yaml

import lacer.configs as configs
from lacer.agents import Cost, Evaluation
from lacer.envs import LacerError, Objective
from lacer.search import Decision, SearchSpace, search
from lacer.search.compare import (
    ALLOW,
    FREE,
    PER_DESIGNER,
    SAME,
    ComparisonConfig,
    Entry,
    _check_changes,
    check_comparable,
    compare_runs,
    find_runs,
    gather,
    is_compared,
    plan_comparison,
    read_comparison,
    run_comparison,
)
from lacer.search.compare_report import sections, statements
from lacer.search.config import SearchConfig, validate_as
from lacer.search.designers.base import Designer, register_designer
from lacer.search.designers.random_search import RandomSearch
from lacer.search.presets import presets, read_yaml
from lacer.search.runs import StoredRun, StoredTrial, read_run
from lacer.search.study import Proposal, Study
from tests import helper_objectives
from tests.search.conftest import TINY, Lacer, Start, run
from tests.search.test_report import overflow

SPACE = SearchSpace([Decision(f"d{i}", (0, 1, 2, 3)) for i in range(8)])
BEGIN = datetime(2026, 1, 1)


def noisy(point: Mapping[str, Any], rng: np.random.Generator) -> float:
    return sum(point.values()) / 24 + float(rng.normal(0, 0.02))


class Handicapped(RandomSearch):
    """Random, but with half of the decisions at their worst option."""

    name: ClassVar[str] = "handicapped"

    def propose(self, study: Study, n: int) -> list[Proposal]:
        return [replace(p, point={**(p.point or {}), **{f"d{i}": 0 for i in range(4)}})
                for p in super().propose(study, n)]


def played(designer: Designer, seed: int, candidates: int = 12, config: Mapping[str, Any] | None = None) -> StoredRun:
    """A finished run, played in memory: the final score of its winner is drawn anew."""
    study, rng, rows = Study(SPACE), np.random.default_rng([seed, 5]), []
    while len(study.finished) < candidates:
        [p] = designer.propose(study, 1)
        t = study.start(p)
        e = Evaluation(objective=noisy(p.point or {}, rng), metrics={"score": [0.0]}, cost=Cost(env_steps=100))
        rows.append(study.finish(t.number, e))
        designer.observe(rows[-1])
    best = study.best
    assert best is not None
    when = [BEGIN + timedelta(seconds=10.0 * i) for i in range(len(rows) + 1)]
    value = noisy(best.proposal.point or {}, rng)
    final = Evaluation(objective=value, metrics={"score": [value]}, episode_seeds=[1])
    return StoredRun(
        f"runs/{designer.name}-{seed}", {"env": "Nowhere-v0", "designer": designer.name, "seed": seed, "candidates": 12,
                                         **(config or {})},
        {"packages": {"torch": "2"}}, Objective("score"),
        {"finished": {"why": ""}, "winner": final.model_dump(mode="json"), "final_trial": best.number,
         "seconds": 120.0},
        tuple(StoredTrial(t, None, a, b) for t, a, b in zip(rows, when, when[1:], strict=False)))


def entries(makers: Mapping[str, Callable[[int], Designer]], seeds: int, first: int = 0) -> list[Entry]:
    """Each group has seeds of its own."""
    return [Entry("", label, played(make(first + 1000 * g + s), first + 1000 * g + s))
            for g, (label, make) in enumerate(makers.items()) for s in range(seeds)]


# -- planted truth ----------------------------------------------------------------------------------------------------


def test_a_designer_made_worse_on_purpose_is_found_and_two_alike_are_not_told_apart(tmp_path: Path) -> None:
    groups = entries({"random": RandomSearch, "worse": Handicapped, "random again": RandomSearch}, 6)
    c = gather(groups, tmp_path)
    said = " ".join(statements(c))
    assert "random is better than worse" in said
    assert "random again is better than worse" in said
    assert "The other pairs cannot be told apart" in said
    assert not re.search(r"worse is better|random is better than random|random again is better than random", said)
    ranking = c.ranking.set_index("designer")
    assert list(c.ranking["designer"])[-1] == "worse"
    assert ranking.loc["worse", "better_than"] == ""
    assert ranking.loc["random", "better_than"] == "worse"
    assert ranking.loc["random", "low"] < ranking.loc["random", "iqm"] < ranking.loc["random", "high"]
    # The other way round where lower is better.
    flipped = [replace(e, run=replace(e.run, objective=Objective("score", "", "minimize"))) for e in groups]
    lower = gather(flipped, tmp_path)
    assert "How much lower the mean of the first is" in next(s for s in sections(lower) if s.title == "Pairs").text[0]
    assert not any(c.better.startswith("random") for c in lower.pairs[""])


def test_alike_designers_are_rarely_told_apart_and_worse_ones_nearly_always(tmp_path: Path) -> None:
    """20 comparisons of six seeds each: at most 5 % false findings, with three standard errors of room."""
    alike, worse, n = 0, 0, 20
    pool = {d: [played(d(s), s, 6) for s in range(48)] for d in (RandomSearch, Handicapped)}
    rng = np.random.default_rng(0)
    for _ in range(n):
        a, b = rng.choice(48, (2, 6), replace=False)
        one = [Entry("", "a", pool[RandomSearch][i]) for i in a]
        c = gather([*one, *(Entry("", "b", pool[RandomSearch][i]) for i in b)], tmp_path)
        alike += bool(c.pairs[""][0].better)
        c = gather([*one, *(Entry("", "b", pool[Handicapped][i]) for i in b)], tmp_path)
        worse += c.pairs[""][0].better == "a"
    assert alike <= 0.05 * n + 3 * np.sqrt(0.05 * 0.95 * n)
    assert worse >= 0.95 * n


def test_three_seeds_say_that_they_are_too_few(tmp_path: Path) -> None:
    c = gather(entries({"random": RandomSearch, "worse": Handicapped, "third": RandomSearch}, 3), tmp_path)
    [said] = statements(c)
    assert "No designer can be told from another with 3 seeds" in said
    assert "5 seeds can" in said
    one = gather(entries({"random": RandomSearch, "worse": Handicapped}, 1), tmp_path)
    assert "with a single search cannot be told" in statements(one)[0]
    mixed = entries({"random": RandomSearch, "worse": Handicapped}, 4)
    mixed.append(Entry("", "third", played(RandomSearch(77), 77)))
    said = " ".join(statements(gather(mixed, tmp_path)))
    assert "random is better than worse" in said
    assert "With a single search each, third cannot be told from another." in said
    assert "nothing is compared" in statements(gather(entries({"random": RandomSearch}, 3), tmp_path))[0]


# -- figures ----------------------------------------------------------------------------------------------------------


def built(objectives: list[float | None], *, seed: int = 0, own: int = 0, rejected: tuple[str, ...] = (),
          final: float | None = 1.0, minutes: float = 1.0, **attrs: Any) -> StoredRun:
    """A run of known results: one a minute, 100 steps each; proposals that repeat or are invalid come last."""
    trials = []
    for i, value in enumerate(objectives):
        e = Evaluation(objective=value, cost=Cost(env_steps=100), status="failed" if value is None else "ok")
        p = Proposal({"d0": i}, "d", meta={"env_steps": own} if own and i == 1 else {})
        status: Any = "failed" if value is None else "ok"
        start = BEGIN + timedelta(minutes=minutes * i)
        from lacer.search.study import Trial

        trials.append(StoredTrial(Trial(i, status, p, None, str(i), e), None, start,
                                  start + timedelta(minutes=minutes)))
    for k, code in enumerate(rejected):
        trials.append(StoredTrial(Trial(len(trials), "rejected", Proposal(None, "d", rejected="no"), None, code), None,
                                  BEGIN, BEGIN + timedelta(seconds=k)))
    finals = {} if final is None else {"winner": Evaluation(objective=final).model_dump(mode="json")}
    return StoredRun(f"runs/{seed}", {"env": "Nowhere-v0", "designer": "d", "seed": seed}, {}, Objective("score"),
                     {"finished": {"why": ""}, **finals, **attrs}, tuple(trials))


def test_best_so_far_by_hand(tmp_path: Path) -> None:
    runs = [built([0.1, None, 0.3, 0.2], own=1000), built([None, 0.5, 0.4, 0.7], seed=1)]
    c = gather([Entry("", "d", r) for r in runs], tmp_path)
    k = c.curves[c.curves["axis"] == "candidates"]
    assert list(k["x"]) == [2, 3, 4], "given from where all seeds have a result"
    assert list(k["mean"]) == pytest.approx([0.3, 0.4, 0.5])
    assert list(k["low"]) == pytest.approx([0.1, 0.3, 0.3])
    assert list(k["high"]) == pytest.approx([0.5, 0.5, 0.7])
    steps = c.curves[c.curves["axis"] == "env_steps"]
    # The first run's own training of 1,000 steps is charged when its second candidate starts, after 100.
    assert steps["x"].max() == 1400
    at = {round(x): m for x, m in zip(steps["x"], steps["mean"], strict=True)}
    assert at[min(x for x in at if x >= 200)] == pytest.approx((0.1 + 0.5) / 2)
    assert at[max(at)] == pytest.approx(0.5)
    seconds = c.curves[c.curves["axis"] == "seconds"]
    assert seconds["x"].max() == pytest.approx(240)
    row = c.searches.iloc[0]
    assert (row["env_steps"], row["env_steps_of_designer"]) == (1400, 1000)
    assert (row["ok"], row["failed"]) == (3, 1)


def test_pauses_between_sessions_do_not_count(tmp_path: Path) -> None:
    late = (BEGIN + timedelta(minutes=2)).isoformat()
    run = built([0.1, 0.2, 0.3], sessions=[{"start": BEGIN.isoformat(), "seconds": 0.0},
                                           {"start": late, "seconds": 61.0}])
    assert [run.clock(t.ended) for t in run.results if t.ended] == [60.0, 61.0, 121.0]


def test_rates_and_levels_by_hand(tmp_path: Path) -> None:
    a = built([0.1, 0.2, 0.9, None], rejected=("1", "2", "", "x"))
    b = built([0.95, 0.2, 0.3, 0.4], seed=1)
    c = gather([Entry("", "d", a), Entry("", "d", b)], tmp_path, levels=(0.9, 0.93))
    rates = c.rates.iloc[0]
    assert (rates["proposals"], rates["evaluated"], rates["duplicates"], rates["invalid"]) == (12, 8, 2, 2)
    assert (rates["failed_rate"], rates["pruned_rate"]) == (pytest.approx(1 / 8), 0)
    reached = c.reached.set_index("score")
    assert (reached.loc[0.9, "share"], reached.loc[0.9, "median"]) == (1.0, 3)
    assert (reached.loc[0.93, "share"], reached.loc[0.93, "median"]) == (0.5, np.inf)


def test_pruned_is_not_failed_and_unknown_money_is_not_none(tmp_path: Path) -> None:
    a, b = built([0.1, 0.2, None, None]), built([0.3], seed=1)
    trials = list(a.trials)
    trials[3] = replace(trials[3], trial=replace(trials[3].trial, status="pruned"))
    paid = [replace(t, trial=replace(t.trial, proposal=replace(t.trial.proposal, meta={"requests": 1})))
            for t in b.trials]
    runs = [replace(a, trials=tuple(trials)), replace(b, trials=tuple(paid))]
    c = gather([Entry("", "d", run) for run in runs], tmp_path)
    rates = c.rates.iloc[0]
    assert (rates["failed_rate"], rates["pruned_rate"]) == (pytest.approx(1 / 5), pytest.approx(1 / 5))
    proposals = next(s for s in sections(c) if s.title == "Proposals")
    assert proposals.head[-1] == "pruned"
    assert proposals.rows[0][-2:] == ("20%", "20%")
    assert np.isnan(c.costs.loc[0, "us_dollars"]), "one search is free, of the other nobody knows"
    cost = next(s for s in sections(c) if s.title == "What a search cost")
    assert cost.rows[0][-1] == "unknown"


def test_reported_scores_are_not_those_that_chose(tmp_path: Path) -> None:
    c = gather([Entry("", "d", built([0.1, 0.9], final=0.5, seed=s)) for s in range(3)], tmp_path)
    assert set(c.searches["final_score"]) == {0.5}
    assert set(c.searches["winner_selection_score"]) == {0.9}
    assert c.ranking.loc[0, "iqm"] == 0.5
    failed = gather([Entry("", "d", built([0.1], final=None)), Entry("", "d", built([0.2], seed=1))], tmp_path)
    assert failed.ranking.loc[0, "seeds"] == 1
    assert "has no final score and is missing from the ranking" in " ".join(sections(failed)[0].text)


def test_several_environments(tmp_path: Path) -> None:
    """Scores are normalised by doing nothing and the expert; no test is made across environments."""
    def run(score: float, seed: int, scale: float) -> StoredRun:
        made = built([score], seed=seed, final=score * scale)
        finals = {"do nothing": Evaluation(objective=0.0), "expert": Evaluation(objective=scale)}
        return replace(made, attrs={**made.attrs, **{k: v.model_dump(mode="json") for k, v in finals.items()}})

    groups = [Entry(env, label, run(value + 0.01 * s, s, scale)) for env, scale in (("small", 1.0), ("large", 100.0))
              for label, value in (("a", 1.2), ("b", 0.5)) for s in range(5)]
    c = gather(groups, tmp_path)
    assert c.envs == ["small", "large"]
    assert dict(zip(c.overall["designer"], c.overall["iqm"], strict=True)) == pytest.approx({"a": 1.22, "b": 0.52})
    assert [x.better for env in c.envs for x in c.pairs[env]] == ["a", "a"]
    assert c.profiles.groupby("designer")["share"].agg(["min", "max"]).to_numpy().tolist() == [[0, 1], [0, 1]]
    titles = [s.title for s in sections(c)]
    assert "All environments together" in titles
    assert "Final ranking – large" in titles


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "message", "allow"), [
    ({"env": "Elsewhere-v0"}, "differ in env", "env"),
    ({"env_kwargs": {"scene": "full"}}, "differ in env_kwargs", "env"),
    ({"eval_env_kwargs": {"wordings": "x"}}, "differ in eval_env_kwargs", None),
    ({"protocol": {"steps": 7}}, "differ in protocol", "protocol"),
    ({"final_steps": 7}, "differ in final_steps", "protocol"),
    ({"candidates": 7}, "differ in candidates, .*: 12 in runs/random-0, 7 in runs/random-1", "budget"),
    ({"max_env_steps": 7}, "differ in max_env_steps", "budget"),
    ({"space": {"d0": [1]}}, "differ in space", "space"),
])
def test_runs_that_are_not_alike(change: dict[str, Any], message: str, allow: str | None) -> None:
    pair = [Entry("", "random", played(RandomSearch(s), s, 2, c)) for s, c in enumerate(({}, change))]
    with pytest.raises(LacerError, match=message):
        check_comparable(pair)
    if allow is not None:
        with pytest.raises(LacerError, match=f"--allow {allow}"):
            check_comparable(pair)
        checked, notes = check_comparable(pair, [allow])
        if allow == "env":
            assert len({e.env for e in checked}) == 2
        else:
            assert notes[0].startswith("The runs differ in")


def test_every_field_of_a_configuration_is_alike_or_free() -> None:
    """A field that is added later is compared unless it is said that it may differ; runs that are older than it had its
    default."""
    known = {k for keys in SAME.values() for k in keys}
    assert not known & FREE
    assert known | FREE | PER_DESIGNER == set(SearchConfig.model_fields)
    assert {"protocol", "final_steps", "final_episodes", "text_model", "repeats", "expert"} <= set(SAME["protocol"])
    old, new = (played(RandomSearch(s), s, 2, c) for s, c in enumerate(({}, {"repeats": "reject"})))
    assert len(check_comparable([Entry("", "x", old), Entry("", "x", new)])[0]) == 2
    free = replace(new, config={**new.config, "workers": 7, "wandb": "off", "deterministic": True})
    assert "wall times cannot be compared" in check_comparable([Entry("", "x", old), Entry("", "x", free)])[1][0]


def test_runs_that_never_can_be_compared() -> None:
    a, b = (played(RandomSearch(s), s, 2) for s in range(2))
    cases = [
        (replace(b, objective=Objective("speed")), "different objectives: score, maximized in .*, speed"),
        (replace(b, objective=Objective("score", "", "minimize")), "different objectives"),
        (replace(b, config={k: v for k, v in b.config.items() if k != "env"}), "with a function as the objective"),
        (replace(b, config={**b.config, "seed": 0}), "same seed, 0: they are no independent runs"),
        (replace(b, versions={"packages": {"torch": "1"}}), 'version of torch.*"2" in .*"1" in .*--allow version'),
    ]
    for other, message in cases:
        with pytest.raises(LacerError, match=message):
            check_comparable([Entry("", "x", a), Entry("", "x", other)])
    with pytest.raises(LacerError, match=r"did you mean 'budget'\?"):
        check_comparable([Entry("", "x", a)], ["buget"])
    assert set(ALLOW) == {"env", "protocol", "budget", "space", "version"}


@pytest.mark.parametrize(("change", "message"), [
    ({"sedes": [1]}, "unknown key 'sedes'; did you mean 'seeds'"),
    ({"seeds": []}, "seeds"),
    ({"seeds": [1, 1]}, "each seed once"),
    ({"designers": {}}, "at least one designer"),
    ({"designers": {"a/b": {}}}, "'a/b' is no label"),
    ({"designers": {"..": {}}}, "'..' is no label"),
    ({"designers": {"a": {"candidates": 3}}}, "'candidates' cannot differ between designers; it is the same for all"),
    ({"designers": {"a": {"desinger": "random"}}}, "did you mean 'designer'"),
    ({"designers": {"a": {"designer": "randm"}}}, "did you mean 'random'"),
    ({"designers": {"a": {"designer": "lacer"}}}, "needs an LLM"),
    ({"envs": {"e": {"designer": "random"}}}, "'designer' cannot differ between envs"),
    ({"envs": {"e": {"env": "lacer/KnownSource-v0"}}}, "did you mean 'lacer/KnownSources-v0'"),
    ({"base": {**TINY, "candidats": 1}}, "did you mean 'candidates'"),
    ({"base": {**TINY, "designer_kwargs": {"populaton": 3}}}, "has no option 'populaton'"),
    ({"designers": {"random": {"designer": "random"}, "darts": {"designer": "darts"}}},
     "budgets would not be equal.*max_env_steps: 2560"),
    ({"designers": {"random": {"designer": "random"}, "darts": {"designer": "darts"}},
      "base": {**TINY, "max_env_steps": 5000}}, "less than max_env_steps"),
])
def test_wrong_comparison(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    data = {"base": dict(TINY), "seeds": [0, 1], "designers": {"evolution": {"designer": "evolution"}}, **change}
    with pytest.raises(LacerError, match=message):
        run_comparison(validate_as(ComparisonConfig, data, "my.yaml"), tmp_path / "c")
    assert not (tmp_path / "c").exists()


FILES = sorted(p for folder in ("comparisons", "ablations")
               for p in (Path(configs.__file__).parent / folder).glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_shipped_comparisons_are_whole_and_planned(path: Path) -> None:
    from lacer.search.estimate import Speed, describe, figures

    data = read_yaml(path)
    if "llm" in data["base"]:
        data["base"] |= {"llm": "openai:x", "llm_base_url": "http://127.0.0.1:9/v1"}
    data["seeds"] = data["seeds"][:2]
    planned = plan_comparison(validate_as(ComparisonConfig, data, path.name))
    plans = [(s.name, p) for s, p in zip(planned.searches, planned.plans, strict=True)]
    assert len(plans) == 2 * len(data["designers"])
    assert len({s.folder(Path("x")) for s in planned.searches}) == len(plans)
    speed = Speed(100.0, 1.0, 50.0, 2.0)
    total = figures(plans, [speed] * len(plans))["total"]
    base = planned.searches[0].config
    assert 0 < total["candidates"] <= len(plans) * base.candidates
    assert total["steps"] == total["candidates"] * base.protocol.steps
    assert total["hours"] > 0
    assert (total["tokens"] > 0) == ("llm" in data["base"])
    assert "Candidates:" in describe(plans, [None] * len(plans))


def test_quick_has_enough_seeds() -> None:
    from lacer.agents.stats import least_p

    data = read_yaml("quick", "comparisons")
    assert len(data["designers"]) == 3
    assert least_p([len(data["seeds"])] * 3) < 0.05 <= least_p([len(data["seeds"]) - 1] * 3)


# -- runs with a function, from files ---


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs with a function, two seeds of two designers."""
    folder = tmp_path_factory.mktemp("plain")
    for name, seed in itertools.product(("random", "evolution"), range(2)):
        search(space=SPACE, objective=helper_objectives.smooth, designer=name, seed=seed, candidates=6, quiet=True,
               out=folder / f"{name}-{seed}")
    return folder


def test_finished_runs_from_the_command_line(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in plain.rglob("*")}
    runs = map(str, sorted(plain.iterdir()))
    code, out, err = run(["compare", *runs, "--out", str(tmp_path / "c"), "--json"], capsys)
    assert code == 0, err
    assert {p: p.stat().st_mtime_ns for p in plain.rglob("*")} == before, "the runs were only read"
    data = json.loads(out)
    assert data["designers"] == ["evolution", "random"]
    assert [r["seeds"] for r in data["ranking"]] == [2, 2]
    best = {r["run"]: r["final_score"] for r in data["searches"]}
    for path in plain.iterdir():
        values = [t.trial.objective for t in read_run(path).trials]
        assert best[str(path)] == max(v for v in values if v is not None)
    folder = tmp_path / "c"
    for name in ("best_so_far", "final", "profiles"):
        assert (folder / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert "<svg" in (folder / f"{name}.svg").read_text()
    assert len(pd.read_csv(folder / "candidates.csv")) == 24
    assert json.loads((folder / "summary.json").read_text())["says"] == data["says"]
    page = (folder / "comparison.html").read_text()
    assert "<script" not in page
    assert not re.search(r"https?://(?!www\.w3\.org)", page)
    assert page.count("data:image/svg+xml;base64,") == 3
    for said in data["says"]:
        assert said.split(";")[0] in (folder / "summary.md").read_text()
    code, _, err = run(["compare", str(plain / "random-0"), "--out", str(folder)], capsys)
    assert (code, "exists already" in err) == (2, True)


def test_labels_and_patterns(plain: Path) -> None:
    found = find_runs([f"old={plain}/random-*", f"new={plain}/evolution-[0]", str(plain / "evolution-1")])
    assert [e.label for e in found] == ["old", "old", "new", "evolution"]
    with pytest.raises(LacerError, match="is given twice"):
        find_runs([str(plain / "random-0"), f"x={plain}/random-0"])
    with pytest.raises(LacerError, match="there is no such folder"):
        find_runs([f"x={plain}/nothing-*"])


def test_runs_that_cannot_be_read(plain: Path, tmp_path: Path) -> None:
    def broken(name: str, change: Callable[[Path], object]) -> Path:
        folder = tmp_path / name
        shutil.copytree(plain / "random-0", folder)
        change(folder)
        return folder

    def config(**changes: Any) -> Callable[[Path], object]:
        def write(f: Path) -> None:
            text = (f / "config.yaml").read_text()
            data = {**yaml.safe_load(text), **changes}
            (f / "config.yaml").write_text(yaml.safe_dump(data) + text.splitlines(keepends=True)[-1])
        return write

    def sql(statement: str) -> Callable[[Path], object]:
        def write(f: Path) -> None:
            import sqlite3

            with sqlite3.connect(f / "study.db") as db:
                db.execute(statement)
        return write

    cases: list[tuple[Callable[[Path], object], str]] = [
        (shutil.rmtree, "there is no such folder"),
        (lambda f: (f / "config.yaml").unlink(), "only the beginning of one"),
        (lambda f: (f / "config.yaml").write_bytes((f / "config.yaml").read_bytes()[:-9]), "config.yaml is damaged"),
        (config(levels_of_old=1), "was made by lacer .*unknown key 'levels_of_old'"),
        (lambda f: (f / "study.db").unlink(), "half-written: it has no study.db yet"),
        (lambda f: (f / "study.db").write_bytes(b"SQLite format 3\0" + b"x" * 5000), "study.db is damaged"),
        (lambda f: (f / "study.db").write_bytes(b""), "holds no study"),
        (sql("DELETE FROM study_user_attributes WHERE key = 'finished'"), "is not finished .6 candidates.*--resume"),
        (sql("DELETE FROM trials"), "no candidate with a result.*it has no trials"),
        (sql("UPDATE trial_user_attributes SET value_json = '{\"reward\": 1, \"status\": \"good\"}' WHERE key = "
             "'evaluation'"), "holds evaluations that this version cannot read"),
    ]
    for i, (change, message) in enumerate(cases):
        folder = broken(f"run{i}", change)
        with pytest.raises(LacerError, match=message) as error:
            find_runs([str(folder)])
        assert str(folder) in str(error.value)


@pytest.mark.parametrize(("args", "message"), [
    ([], "give either a comparison's file"),
    (["quik"], "did you mean 'quick'"),
    (["quick", "nowhere.yaml"], "is no run folder"),
    (["quick", "--seeds", "a"], "--seeds 'a': numbers"),
    (["quick", "--designers", "randm"], "did you mean 'random'"),
    (["quick", "--allow", "env"], "--allow is for finished runs"),
    (["quick", "--base.candidates", "0"], "candidates"),
    (["."], "is no run: it has no config.yaml"),
    ([".", "--seeds", "1"], "--seeds is for a comparison that is to be run"),
    (["--resume", "."], "is no comparison"),
])
def test_wrong_command_line(args: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(["compare", *args], capsys)
    assert (code, out) == (2, "")
    assert message in err
    assert not list(tmp_path.iterdir())


def test_hostile_names_are_inert(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>|$x_2$"
    c = compare_runs([Entry("", evil, built([0.1], seed=s)) for s in range(2)], tmp_path / "c")
    page, text = (c.folder / "comparison.html").read_text(), (c.folder / "summary.md").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "\\<script\\>" in text


@pytest.mark.slow
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    """Nothing is loaded, nothing is wider than the window, from a phone to a large screen."""
    runs = [Entry("", label, built([0.1, 0.3 * s], seed=s)) for label in ("random", "a" * 60) for s in range(5)]
    page = (compare_runs(runs, tmp_path / "c").folder / "comparison.html").read_text()
    for width in (390, 1280, 2560):
        assert overflow(page, width, tmp_path / str(width))["page"] == 0, width


# -- really run -------------------------------------------------------------------------------------------------------


@register_designer
class Blind(RandomSearch):
    """Random, but never looks at the source that matters; for tests."""

    name: ClassVar[str] = "test-blind"

    def propose(self, study: Study, n: int) -> list[Proposal]:
        out: list[Proposal] = []
        rng = self.rng(study)
        while len(out) < n:
            point = study.space.sample(rng)
            if point["position.block"] == "unused" and study.seen(study.space.to_ncode(point)) is None:
                out.append(Proposal(point, self.name))
        return out


@register_designer
class Other(RandomSearch):
    """Random with other random numbers, so neither better nor worse; for tests."""

    name: ClassVar[str] = "test-other"

    def rng(self, study: Study) -> np.random.Generator:
        return np.random.default_rng([self.seed, len(study), 7])


BASE: dict[str, Any] = {
    "env": "lacer/KnownSources-v0", "env_kwargs": {"sources": ["position", "noise"]}, "candidates": 3,
    "text_model": "hash", "wandb": "off", "workers": 2, "expert_first": False, "final_steps": 1024,
    "final_episodes": 16, "space": {"vector:*.block": ["linear", "mlp", "unused"], "vector:*.mlp.width": [32, 64]},
    "protocol": {"steps": 512, "eval_episodes": 8, "ppo": {
        "n_envs": 16, "n_steps": 16, "learning_rate": 0.003, "gamma": 0.01, "gae_lambda": 0.0, "log_std_init": -1.0}}}


@pytest.mark.slow
def test_a_planted_difference_in_real_trainings(tmp_path: Path) -> None:
    """Three designers, five seeds: that which was made worse is found, the two that are alike are not told apart."""
    config = ComparisonConfig(base=BASE, designers={
        "random": {"designer": "random"}, "blind": {"designer": "test-blind"}, "other": {"designer": "test-other"}})
    c = run_comparison(config, tmp_path / "c", quiet=True)
    first, second, third = statements(c)
    assert first.startswith("random is better than blind")
    assert second.startswith("other is better than blind")
    assert third == "The other pairs cannot be told apart."
    assert list(c.ranking["designer"])[-1] == "blind"
    assert c.ranking.set_index("designer").loc["blind", "high"] < 0.2, "nothing can be gained without the source"
    assert c.searches["final_expert"].notna().all()
    first = read_run(tmp_path / "c" / "runs" / "random-0")
    chosen = {s for t in first.results for s in (t.trial.evaluation or Evaluation()).episode_seeds}
    assert not chosen & set(first.finals["winner"].episode_seeds), "reported on other episodes than it was chosen by"
    assert read_comparison(tmp_path / "c").seeds == (0, 1, 2, 3, 4)


def state(folder: Path) -> dict[str, list[tuple[Any, ...]]]:
    out = {}
    for path in sorted((folder / "runs").iterdir()):
        run = read_run(path)
        out[path.name] = [(t.trial.ncode, t.trial.objective) for t in run.trials] + [
            (n, e.objective) for n, e in run.finals.items()]
    return out


@pytest.mark.slow
def test_killed_and_gone_on_with_by_two_at_once(tmp_path: Path, start: Start, lacer: Lacer) -> None:
    """A search that was finished is taken over, the one that was killed goes on; the result is that of one in peace."""
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"base": {**BASE, "workers": 1}, "seeds": [0, 1], "designers": {
        "random": {"designer": "random"}, "evolution": {"designer": "evolution"}}}, sort_keys=False))
    whole = lacer("compare", path, "--out", tmp_path / "whole", timeout=300)
    assert whole.returncode == 0, whole.stderr
    assert re.search(r"\[4/4\] evolution-1: winner #\d, final score .*steps/s\]", whole.stderr)
    assert "Page:" in whole.stdout
    folder = tmp_path / "killed"
    process = start("compare", path, "--out", folder)
    end = time.monotonic() + 400
    while not (folder / "runs" / "evolution-0" / "study.db").exists():
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1.5)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert read_run(folder / "runs" / "random-0").finished
    kept = (folder / "runs" / "random-0" / "study.db").read_bytes()
    watched = lacer("watch", folder / "runs" / "evolution-0")
    assert watched.returncode == 1
    assert "No process of this machine is working on it" in watched.stdout
    two = [start("compare", "--resume", folder, "--quiet") for _ in range(2)]
    while not is_compared(folder):
        assert time.monotonic() < end
        time.sleep(0.05)
    follow = start("watch", folder)
    for p in two:
        out, err = p.communicate(timeout=300)
        assert p.returncode == 0, err
        assert not err
        assert "Page:" in out
    shown, err = follow.communicate(timeout=60)
    assert follow.returncode == 0, err
    assert shown.splitlines()[-1] == "All 4 searches are finished."
    assert (folder / "runs" / "random-0" / "study.db").read_bytes() == kept
    assert state(folder) == state(tmp_path / "whole")
    again = lacer("compare", path, "--out", folder)
    assert again.returncode == 2
    assert "lacer compare --resume" in again.stderr
    more = lacer("compare", "--resume", folder, "--base.protocol.steps", 99)
    assert "base.protocol cannot change" in more.stderr


@pytest.mark.slow
def test_quick_preset_begins(tmp_path: Path, lacer: Lacer) -> None:
    done = lacer("compare", "quick", "--seeds", "0", "--designers", "random,evolution", "--base.candidates", 2,
                 "--base.protocol.steps", 256, "--base.final-steps", 256, "--out", tmp_path / "c", "--json", "--quiet",
                 timeout=200)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["says"] == ["A designer with a single search cannot be told from another."]
    assert not done.stderr
    assert set(presets("comparisons")) == {"llm", "paper", "quick"}
    exported = subprocess.run(
        f"{sys.executable} -P -m lacer.search.cli export {tmp_path / 'c'} | head -2", shell=True, capture_output=True,
        text=True, check=False)
    assert exported.stdout.startswith("environment,designer_label,search_seed,number,status")
    assert not exported.stderr


def test_a_field_that_is_taken_out_has_its_default() -> None:
    def config(**base: Any) -> ComparisonConfig:
        return ComparisonConfig(base={"env": "lacer/KnownSources-v0", **base}, designers={"r": {"designer": "random"}})

    changes = _check_changes(config(timeout=600), config())
    assert changes == {"timeout": SearchConfig(env="lacer/KnownSources-v0").timeout}
