"""Successive halving, further seeds for survivors, warm starts: with real PPO runs wherever one is meant."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
import yaml
from safetensors.torch import load_file
from stable_baselines3 import PPO

from lacer.agents import Evaluation, Protocol, Rung, RunRequest, WarmStart, run
from lacer.agents.parts import take_weights
from lacer.agents.ppo import make_model
from lacer.agents.vec import EncoderVecEnv
from lacer.encoders import EncoderSpec, TextTable
from lacer.envs import LacerError, Objective, task_card
from lacer.envs.vec import close_vec, make_vec
from lacer.search import search
from lacer.search.export import export
from lacer.search.fidelity import Fidelity, charged, promotes, ranked, unchanged
from lacer.search.loop import SearchResult
from lacer.search.progress import Display
from lacer.search.study import Proposal, Study, Trial
from tests.search.conftest import TINY, Lacer, Start

SMALL: dict[str, Any] = {
    **TINY, "designer": "random", "candidates": 4, "workers": 1, "executor": "inprocess", "wandb": "off",
    "video": False, "quiet": True, "final_steps": 64, "final_episodes": 2,
    "env_kwargs": {"sources": ["position", "noise"]},
    "protocol": {"steps": 256, "eval_episodes": 2, "probes": ["linear_probe"],
                 "ppo": {"n_envs": 4, "n_steps": 16, "n_epochs": 2, "gamma": 0.5}}}
RUNGS = {"rungs": [64, 128], "reduction": 2}


def numbers(trials: tuple[Trial, ...]) -> list[Any]:
    """Everything but seconds."""
    seconds = {"train_seconds", "eval_seconds", "probe_seconds", "total_seconds", "steps_per_second"}
    return [(t.ncode, t.status, t.reason, t.evaluation and t.evaluation.model_dump(exclude={
        "cost": seconds, "rungs": {"__all__": {"eval_seconds", "total_seconds"}}})) for t in trials]


# -- judgements --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pruner", ["halving", "hyperband"])
@pytest.mark.parametrize("reduction", [2, 3])
def test_judgements_are_optunas(pruner: Any, reduction: int) -> None:
    """A search told through Optuna's own ask, report and should_prune."""
    f = Fidelity(rungs=(10, 25, 100), reduction=reduction, pruner=pruner)
    made: Any = optuna.pruners.SuccessiveHalvingPruner(1, reduction) if pruner == "halving" else \
        optuna.pruners.HyperbandPruner(1, reduction ** 3 + 1, reduction)
    study = optuna.create_study(direction="maximize", study_name="lacer", pruner=made)
    known: list[dict[int, float]] = [{}, {}, {}]
    rng, ended = np.random.default_rng(0), [0, 0, 0, 0]
    for number in range(40):
        trial = study.ask()
        for rung in range(3):
            value = float(rng.normal())
            trial.report(value, reduction ** rung)
            go = promotes(f, number, value, known[rung], rung)
            assert go is not trial.should_prune(), (number, rung)
            known[rung][number] = value
            if not go:
                ended[rung] += 1
                break
        else:
            ended[3] += 1
        study.tell(trial, 0.0)
    assert sum(ended[:3]) > 5
    assert ended[3] > 0


def judged(f: Fidelity, values: list[float | None]) -> list[Evaluation | Rung]:
    """What candidates that reach the first rung one after the other are told."""
    out: list[Evaluation | Rung] = []
    trials: list[Trial] = []
    for i, v in enumerate(values):
        trial = Trial(i, "running", Proposal(None, "x"), None, str(i))
        paused = Evaluation(paused_at=16, curve=[] if v is None else [(16, v)])
        paused.cost.env_steps = 20
        out.append(f.judge(trial, paused, trials, Objective("score")))
        reached = out[-1] if isinstance(out[-1], Rung) else out[-1].rungs[-1]
        trials.append(Trial(i, "running", Proposal(None, "x"), None, str(i), None, (reached,)))
    return out


def test_a_candidate_is_compared_with_those_that_came_before() -> None:
    f = Fidelity(rungs=(10,), reduction=2)
    got = judged(f, [1.0, 2.0, 0.0, 1.5, None, 3.0])
    assert [isinstance(x, Rung) for x in got] == [True, True, False, True, True, True]
    worst = got[2]
    assert isinstance(worst, Evaluation)
    assert worst.status == "pruned"
    assert worst.reason == "pruned after 16 steps: return 0, place 3 of 3"
    assert worst.rungs == [Rung(steps=16, scores={"return": 0.0}, promoted=False, eval_steps=4)]
    assert got[4].scores == {}, "no signal: it goes on, and nobody is compared with it"  # type: ignore[union-attr]


def test_several_signals_are_ranked() -> None:
    assert ranked(["a"], [{"a": 3.0}, {}, {"a": 1.0}]) == [3.0, None, 1.0]
    assert ranked(["a", "b"], [{"a": 3.0, "b": 0.0}, {"a": 1.0}, {"a": 1.0, "b": 9.0}, {"a": 2.0, "b": 1.0}]) == [
        2.0, None, 2.0, 2.0]
    assert ranked(["a", "b"], [{"a": 1.0}, {"a": 1.0, "b": 1.0}]) is None


def test_low_objectives_are_good_where_they_are_minimised() -> None:
    e = Evaluation(objective=3.0, paused_at=5)
    assert Fidelity(signal="objective").scores(e, Objective("cost", "", "minimize")) == {"objective": -3.0}


def test_what_passed_rungs_took_is_charged() -> None:
    rungs = [Rung(steps=64, scores={}, promoted=True, eval_steps=5, total_seconds=1.0)]
    assert charged(Evaluation.failure("died"), rungs).cost.env_steps == 69
    assert charged(Evaluation.failure("died"), rungs).cost.total_seconds == 1.0
    assert charged(Evaluation(objective=1.0), ()).rungs == []


# -- configuration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "says"), [
    ({"fidelity": {"rungs": [128, 64]}}, "each greater than the one before"),
    ({"fidelity": {"rungs": [0, 64]}}, "each greater than the one before"),
    ({"fidelity": {"rungs": [64, 256]}}, "256 is not before the end of the training, protocol.steps=256"),
    ({"fidelity": {"rungs": [65, 127]}}, "65 and 127 are the same pause, since a rollout has 64 steps"),
    ({"fidelity": {"rungs": [200]}}, "200 and 256 are the same pause"),
    ({"fidelity": {"signal": "retrun"}}, "did you mean 'return'"),
    ({"fidelity": {"signal": "return+probe:linear_prob"}}, "did you mean 'linear_probe'"),
    ({"fidelity": {"rungs": [64], "signal": "probe:unique_r2"}}, "not among protocol.probes"),
    ({"fidelity": {"rugs": [64]}}, "did you mean 'rungs'"),
    ({"fidelity": {"reduction": 1}}, "greater than or equal to 2"),
    ({"fidelity": RUNGS, "designer": "darts"}, "a designer that trains by itself"),
    ({"fidelity": {"survivors": 2}, "designer": "pepnas"}, "a designer that trains by itself"),
    ({"fidelity": RUNGS, "executor": "ray"}, "Ray's nodes do not share"),
    ({"fidelity": {"warm_start": "parent"}, "executor": "ray"}, "Ray's nodes do not share"),
    ({"fidelity": {"survivors": 2}, "max_env_steps": 1000}, "further seeds of the survivors"),
])
def test_bad_values_are_clear_errors_before_anything_starts(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(LacerError, match=says.replace("[", r"\[")):
        search(out=tmp_path / "run", **{**SMALL, **changes})
    assert not (tmp_path / "run").exists()


def test_not_with_a_function_as_the_objective() -> None:
    from lacer.search import Decision, SearchSpace

    with pytest.raises(LacerError, match="fidelity: only for a search with an environment"):
        search(space=SearchSpace([Decision("a", (1, 2))]), objective=lambda p: p["a"], fidelity=RUNGS)


# -- runs that pause ---------------------------------------------------------------------------------------------------

REQUEST = RunRequest(
    env="lacer/KnownSources-v0", env_kwargs={"sources": ["position", "words"]}, text_model="hash", seed=3,
    encoder={"sources": {"position": {"block": "mlp"}, "words": {"block": "sentence_mlp"}},
             "fusion": {"block": "concat"}},
    protocol=Protocol.model_validate({**SMALL["protocol"], "steps": 192}), pauses=(64, 100))


def test_paused_and_gone_on_is_uninterrupted(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    whole = run(REQUEST)
    for until, at in ((64, 64), (100, 128)):
        paused = run(REQUEST.model_copy(update={"checkpoint": str(path), "until": until}))
        assert (paused.paused_at, paused.cost.env_steps, paused.objective) == (at, at, None)
        assert path.exists()
        assert paused.curve == [p for p in whole.curve if p[0] <= at]
    rest = run(REQUEST.model_copy(update={"checkpoint": str(path)}))
    assert (rest.objective, rest.returns, rest.curve, rest.probes) == (
        whole.objective, whole.returns, whole.curve, whole.probes)
    assert not path.exists()


def test_a_run_that_fails_leaves_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    wild = REQUEST.protocol.model_copy(update={"ppo": REQUEST.protocol.ppo.model_copy(update={"learning_rate": 1e30})})
    e = run(REQUEST.model_copy(update={"checkpoint": str(path), "until": 100, "protocol": wild}))
    assert e.status == "failed"
    assert not path.exists()


def test_a_warm_start_takes_the_blocks_that_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "parent.safetensors"
    parent = REQUEST.model_copy(update={"checkpoint": str(path), "keep_checkpoint": True, "pauses": ()})
    assert run(parent).ok
    tensors = load_file(path)
    card = task_card(REQUEST.env, **REQUEST.env_kwargs)
    child = {"sources": {"position": {"block": "mlp", "width": 16}, "words": {"block": "sentence_mlp"}},
             "fusion": {"block": "concat"}}
    spec = EncoderSpec.parse(child, card)
    assert unchanged(spec, EncoderSpec.parse(REQUEST.encoder, card)) == ("words",)
    env = EncoderVecEnv(make_vec(REQUEST.env, 1, REQUEST.env_kwargs, seed=0), card, table := TextTable("hash"))
    try:
        model: PPO = make_model(spec, card, table, env, REQUEST.protocol, 0)
        before = {k: v.clone() for k, v in model.policy.state_dict().items()}
        asked = WarmStart(path=str(path), trial=7, modules=("position", "words"))
        taken = take_weights(model.policy, asked)
        assert taken is not None
        assert taken.modules == ("words",), "the other block has another shape"
        for name, now in model.policy.state_dict().items():
            same = "features_extractor.encoder.blocks.words." in name
            assert torch.equal(now, tensors[f"policy/{name}"] if same else before[name]), name
        assert any("blocks.words." in k and not torch.equal(v, tensors[f"policy/{k}"]) for k, v in before.items())
        path.write_bytes(b"no checkpoint")
        assert take_weights(model.policy, asked) is None
    finally:
        close_vec(env)


# -- searches ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    return search(out=tmp_path_factory.mktemp("halved") / "run", **SMALL, fidelity={
        **RUNGS, "signal": "return+probe:linear_probe", "survivors": 2, "survivor_seeds": 1})


def test_off_is_the_plain_protocol(tmp_path: Path) -> None:
    """Whatever is set beside the switches, and what a search wrote before there were any."""
    small = {**SMALL, "candidates": 2}
    plain = search(out=tmp_path / "plain", **small)
    off = search(out=tmp_path / "off", **small, fidelity={
        "pruner": "hyperband", "reduction": 4, "signal": "probe:linear_probe", "survivor_seeds": 3})
    assert numbers(plain.outcome.trials) == numbers(off.outcome.trials)
    t = plain.outcome.trials[1]
    assert t.spec is not None
    bare = run(RunRequest(env=SMALL["env"], env_kwargs=SMALL["env_kwargs"], encoder=t.spec.to_dict(), seed=0,
                          protocol=Protocol.model_validate(SMALL["protocol"]), text_model="hash"))
    assert t.evaluation is not None
    assert (bare.returns, bare.curve, bare.probes) == (t.evaluation.returns, t.evaluation.curve, t.evaluation.probes)
    assert not (tmp_path / "plain" / "checkpoints").exists()


def test_a_search_with_rungs_and_survivors(halved: SearchResult) -> None:
    trials = halved.outcome.trials
    first, further = [t for t in trials if t.survivor is None], [t for t in trials if t.survivor is not None]
    assert len(first) == 4
    pruned = [t for t in first if t.status == "pruned"]
    assert pruned
    for t in first:
        assert t.rungs
        assert set(t.rungs[0].scores) == {"return", "probe:linear_probe"}
        assert [r.promoted for r in t.rungs] == [True] * (len(t.rungs) - 1) + [t.status == "ok"]
        assert t.evaluation is not None
        assert t.evaluation.cost.env_steps == (256 + 32 if t.status == "ok" else t.rungs[-1].steps)
    assert halved.outcome.figures()["env_steps"] == sum(t.env_steps for t in trials)
    ok = [t for t in first if t.status == "ok"]
    assert {t.survivor for t in further} == {t.number for t in sorted(ok, key=lambda t: -(t.objective or 0))[:2]}
    for t in further:
        assert t.evaluation is not None
        assert (t.env_steps, t.evaluation.seed) == (288, 100_000)
        assert t.evaluation.returns != trials[t.survivor or 0].evaluation.returns  # type: ignore[union-attr]

    def mean(t: Trial) -> float:
        return float(np.mean([x.objective for x in trials if x.ncode == t.ncode and x.objective is not None]))

    survivors = [trials[t.survivor or 0] for t in further]
    assert halved.outcome.winner == max(survivors, key=mean).number
    stored = optuna.load_study(study_name=None, storage=f"sqlite:///{halved.folder}/study.db").trials
    assert [s.state.name for s in stored] == ["PRUNED" if t.status == "pruned" else "COMPLETE" for t in trials]
    assert not list((halved.folder / "checkpoints").iterdir())


def test_it_is_shown(halved: SearchResult) -> None:
    table = export(halved.folder, None)
    t = next(t for t in halved.outcome.trials if t.status == "pruned")
    row = table[table.number == t.number].iloc[0]
    assert row.status == "pruned"
    assert row.reason.startswith(f"pruned after {t.rungs[-1].steps} steps: return ")
    assert row["rung/64/return"] == t.rungs[0].scores["return"]
    assert row["rung/64/probe:linear_probe"] == t.rungs[0].scores["probe:linear_probe"]
    assert f"pruned after {t.rungs[-1].steps} steps" in (halved.folder / "report.html").read_text()
    assert halved.outcome.figures()["candidates"]["pruned"] == sum(x.status == "pruned" for x in halved.outcome.trials)


@pytest.mark.parametrize("rungs", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_interrupted_between_rungs_and_resumed_is_uninterrupted(halved: SearchResult, rungs: int, tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    seen = 0

    def stop(study: Study, number: int, rung: Rung) -> Trial:
        nonlocal seen
        trial = add(study, number, rung)
        seen += 1
        if seen == rungs:
            raise KeyboardInterrupt
        return trial

    add = Study.add_rung
    with monkeypatch.context() as m:
        m.setattr(Study, "add_rung", stop)
        with pytest.raises(KeyboardInterrupt):
            search(out=tmp_path / "run", **SMALL, fidelity={
                **RUNGS, "signal": "return+probe:linear_probe", "survivors": 2, "survivor_seeds": 1})
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    resumed = search(resume=tmp_path / "run", quiet=True)
    assert numbers(resumed.outcome.trials) == numbers(halved.outcome.trials)
    assert resumed.outcome.winner == halved.outcome.winner


def test_children_start_from_their_parents(tmp_path: Path) -> None:
    result = search(out=tmp_path / "run", **{
        **SMALL, "designer": "evolution", "designer_kwargs": {"population": 2}, "candidates": 5,
        "fidelity": {"warm_start": "parent", "rungs": [64], "reduction": 2}})
    warm = [t for t in result.outcome.trials if t.evaluation is not None and t.evaluation.warm_start is not None]
    assert warm, "no child kept a block of its parent"
    for t in warm:
        start = t.evaluation.warm_start  # type: ignore[union-attr]
        parent = result.outcome.trials[start.trial]  # type: ignore[union-attr]
        assert start.trial in t.proposal.parents  # type: ignore[union-attr]
        assert t.spec is not None
        assert parent.spec is not None
        assert all(t.spec.sources[n] == parent.spec.sources[n] for n in start.modules)  # type: ignore[union-attr]


def test_the_budget_of_steps_keeps_the_survivors_share(tmp_path: Path) -> None:
    budget = 2500
    result = search(out=tmp_path / "run", **{**SMALL, "candidates": 30, "max_env_steps": budget, "fidelity": {
        "rungs": [64], "reduction": 2, "survivors": 1, "survivor_seeds": 2}})
    assert result.outcome.figures()["env_steps"] <= budget
    assert sum(t.survivor is not None for t in result.outcome.trials) == 2
    assert sum(t.survivor is None for t in result.outcome.trials) > budget // 288 - 2, "pruned ones leave room"


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_two_workers_killed_in_the_middle_of_rungs(how: int, start: Start, lacer: Lacer, tmp_path: Path) -> None:
    config, folder = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump({
        **TINY, "designer": "random", "candidates": 12, "wandb": "off", "video": False,
        "fidelity": {"rungs": [256, 512], "signal": "objective", "episodes": 2, "survivors": 2},
        "protocol": {**TINY["protocol"], "steps": 1024}}))
    process = start("search", "--config", config, "--out", folder)
    end = time.monotonic() + 120
    while time.monotonic() < end and not list(folder.glob("checkpoints/[1-9]*.safetensors")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.kill(process.pid, how)
    process.communicate(timeout=30)
    done = lacer("search", "--resume", folder, "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["candidates"]["running"] == 0
    assert figures["candidates"]["pruned"] > 2
    stored = optuna.load_study(study_name=None, storage=f"sqlite:///{folder}/study.db").trials
    evaluations = [Evaluation.model_validate(t.user_attrs["evaluation"]) for t in stored
                   if not t.user_attrs["rejected"]]
    assert len(evaluations) == 12 + 2 * min(2, sum(e.ok for e in evaluations[:12])), "two seeds for each survivor"
    assert figures["env_steps"] == sum(e.cost.env_steps for e in evaluations)
    for e in evaluations:
        assert [r.steps for r in e.rungs] == [256, 512][:len(e.rungs)]
        assert all(r.eval_steps == 32 for r in e.rungs), "two episodes of 16 steps"
    assert not list((folder / "checkpoints").iterdir())


def test_what_a_person_sees(halved: SearchResult, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    heads: list[str] = []
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Display, "headline", lambda _, text: heads.append(text))
        search(out=tmp_path / "run", **{**SMALL, "quiet": False, "candidates": 3, "fidelity": RUNGS})
    shown = capsys.readouterr().err
    assert "#0 goes on after 64 steps: return" in shown
    assert re.search("pruned after (64|128) steps: return", shown)
    assert any("pruned)" in h for h in heads)
