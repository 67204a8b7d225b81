"""Designers that train by themselves: the contract of designers, and what each one's paper says it does."""

from __future__ import annotations

import functools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lacer.agents import Evaluation, PPOConfig, Protocol, Training
from lacer.agents.ppo import Diverged, Progress
from lacer.agents.training import PARTS, Alphas, Session, SupernetPolicy, run_training, train_supernet
from lacer.encoders import EncoderSpec, TextTable
from lacer.encoders.supernet import DartsSupernet, SupernetOptions
from lacer.envs import LacerError, task_card
from lacer.search import Decision, SearchSpace, search
from lacer.search.controller import Controller
from lacer.search.designers.base import Designer, check_options, designer_class, designers, make_plain
from lacer.search.designers.darts import by_probability
from lacer.search.designers.pepnas import Individual, Population, crowding, fronts
from lacer.search.executors import Event, ProcessPool
from lacer.search.space import EncoderSpace
from lacer.search.storage import sqlite_url
from lacer.search.study import Proposal, StoredStudy, Study
from lacer.search.testing import DesignerConformance
from lacer.search.trainer import Trainer

TRAINING = [name for name, cls in designers().items() if cls.trains]
KWARGS = {"sources": ["position", "words", "noise"]}
CARD = task_card("lacer/KnownSources-v0", **KWARGS)
NARROW: dict[str, list[Any]] = {
    "position.block": ["linear", "mlp"], "words.block": ["sentence_mlp", "unused"], "noise.block": ["linear", "unused"],
    "*.linear.width": [8, 16], "*.mlp.width": [16], "*.mlp.depth": [1], "*.mlp.activation": ["relu"],
    "*.mlp.norm": [False], "*.*.dropout": [0.0], "*.sentence_mlp.width": [16], "*.sentence_mlp.depth": [1],
    "fusion.block": ["concat", "film"], "fusion.concat.width": [16], "fusion.concat.depth": [1],
    "fusion.concat.activation": ["relu"], "fusion.concat.norm": [False], "fusion.film.width": [16],
    "fusion.*.modality_dropout": [0.0]}
SPACE = EncoderSpace(CARD, NARROW)
PROTOCOL = Protocol(steps=256, eval_episodes=2, ppo=PPOConfig(
    n_envs=4, n_steps=16, batch_size=32, n_epochs=1, gamma=0.5, head=(16,)))
STEPS = 384
SMALL: dict[str, dict[str, Any]] = {"darts": {}, "enas": {"compared": 2, "episodes": 1, "rollout": 8},
                                    "pepnas": {"population": 4, "generations": 2, "episodes": 1}}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trainer(folder: Path | None = None, **kwargs: Any) -> Trainer:
    return Trainer("lacer/KnownSources-v0", PROTOCOL, **{
        "steps": STEPS, "env_kwargs": KWARGS, "text_model": "hash", "folder": folder, **kwargs})


def make(name: str, seed: int, **kwargs: Any) -> Any:
    return make_plain(name, seed, trainer=trainer(**kwargs), **SMALL[name])


def job(name: str, checkpoint: Path | None = None) -> Training:
    return Training(
        function=designer_class(name).function, env="lacer/KnownSources-v0", env_kwargs=KWARGS,  # type: ignore[attr-defined]
        decisions={d.name: list(d.options) for d in SPACE.decisions}, protocol=PROTOCOL, steps=STEPS, seed=3,
        options=make(name, 3).options(), text_model="hash", checkpoint=None if checkpoint is None else str(checkpoint))


@functools.cache
def in_peace(name: str) -> Evaluation:
    """A training that nothing disturbs."""
    out = run_training(job(name))
    assert out.status == "ok", out.reason
    return out


def play(designer: Any, study: Study, n: int, batch: int = 1) -> list[str]:
    """NCodes of ``n`` proposals, each of which is evaluated at once; every third evaluation fails."""
    out: list[str] = []
    while len(out) < n:
        for p in designer.propose(study, min(batch, n - len(out))):
            assert not p.rejected, p.rejected
            t = study.start(p)
            out.append(t.ncode)
            study.finish(t.number, Evaluation.failure("NaN") if len(out) % 3 == 0 else Evaluation(objective=1.0))
    return out


class TrainingConformance(DesignerConformance):
    """The contract of all designers, with real trainings; over encoders, since these designers know nothing else."""

    length = 8

    def make(self, seed: int) -> Designer:
        return make(self.designer, seed)  # type: ignore[no-any-return]

    def spaces(self) -> dict[str, SearchSpace]:
        return {"narrow": SPACE, "everything": EncoderSpace(CARD), "four": self.small_space()}

    def space(self) -> SearchSpace:
        return EncoderSpace(CARD, {**NARROW, "*.mlp.width": [16, 32, 64], "*.linear.width": [8, 16, 32],
                                   "fusion.concat.width": [16, 32, 64]})

    def small_space(self) -> SearchSpace:
        return EncoderSpace(CARD, {k: v for k, v in NARROW.items() if "film" not in k} | {
            "position.block": ["mlp"], "*.linear.width": [8], "fusion.block": ["concat"]})


for _name in TRAINING:
    _cls = type(f"Test_{_name}", (TrainingConformance,), {"designer": _name})
    globals()[_cls.__name__] = pytest.mark.slow(_cls)


@pytest.mark.parametrize("name", TRAINING)
def test_contract(name: str, tmp_path: Path) -> None:
    """Valid proposals without repeats, the same for the same seed; from the study alone after a resume; any batch."""
    whole_study = Study(SPACE)
    whole = play(make(name, 3), whole_study, 8)
    assert len(set(whole)) == 8
    first = whole_study[0].proposal
    assert STEPS / 2 < first.meta["env_steps"] <= STEPS * 1.2
    assert first.meta["found"]["ranked"][0][0] == whole[0], "the best comes first"
    assert sum(t.env_steps for t in whole_study.trials) == first.meta["env_steps"], "it is charged once"
    url = sqlite_url(tmp_path / "study.db")
    stored = StoredStudy(url, "s", SPACE)
    for t in whole_study.trials[:3]:
        assert t.evaluation is not None
        stored.finish(stored.start(t.proposal).number, t.evaluation)
    stored.close()
    resumed = make_plain(name, 3, **SMALL[name])  # cannot train: what it found is in the study
    assert play(resumed, StoredStudy(url, "s", SPACE), 5) == whole[3:]
    assert json.loads(in_peace(name).model_dump_json())["found"] == json.loads(json.dumps(first.meta["found"]))


@pytest.mark.parametrize("name", TRAINING)
def test_what_was_named_is_used_up(name: str) -> None:
    study, rng = Study(SPACE), np.random.default_rng(0)
    codes = [SPACE.to_ncode(SPACE.sample(rng)) for _ in range(3)]
    found = {"ranked": [[c, "good"] for c in codes]}
    study.start(Proposal(SPACE.sample(rng), name, meta={"env_steps": 1, "found": found}))
    out = make_plain(name, 0).propose(study, 16)
    assert [SPACE.to_ncode(p.point) for p in out if p.rationale == "good"] == codes
    assert len({SPACE.to_ncode(p.point) for p in out}) == 16
    assert out[-1].rationale.startswith("random")
    assert "env_steps" not in out[0].meta


@pytest.mark.parametrize("name", TRAINING)
def test_a_killed_training_goes_on_from_its_checkpoint(name: str, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "designer.safetensors"
    save, saves = Session.save, [0]

    def save_and_die(self: Session, *args: Any) -> None:
        save(self, *args)
        saves[0] += 1
        if saves[0] == 1:
            raise KeyboardInterrupt  # as if the process were killed; passes every `except Exception`

    monkeypatch.setattr(Session, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        run_training(job(name, path))
    steps = list[int]()
    again, peace = run_training(job(name, path), lambda p: steps.append(p["steps"])), in_peace(name)
    assert steps[0] > (32 if name == "enas" else 64), "it did not begin anew"
    assert (again.found, again.cost.env_steps, again.curve) == (peace.found, peace.cost.env_steps, peace.curve)
    with Session(job(name, path)) as session:
        assert session.restore() is not None
    with Session(job(name, path).model_copy(update={"seed": 4})) as session:
        assert session.restore() is None, "another training's"
    path.write_bytes(path.read_bytes()[:-100])
    with Session(job(name, path)) as session:
        assert session.restore() is None, "damaged: it begins anew"


@pytest.mark.parametrize("name", TRAINING)
def test_failed_trainings_are_recorded_and_replaced(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(self: Progress) -> None:
        if self.num_timesteps >= 64:
            raise Diverged("NaN or infinite values in a test")

    monkeypatch.setattr(Progress, "check", diverge)
    study = Study(SPACE)
    proposals = make(name, 0).propose(study, 2)
    assert "training failed" in proposals[0].rejected
    assert proposals[0].meta["env_steps"] >= 64
    assert [p.designer for p in proposals[1:]] == ["random", "random"]
    assert name in proposals[1].rationale
    study.reject(proposals[0])
    for p in proposals[1:]:
        study.start(p)
    assert [p.designer for p in make_plain(name, 0, **SMALL[name]).propose(study, 1)] == ["random"], "after a resume"


@pytest.mark.slow
def test_a_training_in_a_worker_has_limits_and_leaves_nothing(tmp_path: Path) -> None:
    events: list[Event] = []
    t = trainer(tmp_path, steps=10**7, executor=lambda: ProcessPool(1, tmp_path / "log", timeout=4.0),
                listener=events.append)
    study = Study(SPACE)
    proposals = make_plain("darts", 0, trainer=t).propose(study, 1)
    assert proposals[0].rejected == "its own training failed: time-out"
    assert events[0].progress == {"steps": 0, "of": 10**7, "return": None, "steps_per_second": 0.0}
    assert proposals[0].meta["env_steps"] == max(e.progress["steps"] for e in events if e.progress) > 0
    assert proposals[1].designer == "random"
    assert not _processes_with("lacer.agents.worker"), "no process of it is left"
    t = trainer(tmp_path / "another", steps=10**7, executor=lambda: ProcessPool(1, tmp_path / "log", timeout=100.0))
    designer = make_plain("darts", 0, trainer=t)
    threading.Timer(1.0, designer.close).start()  # the search ends while it trains
    start = time.monotonic()
    assert "training failed" in designer.propose(study, 1)[0].rejected
    assert time.monotonic() - start < 20
    assert not _processes_with("lacer.agents.worker")
    assert "the search was ended" in designer.propose(study, 1)[0].rejected


def _processes_with(text: str) -> list[int]:
    mine = set[int]()
    for line in Path("/proc").glob("[0-9]*/stat"):
        try:
            command = (line.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            parent = int(line.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        if text in command and parent == os.getpid():
            mine.add(int(line.parent.name))
    return sorted(mine)


def test_what_they_cannot_do_is_said() -> None:
    plain = SearchSpace([Decision("a", (1, 2))])
    for name in TRAINING:
        with pytest.raises(LacerError, match="searches encoders"):
            make_plain(name, 0).propose(Study(plain), 1)
        with pytest.raises(LacerError, match="trains on an environment by itself"):
            make_plain(name, 0).propose(Study(SPACE), 1)
        with pytest.raises(LacerError, match="cannot search with objective="):
            search(space=plain, objective=lambda p: 1.0, designer=name, quiet=True)
        assert designer_class(name).summary()
        assert designer_class(name).paper
    for wrong in ({"alpha_rate": 0}, {"choices": 0}):
        with pytest.raises(LacerError, match="at least"):
            make_plain("darts", 0, **wrong)
    for name, option in (("pepnas", "population"), ("enas", "compared"), ("evolution", "population"), ("bo", "start")):
        with pytest.raises(LacerError, match="at least"):
            make_plain(name, 0, **{option: 0})


def test_designer_kwargs_are_checked() -> None:
    assert check_options("evolution", {"population": 12}) == {"population": 12}
    assert check_options("pepnas", {"margin": 1, "every": "4"}) == {"margin": 1.0, "every": 4}
    with pytest.raises(LacerError, match=r"no option 'populaton'; did you mean 'population'\? Options: pop"):
        check_options("evolution", {"populaton": 12})
    with pytest.raises(LacerError, match=r"the designer 'darts': bilevel: .*boolean"):
        check_options("darts", {"bilevel": "perhaps"})
    with pytest.raises(LacerError, match="no option 'seed'"):
        check_options("darts", {"seed": 1})
    with pytest.raises(LacerError, match="no option 'tournment'"):  # before anything starts
        search("lacer/KnownSources-v0", designer="evolution", designer_kwargs={"tournment": 2}, text_model="hash")
    with pytest.raises(LacerError, match="less than the designer 'darts' trains by itself"):
        search("lacer/KnownSources-v0", designer="darts", max_env_steps=30_000, designer_steps=25_000)


# -- DARTS ------------------------------------------------------------------------------------------------------------


def _net(table: TextTable) -> DartsSupernet:
    held = SupernetOptions.from_decisions(CARD, {d.name: d.options for d in SPACE.decisions})
    return DartsSupernet(CARD, *held.candidates(CARD, table, per_part=4), table)


def test_darts_ranks_by_probability() -> None:
    net, rng = _net(TextTable("hash")), np.random.default_rng(0)
    with torch.no_grad():
        for alpha in net.arch_parameters():
            alpha.copy_(torch.as_tensor(rng.normal(size=len(alpha))))
    ranked = list(by_probability(net, 10_000))
    p = [q for _, q in ranked]
    assert p == sorted(p, reverse=True)
    assert len({spec for spec, _ in ranked}) == len(ranked)
    expected = 0.0
    for spec, q in ranked:
        product = 1.0
        for name, options in net.sources.items():
            product *= net.probability(name)[options.index(spec.sources.get(name))].item()
        product *= net.probability("fusion")[net.fusions.index((spec.fusion, spec.condition))].item()
        assert product == pytest.approx(q, rel=1e-4)
        expected += product
    assert expected <= 1.0
    assert ranked[0][0] == net.argmax_spec()
    assert all(SPACE.from_spec(spec) for spec, _ in ranked)


def test_darts_shares_its_choices_among_the_blocks() -> None:
    held = SupernetOptions.from_decisions(CARD, {"position.block": ["linear", "mlp"], "fusion.block": ["concat"]})
    for n, want in ((2, 1), (6, 3), (1, 1)):
        sources, fusions = held.candidates(CARD, TextTable("hash"), per_part=n)
        blocks = [c.block for c in sources["position"] if c is not None]
        assert (blocks.count("linear"), blocks.count("mlp")) == (want, want)
        assert len(fusions) == n


def _train(steps: int, part: Any = None, **kwargs: Any) -> Any:
    job = Training(function="-", env="lacer/KnownSources-v0", env_kwargs=KWARGS, decisions={}, protocol=PROTOCOL,
                   steps=steps, text_model="hash")
    with Session(job) as session:
        return train_supernet(session, lambda: _net(session.table), part, **kwargs)


def test_alphas_move_as_asked() -> None:
    def moved(model: Any) -> float:
        assert isinstance(model.policy, SupernetPolicy)
        return max(a.abs().max().item() for a in model.policy.supernet.arch_parameters())  # type: ignore[union-attr]

    joint, faster = (moved(_train(128, alpha_rate=rate)) for rate in (1.0, 5.0))
    assert 0 < joint <= 4 * 1e-3 * 1.01, "Adam's steps, 4 minibatches"
    assert faster == pytest.approx(5 * joint, rel=0.5)
    held = Alphas(3e-4, PROTOCOL.ppo)
    model = _train(128, held, alpha_rate=0.0)
    assert 0 < moved(model) <= 4 * 3e-4 * 2
    weights = {n: p for n, p in model.policy.named_parameters() if "alphas" not in n}
    assert all(p.requires_grad for p in weights.values())
    assert all(p.grad is None for p in model.policy.supernet.arch_parameters()), "PPO's clipping does not see them"


def benchmark() -> Any:
    import importlib.util

    path = Path(__file__).parents[2] / "benchmarks" / "supernets.py"
    spec = importlib.util.spec_from_file_location("supernets", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_darts_finds_the_sources_that_matter() -> None:
    rows = [benchmark().train("darts", seed, 6144) for seed in range(3)]
    assert sum(r["right"] for r in rows) >= 2, rows
    assert all(r["sources_right"] >= 4 for r in rows)


# -- ENAS -------------------------------------------------------------------------------------------------------------

BRANCHES = SearchSpace([Decision("a", ("x", "y", "z")), Decision("b", (1, 2, 3, 4), ("a", "y")),
                        Decision("c", (True, False)), Decision("d", (0, 1, 2))])


def test_enas_controller_concentrates_on_what_is_rewarded() -> None:
    def reward(point: dict[str, Any]) -> float:
        return float((point["a"] == "y") + 0.5 * (point.get("b") == 3) + 0.5 * (point["c"] is False))

    good = 0
    for seed in range(2):
        torch.manual_seed(seed)
        rng, controller = np.random.default_rng(seed), Controller(BRANCHES)
        start = [float(np.exp(controller.log_probability(p))) for p in BRANCHES.points()]
        assert sum(start) == pytest.approx(1.0, abs=1e-5), "a distribution over the points"
        assert max(start) < 0.2
        for _ in range(200):
            sample = controller.sample()
            BRANCHES.check(sample.point)
            controller.learn(sample, 100 * (reward(sample.point) + rng.normal(0, 0.2)) - 1000)
        best = {"a": "y", "b": 3, "c": False}
        p = [float(np.exp(controller.log_probability({**best, "d": d}))) for d in (0, 1, 2)]
        good += sum(p) > 0.8
    assert good == 2


def test_enas_controller_learns_by_its_paper() -> None:
    torch.manual_seed(0)
    controller = Controller(SearchSpace([Decision("a", (0, 1))]))
    assert (controller.lstm.hidden_size, controller.optimizer.defaults["lr"]) == (64, 0.0035)
    sample = controller.sample()
    controller.learn(sample, 5.0)
    assert float(controller.baseline) == 5.0
    before = {n: p.clone() for n, p in controller.named_parameters()}
    controller.learn(controller.sample(), float("nan"))
    assert all(torch.equal(p, before[n]) for n, p in controller.named_parameters())
    sample = controller.sample()
    p = controller.log_probability(sample.point)
    controller.learn(sample, 6.0)
    assert float(controller.baseline) == pytest.approx(0.99 * 5 + 0.01 * 6)
    assert controller.log_probability(sample.point) > p, "more than the baseline: more probable"
    sample = controller.sample()
    p = controller.log_probability(sample.point)
    for _ in range(10):
        controller.learn(controller._walk(sample.point), 0.0)
    assert controller.log_probability(sample.point) < p


def test_enas_controller_keeps_constraints() -> None:
    torch.manual_seed(0)
    controller = Controller(SPACE)
    points = [controller.sample().point for _ in range(100)]
    assert {SPACE.check(p)["fusion.block"] for p in points} == {"concat", "film"}
    large = SearchSpace([Decision(f"d{i}", (0, 1, 2)) for i in range(200)])
    assert large.check(Controller(large).sample().point)


# -- PEPNAS -----------------------------------------------------------------------------------------------------------


def test_nsga_by_hand() -> None:
    points = [(1.0, 1.0), (2.0, 0.0), (0.0, 2.0), (0.5, 0.5), (0.0, 0.0), (1.0, 1.0)]
    assert fronts(points) == [[0, 1, 2, 5], [3], [4]]
    inf = float("inf")
    assert crowding([(0.0, 3.0), (1.0, 1.0), (4.0, 0.0)]) == [inf, 2.0, inf]


@dataclass
class _Scores:
    """A task in which larger encoders are better in the end, but slow."""

    population: Population
    space: SearchSpace
    came_back: dict[int, list[int]] = field(default_factory=dict)

    def run(self, generations: int, score: Callable[[Individual, int], float]) -> None:
        for g in range(generations):
            children = self.population.children(self.space, np.random.default_rng(g))
            for i in [*self.population.members, *self.population.aside, *children]:
                i.parameters = 10 + 10 * int(self.space.from_ncode(i.code)["width"])
                i.score = score(i, g)
            aside = {i.number for i in self.population.aside}
            self.population.end_generation(children)
            self.came_back[self.population.generation] = list(self.population.merged)
            assert aside >= set(self.population.merged) or self.population.merged
            assert len({i.code for i in [*self.population.members, *self.population.aside]}) == len(
                [*self.population.members, *self.population.aside]), "nobody lives twice"


WIDE = SearchSpace([Decision("width", tuple(range(10))), Decision("other", tuple(range(10)))])


def test_pepnas_brings_the_preserved_back_every_third_generation() -> None:
    # One bad child in every generation makes the range; all others are within the margin, narrower ones a bit better.
    task = _Scores(Population(6), WIDE)
    task.run(9, lambda i, g: 0.0 if i.number % 6 == 0 else 1.0 - 0.005 * WIDE.from_ncode(i.code)["width"])
    assert [g for g, back in task.came_back.items() if back] == [3, 6, 9]
    # Aside are larger ones than the mean survivor; those far from the best stay there.
    task = _Scores(Population(6, margin=0.08), WIDE)
    task.run(3, lambda i, g: 1.0 - WIDE.from_ncode(i.code)["width"])
    mean = np.mean([i.parameters for i in task.population.members])
    assert not task.population.merged
    assert task.population.aside
    assert all(i.parameters > mean for i in task.population.aside)


def test_pepnas_margin_in_units_of_the_range() -> None:
    def person(number: int, score: float, parameters: int) -> Individual:
        return Individual(number, f"{number}.0", (), score, parameters)

    for scale in (1.0, 100.0):
        p = Population(2, margin=0.08, every=3, generation=2)
        p.members = [person(0, 1.0 * scale, 10), person(1, 0.5 * scale, 5)]
        p.aside = [person(2, 0.93 * scale, 50)]
        p.end_generation([person(3, 0.0, 60), person(4, 0.91 * scale, 40)])
        assert p.merged == [2], "0.07 of the range below the best; 0.09 is too far"
        assert {i.number for i in p.members} == {0, 1, 2}
        assert not p.aside or p.aside[0].number != 2


def test_pepnas_survivors_are_pareto_optimal() -> None:
    task = _Scores(Population(6), WIDE)
    task.run(8, lambda i, g: float(WIDE.from_ncode(i.code)["width"]) - 0.1 * WIDE.from_ncode(i.code)["other"])
    best = max(task.population.members, key=lambda i: i.score or 0.0)
    assert (best.score or 0.0) >= 8.8
    assert min(i.parameters for i in task.population.members) == 10


@pytest.mark.slow
def test_pepnas_inherits_and_trains_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    from lacer.search.designers import pepnas

    seen: list[tuple[int, int, bool, int]] = []
    real = pepnas._train

    def spy(session: Any, i: Individual, rollouts: int, weights: Any, *args: Any) -> None:
        inherits = i.number in weights
        real(session, i, rollouts, weights, *args)
        seen.append((i.number, rollouts, inherits, i.steps))

    monkeypatch.setattr(pepnas, "_train", spy)
    designer = make_plain("pepnas", 0, trainer=trainer(steps=3000), population=4, generations=3, episodes=1)
    [p] = designer.propose(Study(SPACE), 1)
    assert not p.rejected, p.rejected
    assert [n for n, *_ in seen[:4]] == [0, 1, 2, 3]
    assert max(r for _, r, *_ in seen[:4]) < min(r for _, r, *_ in seen[-4:]), "later generations train longer"
    before: dict[int, int] = {}
    for number, _, inherits, steps in seen:
        assert inherits == (number in before), "survivors go on, with the steps that they had"
        assert steps > before.get(number, 0)
        before[number] = steps
    assert len(before) < len(seen)
    assert len(p.meta["found"]["generations"]) == 3


def test_pepnas_tensors_that_fit() -> None:
    from lacer.agents.ppo import make_model
    from lacer.search.designers.pepnas import _fitting, _state

    job = Training(function="-", env="lacer/KnownSources-v0", env_kwargs=KWARGS, decisions={}, protocol=PROTOCOL,
                   steps=1, text_model="hash")

    def spec(position: dict[str, Any]) -> EncoderSpec:
        return EncoderSpec.parse({"sources": {"position": position, "noise": {"block": "linear", "width": 8}},
                                  "fusion": {"block": "concat", "width": 16, "depth": 1}}, CARD)

    with Session(job) as s:
        a, b = spec({"block": "linear", "width": 8}), spec({"block": "mlp", "width": 8, "depth": 1})
        parent = _state(make_model(a, CARD, s.table, s.env, PROTOCOL, 0).policy)
        child = _state(make_model(b, CARD, s.table, s.env, PROTOCOL, 1).policy)
        taken = _fitting(child, b, parent, a)
    assert not any("position" in k for k in taken), "another block"
    assert any("blocks.noise" in k for k in taken)
    assert any("fusion" in k for k in taken)
    assert any("value_net" in k for k in taken)
    assert all(torch.equal(taken[k], parent[k]) for k in taken)


# -- a search from end to end -----------------------------------------------------------------------------------------

SEARCH: dict[str, Any] = {
    "env": "lacer/KnownSources-v0", "env_kwargs": KWARGS, "candidates": 4, "text_model": "hash", "workers": 1,
    "space": NARROW, "protocol": PROTOCOL.model_dump(mode="json"), "final_steps": 256, "final_episodes": 2,
    "wandb": "off"}


@pytest.mark.slow
def test_search_inprocess(tmp_path: Path) -> None:
    expert = tmp_path / "expert.json"
    expert.write_text(SPACE.to_spec(next(SPACE.points())).to_json())
    result = search(**SEARCH, designer="enas", designer_kwargs=SMALL["enas"], designer_steps=512, expert=str(expert),
                    executor="inprocess", max_env_steps=2000, out=tmp_path / "run", quiet=True)
    trials = result.outcome.trials
    assert [t.proposal.designer for t in trials] == ["expert", "enas", "enas", "enas"]
    assert trials[1].env_steps == trials[2].env_steps + trials[1].proposal.meta["env_steps"] > trials[2].env_steps + 400
    assert result.outcome.config["designer_steps"] == 512
    own = sum(t.proposal.meta.get("env_steps", 0) for t in trials)
    assert f"of these, the designer's own training</th><td>{own:,}</td>" in result.report.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
def test_search_from_the_command_line_killed_and_resumed(name: str, tmp_path: Path, start: Any, lacer: Any) -> None:
    expert = tmp_path / "expert.json"
    expert.write_text(SPACE.to_spec(next(SPACE.points())).to_json())
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({**SEARCH, "designer": name, "designer_kwargs": SMALL[name], "expert": str(expert),
                                  "designer_steps": 2000}))
    run = tmp_path / "run"
    process = start("search", "--config", config, "--out", run)
    end = time.monotonic() + 300
    try:
        while not (run / "designer.safetensors").exists():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = lacer("search", "--resume", run, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"The designer {name} trains by itself before it proposes: 2,000 steps" in done.stderr
    assert f"{name} trained by itself: " in done.stderr
    again = lacer("search", "--resume", run, "--candidates", 5, timeout=300)
    assert again.returncode == 0, again.stderr
    assert "trains by itself" not in again.stderr, "what it found is in the study"
    assert (run / "report.html").is_file()


def test_parts_cover_all_rollouts() -> None:
    for rollouts in (1, 7, 20, 21, 399):
        each = -(-rollouts // PARTS)
        assert PARTS * each >= rollouts > 0
    study = Study(SPACE)
    study.reject(Proposal(None, "darts", rejected="x"))
    assert make("darts", 0).propose(study, 1)[0].meta["found"], "a rejected proposal of its own is no result"
