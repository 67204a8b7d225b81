"""Designers over tables: reading them, playing, resuming, statistics, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lacer.envs import LacerError
from lacer.search import Decision, SearchSpace
from lacer.search.bench import bench, play
from lacer.search.cli import main
from lacer.search.config import BenchConfig
from lacer.search.designers.base import make_plain
from lacer.search.space import TableSpace
from lacer.search.tables import ListedSpace, read_table

DATA = Path(__file__).parents[2] / "benchmarks" / "data"
MACRO = str(DATA / "nasbench_macro.csv.gz")
SPACE = SearchSpace([Decision("a", (0, 1, 2, 3)), Decision("b", (0, 1, 2, 3)), Decision("c", (0, 1, 2, 3))])


def product(point: dict[str, Any]) -> float:
    """A function to search; some points fail."""
    if point["a"] == 3:
        raise ValueError("no such thing")
    return point["a"] * 4 + point["b"] - point["c"]


def table(tmp_path: Path, text: str, name: str = "t.csv") -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_reads_strings_with_leading_zeros() -> None:
    t = read_table(MACRO, score="mean_acc")
    assert isinstance(t.space, TableSpace)
    assert len(t.scores) == t.space.size() == 3 ** 8
    code = t.space.to_ncode(t.space.from_string("00000000"))
    frame = pd.read_csv(MACRO, dtype={"arch": str})
    assert t.reported[code] == float(frame[frame.arch == "00000000"].mean_acc.iloc[0])
    assert t.ordered[0] == t.reported[t.space.to_ncode(t.space.from_string("22212202"))] == frame.mean_acc.max()


def test_score_that_guides_and_score_that_is_reported() -> None:
    t = read_table(MACRO, score="acc1", test_score="mean_acc")
    run = play(make_plain("random", 0), t, 40, 0, "random")
    assert run.score != run.reported
    chosen = int(np.argmax(np.array(run.score, float)))
    assert run.best[-1] == run.reported[chosen], "chosen by the one, reported by the other"


def test_conditional_length() -> None:
    t = read_table(DATA / "tnb101_macro_val.csv.gz", score="class_scene", variable_length=True)
    assert t.space.size() == 3256
    for name in ("evolution", "optuna:TPESampler"):
        assert len(set(play(make_plain(name, 0), t, 30, 0, name).ncode)) == 30


def test_repeated_measurements(tmp_path: Path) -> None:
    rows = "".join(f"{a},{s},{10 * int(a) + s}\n" for a in ("0", "1", "2") for s in range(3))
    t = read_table(table(tmp_path, "arch,seed,score\n" + rows), repeated=True)
    assert sorted(t.reported.values()) == [1, 11, 21]
    drawn = {tuple(sorted(zip(r.ncode, r.score, strict=True))) for r in (
        play(make_plain("random", s), t, 3, s, "random") for s in range(8))}
    assert len(drawn) > 1, "runs draw other measurements"


def test_columns_and_bins() -> None:
    arch = ["clip_eps", "learning_rate", "minibatch_size", "normalize_advantage"]
    t = read_table(DATA / "arlbench_ppo.csv.gz", arch, "performance", where={"env": "brax_ant"}, bins=4, rank=True)
    assert [len(d.options) for d in t.space.decisions] == [4, 4, 3, 2], "three of four quarters of the sizes differ"
    assert sum(len(v) for v in t.scores.values()) == 960, "every run is there"
    assert min(t.ordered) >= 0
    assert max(t.ordered) <= 1
    assert isinstance(t.space, ListedSpace)
    points = list(t.space.points())
    assert {t.space.to_ncode(p) for p in points} == set(t.scores)
    rng = np.random.default_rng(0)
    for point in points[:20]:
        near = t.space.mutate(point, rng)
        assert t.space.check(near) == near != point


def test_neighbours_in_a_full_list_differ_in_one_decision() -> None:
    listed = ListedSpace(SPACE.decisions, [SPACE.to_ncode(p) for p in SPACE.points()])
    rng, point = np.random.default_rng(0), {"a": 0, "b": 1, "c": 2}
    seen = {listed.to_ncode(listed.mutate(point, rng)) for _ in range(300)}
    assert len(seen) == 9
    assert all(sum(x != y for x, y in zip(c.split("."), ["0", "1", "2"], strict=True)) == 1 for c in seen)


@pytest.mark.parametrize(("text", "options", "message"), [
    ("arch,acc\n00,1\n", {}, r"no column 'score'.* Columns: arch, acc"),
    ("arch,scores\n00,1\n", {}, r"no column 'score'.*did you mean 'scores'"),
    ("arch,score\n00,1\n01,2\n00,3\n", {}, r"rows 2 and 4 hold the same architecture \(00\).*--repeated"),
    ("arch,score\n00,1\n010,2\n", {}, r"row 3: the architecture '010' has 3 places, those before .* 2.*--variable"),
    ("arch,score\n00,1\n01,nan\n", {}, r"row 3: score is 'nan', not a finite number \(1 such"),
    ("arch,score\n00,1\n01,\n", {}, r"row 3: score is ''"),
    ("arch,score\n00,1\n01,inf\n", {}, r"row 3: score is 'inf'"),
    ("arch,score\n00,good\n01,bad\n", {}, r"row 2: score is 'good', not a finite number \(2 such"),
    ("arch,score\n00,1\n,2\n", {}, r"row 3: arch is empty"),
    ("arch,score\n", {}, "has no rows"),
    ("", {}, "cannot read the table"),
    ("arch,score,task\n00,1,x\n01,2,y\n", {"where": {"task": "z"}}, r"no row with task=z.*Values: x, y"),
    ("arch,score,task\n00,1,x\n00,2,y\n01,2,x\n", {}, r"several tasks.*--where"),
    ("arch,score,task\n00,1,x\n", {"where": {"tsk": "z"}}, "did you mean 'task'"),
])
def test_bad_tables(tmp_path: Path, text: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(LacerError, match=message):
        read_table(table(tmp_path, text), **options)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(LacerError, match=r"cannot read the table nowhere\.csv"):
        read_table("nowhere.csv")


def test_pruned_subspaces() -> None:
    t = read_table(MACRO, score="mean_acc")
    for seed in range(10):
        small = t.pruned(np.random.default_rng(seed))
        options = [{c.split(".")[i] for c in small.scores} for i in range(8)]
        assert 2 <= len(small.scores) == np.prod([len(o) for o in options]) < 3 ** 8
        assert all(small.reported[c] == t.reported[c] for c in small.reported)


def test_a_worse_designer_is_found_and_a_twin_is_not(tmp_path: Path) -> None:
    config = BenchConfig(table=MACRO, score="mean_acc", designers="evolution,random", budget=60, seeds=20, workers=1)
    result = bench(config, tmp_path / "out", quiet=True)
    [pair] = result.pairs[60]
    assert pair.better == "evolution"
    assert pair.low > 0
    twin = bench(config.model_copy(update={"designers": "random", "seed": 20}), tmp_path / "twin", quiet=True)
    from lacer.agents.stats import compare

    [same] = compare({"first": result.curves("random")[:, -1], "second": twin.curves("random")[:, -1]})
    assert same.better == ""

    frame = pd.read_parquet(tmp_path / "out" / "results.parquet")
    assert list(frame.columns) == ["designer", "seed", "evaluation", "ncode", "score", "reported", "best"]
    assert len(frame) == 2 * 20 * 60
    for _, run in frame.groupby(["designer", "seed"]):
        np.testing.assert_allclose(run["best"], run["score"].cummax())
    curves = pd.read_csv(tmp_path / "out" / "curves.csv")
    last = frame[frame.evaluation == 60].groupby("designer")["best"].mean()
    row = curves[(curves.designer == "evolution") & (curves.evaluation == 60)].iloc[0]
    assert row["mean"] == pytest.approx(last["evolution"])
    assert row["low"] < row["mean"] < row["high"]
    assert row["regret"] == pytest.approx(frame_best() - row["mean"])
    quantiles = pd.read_csv(tmp_path / "out" / "quantiles.csv")
    assert list(quantiles["quantile"].unique()) == [0.9, 0.99, 0.999, 1.0]
    assert quantiles["level"].max() == pytest.approx(frame_best())
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "evolution is better" in text
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000


def frame_best() -> float:
    return float(pd.read_csv(MACRO, dtype={"arch": str}).mean_acc.max())


def test_goes_on_and_refuses_another_comparison(tmp_path: Path) -> None:
    config = BenchConfig(table=MACRO, score="mean_acc", designers="random", budget=20, seeds=4, workers=1)
    first = bench(config, tmp_path, quiet=True)
    parts = {p: p.stat().st_mtime_ns for p in (tmp_path / "parts").iterdir()}
    more = bench(config.model_copy(update={"seeds": 6, "designers": "random,evolution"}), tmp_path, quiet=True)
    assert all(p.stat().st_mtime_ns == t for p, t in parts.items()), "nothing is played twice"
    np.testing.assert_array_equal(more.curves("random")[:4], first.curves("random"))
    assert more.curves("evolution").shape == (6, 20)
    whole = bench(config.model_copy(update={"seeds": 6}), tmp_path / "whole", quiet=True)
    np.testing.assert_array_equal(whole.curves("random"), more.curves("random"))
    with pytest.raises(LacerError, match="holds another comparison: budget was 20, now it is 30"):
        bench(config.model_copy(update={"budget": 30}), tmp_path, quiet=True)


@pytest.mark.slow
def test_processes_play_the_same(tmp_path: Path) -> None:
    config = BenchConfig(table=MACRO, score="mean_acc", designers="evolution", budget=20, seeds=4, workers=2)
    two = bench(config, tmp_path / "two", quiet=True)
    one = bench(config.model_copy(update={"workers": 1}), tmp_path / "one", quiet=True)
    np.testing.assert_array_equal(two.curves("evolution"), one.curves("evolution"))


def test_a_function_with_failures(tmp_path: Path) -> None:
    name = f"{__name__}"
    config = BenchConfig(function=f"{name}:product", space=f"{name}:SPACE", designers="random,evolution", budget=64,
                         seeds=3, workers=1)
    result = bench(config, tmp_path, quiet=True)
    assert {r.best[-1] for r in result.runs} == {11.0}, "the whole space was seen"
    assert {len(r.ncode) for r in result.runs} == {64}
    assert all(sum(s is None for s in r.score) == 16 for r in result.runs)
    low = bench(config.model_copy(update={"minimize": True}), tmp_path / "low", quiet=True)
    assert {r.best[-1] for r in low.runs} == {-3.0}


@pytest.mark.parametrize(("options", "message"), [
    (["--designers", "random,evolutoin"], "did you mean 'evolution'"),
    (["--designers", "random,random"], "none twice"),
    (["--designers", "lm-searcher"], "needs an LLM"),
    (["--designers", "random,lacer"], "searches encoders"),
    (["--designers", "darts"], "searches encoders"),
    (["--budget", "0"], "--budget"),
    (["--budget", "10", "--checkpoints", "5,20"], "between 1 and the budget"),
    (["--checkpoints", "a"], "numbers of evaluations"),
    (["--score", "mean_ac"], "did you mean 'mean_acc'"),
    (["--function", "x:y"], "either --table"),
    (["--bugdet", "3"], "did you mean '--budget'"),
])
def test_wrong_options(capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str], message: str) -> None:
    given = ["bench", "--table", MACRO, "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as e:
        main([*given, *([] if "--score" in options else ["--score", "mean_acc"]), *options])
    assert e.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists(), "nothing was begun"


def test_command_line_prints_figures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["bench", "--table", MACRO, "--score", "mean_acc", "--designers", "random", "--budget", "10", "--seeds", "3",
          "--workers", "1", "--prune-seeds", "--out", str(tmp_path / "out"), "--json"])
    got = json.loads(capsys.readouterr().out)
    assert got["optimum"] == 1.0
    assert got["designers"]["random"]["10"]["mean"] <= 1


def test_names_that_pandas_takes_for_nothing(tmp_path: Path) -> None:
    path = table(tmp_path, "act,norm,score\nrelu,None,1\nrelu,NA,2\ntanh,None,3\n")
    t = read_table(path, ["act", "norm"])
    assert [d.options for d in t.space.decisions] == [("relu", "tanh"), ("NA", "None")]
    with pytest.raises(LacerError, match="row 2: norm is empty"):
        read_table(table(tmp_path, "act,norm,score\nrelu,,1\n", "u.csv"), ["act", "norm"])


def test_bins_of_a_single_column(tmp_path: Path) -> None:
    rows = "".join(f"{i},{i % 7}\n" for i in range(60))
    t = read_table(table(tmp_path, "x,score\n" + rows), ["x"], bins=4, repeated=True)
    assert t.space.size() == 4
