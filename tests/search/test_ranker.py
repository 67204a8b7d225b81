"""The ranker's network, its training and its weights; the designer's contract is tested with those of the others."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from torch.nn import functional

from lacer.agents import Evaluation
from lacer.agents.evaluation import Cost
from lacer.envs import LacerError
from lacer.search import cli
from lacer.search.bench import play
from lacer.search.designers.base import make_plain
from lacer.search.designers.bo import normal_scores
from lacer.search.designers.ranker import HISTORY, RankerDesigner, digest, measurements
from lacer.search.ranker import model as network
from lacer.search.ranker.histories import Batch, Scale, draw_episodes, draw_queries, simulate, to_batch
from lacer.search.ranker.model import TRUST, Ranker, Size
from lacer.search.ranker.settings import Training
from lacer.search.ranker.synthetic import FAMILIES, Task, make_shape, make_task
from lacer.search.ranker.train import judge, train
from lacer.search.ranker.weights import FORMAT, SHIPPED, load, parameters, save, shipped
from lacer.search.space import Decision, SearchSpace
from lacer.search.study import Proposal, Study
from lacer.search.tables import read_table

TINY = Training(steps=16, tokens=160, queries=24, longest=16, width=16, layers=1)
DATA = Path(__file__).parents[2] / "benchmarks" / "data"


def a_batch(channels: int = 0, seed: int = 0, n: int = 20) -> Batch:
    rng = np.random.default_rng(seed)
    episodes = draw_episodes(rng, 3, n, channels=channels)
    return to_batch(episodes, [draw_queries(e, rng, 24) for e in episodes], rng)


def shaken() -> Ranker:
    """A network with random weights in which every part counts; at first most are near zero."""
    torch.manual_seed(0)
    model = Ranker().eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(0.05 * torch.randn_like(p))
    return model


def test_the_kernel_is_fitted_to_the_history(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    n, d = 40, 3
    codes = torch.as_tensor(rng.integers(0, 3, size=(1, n, d)))
    counts = functional.one_hot(codes, 3).double().mean(2)
    line = torch.full((1, d), 1 / d, dtype=torch.float64)
    z = torch.as_tensor(normal_scores((codes[0, :, 0] == 1).numpy() + 0.3 * rng.normal(size=n)))[None]
    centre = torch.log(torch.tensor([[0.5, 0.4, 0.4, 0.1, 4.0, *[0.9] * d]], dtype=torch.float64))
    same = (codes[0, :, None] == codes[0, None]).numpy()
    far = ((counts[0, :, None] - counts[0, None]) ** 2).sum(2).numpy()

    def posterior(log: Any) -> float:
        a, b, c, noise, scale = np.exp(log[:5])
        covariance = a * np.exp(-((~same) * np.exp(log[5:])).sum(2)) + b * same.mean(2) + c * np.exp(-scale * far)
        density = multivariate_normal(np.zeros(n), covariance + (noise + 5e-3) * np.eye(n)).logpdf(z[0].numpy())
        return float(density - 0.5 * (((log - centre[0].numpy()) / TRUST) ** 2).sum())

    best = minimize(lambda log: -posterior(log), centre[0].numpy()).x
    found = network.fit(centre, codes, line, counts, z)[0].numpy()
    monkeypatch.setattr(network, "ROUNDS", 30)
    np.testing.assert_allclose(network.fit(centre, codes, line, counts, z)[0].numpy(), best, atol=2e-3)
    gained = posterior(found) - posterior(centre[0].numpy())
    assert gained > 0.8 * (posterior(best) - posterior(centre[0].numpy())) > 0.5, "two rounds go most of the way"
    assert best[5] > best[6:].max(), "the decision that counts"


@pytest.mark.parametrize("channels", [0, 3])
def test_renaming_options_and_decisions_changes_nothing(channels: int) -> None:
    model = shaken()
    for seed in range(3):
        b, rng = a_batch(channels, seed), np.random.default_rng(seed)
        order = torch.as_tensor(rng.permutation(b.codes.shape[2]))
        codes, queries = b.codes.clone(), b.queries.clone()
        for task in range(len(codes)):
            names: dict[tuple[int, ...], torch.Tensor] = {}
            for d, size in enumerate(b.sizes[task].tolist()):
                group = tuple(b.member[task, :, d].gt(0).tolist())  # those that share options are renamed alike
                new = torch.as_tensor(np.append(rng.permutation(size), size))
                new = names.setdefault(group, new) if any(group) else new
                codes[task, :, d], queries[task, :, d] = new[codes[task, :, d]], new[queries[task, :, d]]
        renamed = dataclasses.replace(b, codes=codes[:, :, order], queries=queries[:, :, order],
                                      member=b.member[:, :, order].flip(1), sizes=b.sizes[:, order])
        with torch.no_grad():
            p, q = model(b), model(renamed)
        assert p.mean.std() > 0.1
        for x, y in ((p.mean, q.mean), (p.deviation, q.deviation), (p.weight, q.weight), (p.top, q.top)):
            torch.testing.assert_close(x, y, atol=2e-3, rtol=2e-3)


def test_the_order_of_history_and_candidates_does_not_matter() -> None:
    b, model = a_batch(2), shipped()
    turned = dataclasses.replace(b, codes=b.codes.flip(1), z=b.z.flip(1), channels=b.channels.flip(1),
                                 present=b.present.flip(1), queries=b.queries.flip(1))
    p, q = model(b), model(turned)
    torch.testing.assert_close(p.expected(), q.expected().flip(1), atol=2e-3, rtol=2e-3)
    alone = model(dataclasses.replace(b, queries=b.queries[:, :1]))
    torch.testing.assert_close(alone.expected(), p.expected()[:, :1], atol=2e-3, rtol=2e-3)


def test_a_missing_channel_is_ignored() -> None:
    b, model = a_batch(2), shaken()
    blind = dataclasses.replace(b, present=torch.zeros_like(b.present))
    other = dataclasses.replace(blind, channels=torch.randn_like(b.channels))
    torch.testing.assert_close(model(blind).mean, model(other).mean)
    assert (model(b).mean - model(blind).mean).abs().max() > 1e-3


def test_mixtures_are_distributions() -> None:
    p = shipped()(a_batch())
    torch.testing.assert_close(p.weight.sum(-1), torch.ones(p.weight.shape[:2]))
    at = torch.linspace(-12, 14, 4001)
    for i in range(3):
        one = dataclasses.replace(p, **{k: getattr(p, k)[:1, i:i + 1].expand(1, len(at), -1)
                                        for k in ("weight", "mean", "deviation")})
        density = one.log_density(at[None]).exp()[0]
        assert float(torch.trapezoid(density, at)) == pytest.approx(1, abs=0.02)
        assert float(torch.trapezoid(density * at, at)) == pytest.approx(float(one.expected()[0, 0]), abs=0.03)
        gain = torch.trapezoid(density * (at - 1).clamp(min=0), at)
        assert float(one.improvement(torch.ones(1, 1))[0, 0]) == pytest.approx(float(gain), abs=0.01)
        below = float(torch.trapezoid(density * (at < 0.3), at))
        assert float(one.below(torch.tensor([[0.3]]).expand(1, len(at)))[0, 0]) == pytest.approx(below, abs=0.02)


def test_a_wider_prediction_has_the_same_mean() -> None:
    p = shipped()(a_batch())
    wide = p.wider(2.0)
    torch.testing.assert_close(wide.expected(), p.expected())
    torch.testing.assert_close(wide.spread(), 2 * p.spread())


def test_scale_is_monotone_and_keeps_normal_scores() -> None:
    y = np.array([3.0, 1.0, 2.0, 2.0, 10.0])
    scale = Scale(y)
    assert np.allclose(scale(y), scale.z)
    assert (np.diff(scale(np.linspace(-50, 50, 300))) >= 0).all()
    assert scale(np.array([1e9]))[0] == pytest.approx(scale.z.max() + 2.5)
    assert (Scale(np.ones(4))(np.array([0.0, 1.0, 5.0])) == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_finite_and_not_constant(family: str) -> None:
    for seed in range(4):
        rng = np.random.default_rng(seed)
        task = make_task(rng, make_shape(rng, 6, 4, prune=False), 2, (family,))
        y = task.score(task.sample(rng, 400))
        assert np.isfinite(y).all()
        assert 0.3 < y.std() < 3
        assert len(task.channels) == 2


def test_histories_stay_in_their_space() -> None:
    for seed in range(12):
        rng = np.random.default_rng(seed)
        shape = make_shape(rng, 7, 4)
        task: Task = make_task(rng, shape)
        for kind in ("random", "evolution", "gp", "mixed"):
            codes, y, luck = simulate(task, rng, 25, kind)
            assert codes.shape == (25, 7)
            np.testing.assert_allclose(y, task.score(codes) + luck)
            for d in range(7):
                above = codes[:, shape.parent[d]]
                asked = (np.ones(25, bool) if shape.parent[d] < 0 else (above < shape.sizes[shape.parent[d]])
                         & shape.on[d][np.minimum(above, shape.on.shape[1] - 1)])
                assert (codes[~asked, d] == shape.sizes[d]).all()
                assert shape.allowed[d][codes[asked, d]].all()


def test_training_is_reproducible_and_resumes(tmp_path: Path) -> None:
    lines: list[str] = []
    train(TINY, tmp_path / "a", every=8, say=lines.append)
    assert len(lines) == 2
    with pytest.raises(LacerError, match="holds a training already"):
        train(TINY, tmp_path / "a")
    with pytest.raises(LacerError, match="its number of updates is fixed"):
        train(dataclasses.replace(TINY, steps=24), tmp_path / "a", resume=True)
    with pytest.raises(LacerError, match="other settings"):
        train(dataclasses.replace(TINY, seed=1), tmp_path / "a", resume=True)
    with pytest.raises(LacerError, match="no training to resume"):
        train(TINY, tmp_path / "c", resume=True)

    class Killed(Exception):
        pass

    def stop(_: str) -> None:
        raise Killed

    with pytest.raises(Killed):
        train(TINY, tmp_path / "d", every=8, say=stop)
    train(TINY, tmp_path / "d", every=8, resume=True, say=lines.append)
    made, again = ((tmp_path / name / "weights.safetensors").read_bytes() for name in "ad")
    assert made == again
    assert list((tmp_path / "a").glob("events.*"))


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--steps", "4", "--width", "16", "--layers", "1", "--longest", "6"]
    cli.main(["ranker", "train", "--out", str(tmp_path / "r"), *options])
    assert capsys.readouterr().out.strip().endswith("weights.safetensors")
    d = RankerDesigner(0, weights=str(tmp_path / "r" / "weights.safetensors"))
    assert parameters(d.network) < parameters(shipped())
    capsys.readouterr()
    for wrong, says in ((["--steps", "0"], "must be at least 1"), (["--stepps", "4"], "--steps"),
                        (["--without", "cel"], "did you mean 'cell'?"), (["--without", ",".join(FAMILIES)], "nothing")):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["ranker", "train", "--out", str(tmp_path / "s"), *wrong])
        assert says in capsys.readouterr().err
    without = ["--without", "cell,pairs", "--no-prune"]
    cli.main(["ranker", "train", "--out", str(tmp_path / "t"), *options, *without])
    assert json.loads((tmp_path / "t" / "settings.json").read_text())["without"] == ["cell", "pairs"]
    cli.main(["ranker", "train", "--out", str(tmp_path / "t"), *options, *without, "--resume"])
    with pytest.raises(SystemExit, match="2"):
        cli.main(["ranker", "train", "--out", str(tmp_path / "t"), *options, "--resume"])
    assert "other settings" in capsys.readouterr().err


def test_weights_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save(Ranker(Size(width=16, layers=1)), path, {})
    assert load(path).size.width == 16
    with pytest.raises(LacerError, match="not the ones that belong to this version"):
        load(path, sha256="0" * 64)
    with pytest.raises(LacerError, match="cannot read"):
        load(tmp_path / "none")
    path.write_bytes(b"no weights at all")
    with pytest.raises(LacerError, match="no safetensors"):
        load(path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, path, {"ranker": json.dumps({"format": "0"})})
    with pytest.raises(LacerError, match="version 0"):
        load(path)
    about = {"format": FORMAT, "size": dataclasses.asdict(Size())}
    save_file({"a": torch.zeros(2)}, path, {"ranker": json.dumps(about)})
    with pytest.raises(LacerError, match="does not fit"):
        load(path)


def test_shipped_weights() -> None:
    assert SHIPPED.stat().st_size < 8e6
    from safetensors import safe_open

    with safe_open(SHIPPED, "pt") as f:
        made_by = json.loads(f.metadata()["ranker"])["training"]
    assert made_by.pop("done") == made_by["steps"]
    defaults = json.loads(json.dumps(dataclasses.asdict(Training())))
    assert made_by == defaults, "`lacer ranker train` without options makes them"
    batches = [a_batch(0, 1000 + s, n) for s in range(6) for n in (12, 40)]
    found = judge(shipped(), batches)
    assert found["spearman"] > 0.4
    assert 0.7 < found["covered80"] < 0.9


def test_long_histories_are_digested() -> None:
    y, rng = np.random.default_rng(0).normal(size=5000), np.random.default_rng(1)
    kept = digest(y, rng)
    assert len(kept) == HISTORY
    assert (np.diff(kept) > 0).all()
    assert set(np.argsort(-y)[:50]) <= set(kept)
    assert set(range(4990, 5000)) <= set(kept)
    assert (digest(y[:30], rng) == np.arange(30)).all()


def test_what_is_measured_beside_the_score() -> None:
    space = SearchSpace([Decision("a", tuple(range(9)))])
    study = Study(space)
    for i in range(6):
        t = study.start(Proposal({"a": i}, "x"))
        study.finish(t.number, Evaluation(
            objective=float(i), curve=[(10, 0.0), (20, float(i % 2)), (30, 0.0), (40, float(i))],
            returns=[1.0, 1.0 + i], probes={"fused": {"linear_probe": float(-i), "srank": 1.0}},
            cost=Cost(parameters=10 + i))
            if i else Evaluation(objective=0.0))
    channels = measurements(study.finished, np.linspace(-1, 1, 6))
    assert channels.shape == (6, 5), "two points of the curve, the probe that varies, parameters, spread"
    assert np.isnan(channels[0]).all()
    assert measurements([], np.zeros(0)).shape == (0, 0)


def test_designer_options() -> None:
    with pytest.raises(LacerError, match="start must be at least 1"):
        RankerDesigner(0, start=0)
    space = SearchSpace([Decision(f"d{i}", (1, 2, 3)) for i in range(5)])
    with pytest.raises(LacerError, match="cannot read"):
        RankerDesigner(0, weights="none.safetensors").check_space(space)
    first = {}
    for acquisition in ("improvement", "top", "quantile", "thompson"):
        study, d = Study(space), make_plain("ranker", 3, acquisition=acquisition)
        for _ in range(16):
            [p] = d.propose(study, 1)
            study.finish(study.start(p).number, Evaluation(objective=float(sum((p.point or {}).values()))))
        assert study.best is not None
        assert float(study.best.objective or 0) >= 14
        first[acquisition] = [t.ncode for t in study.trials]
    assert first["improvement"] != first["thompson"]


def test_prediction_of_a_study() -> None:
    space = SearchSpace([Decision(f"d{i}", (0, 1, 2)) for i in range(6)])
    study, rng = Study(space), np.random.default_rng(0)
    for _ in range(30):
        point = space.sample(rng)
        t = study.start(Proposal(point, "x"))
        study.finish(t.number, Evaluation(objective=float(sum(point.values()))))
    points = [space.sample(rng) for _ in range(50)]
    d = RankerDesigner(0)
    p = d.predict(study, points)
    assert np.corrcoef(p.expected()[0].numpy(), [sum(q.values()) for q in points])[0, 1] > 0.85
    [proposal] = d.propose(study, 1)
    assert proposal.point is not None
    told = d.predict(study, [proposal.point])  # the same distribution as the proposal tells
    assert proposal.meta["predicted"] == pytest.approx([float(told.expected()[0, 0]), float(told.spread()[0, 0])],
                                                       abs=1e-3)


def test_finds_the_best_of_a_table() -> None:
    table = read_table(DATA / "nasbench_macro.csv.gz", score="mean_acc")
    ranker, random = ([float(play(make_plain(n, s), table, 24, s, n).best[-1] or 0) for s in range(3)]
                      for n in ("ranker", "random"))
    assert np.mean(ranker) > np.mean(random)


def test_tables_hand_over_what_they_hold() -> None:
    table = read_table(DATA / "composite_bench.parquet", ["ncode"], "objective", repeated=True)
    code = next(iter(table.scores))
    e = table.evaluation(code, 1)
    assert e.objective == table.scores[code][1]
    assert len(e.curve) == 8
    assert e.probes["fused"]["linear_probe"] > 0
    assert table.pruned(np.random.default_rng(0)).details
    assert read_table(DATA / "nasbench_macro.csv.gz", score="mean_acc").details == {}


@pytest.mark.slow
def test_proposals_are_quick() -> None:
    """60 ms with 200 trials, a second with 5,000, on one core; twice that, since others may be at work."""
    space = SearchSpace([Decision(f"d{i}", tuple(range(6))) for i in range(12)])
    for n, limit in ((200, 0.12), (5000, 2.0)):
        study, rng = Study(space), np.random.default_rng(0)
        for _ in range(n):
            t = study.start(Proposal(space.sample(rng), "x"))
            study.finish(t.number, Evaluation(objective=float(rng.normal())))
        d = RankerDesigner(0)
        d.propose(study, 1)
        start = time.process_time()
        for _ in range(5):
            d.propose(study, 1)
        assert (time.process_time() - start) / 5 < limit


