"""Real PPO runs: they learn, repeat exactly, can be saved and loaded, and fail with a reason."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import helper_envs
import numpy as np
import pytest
import torch
from gymnasium import spaces
from safetensors.torch import load_file, save_file

from lacer.agents import Evaluation, PPOConfig, Protocol, RunRequest, load, ppo, run
from lacer.agents.ppo import evaluate
from lacer.agents.stats import mean_interval
from lacer.agents.vec import encode_batch, encoder_space
from lacer.encoders import EncoderSpec, TextTable
from lacer.envs import LacerError, make, task_card

ENV = "lacer/KnownSources-v0"
SOURCES = {"sources": ["position", "words", "noise"]}
ENCODER = {"sources": {"position": {"block": "mlp", "width": 32}, "words": {"block": "sentence_mlp"}},
           "fusion": {"block": "concat", "width": 32}}
PPO = PPOConfig(n_envs=4, n_steps=64, batch_size=64, n_epochs=6, learning_rate=3e-3, gamma=0.01, head=(32,))
PROTOCOL = Protocol(steps=3000, eval_episodes=7, ppo=PPO)
REQUEST = RunRequest(env=ENV, env_kwargs=SOURCES, encoder=ENCODER, protocol=PROTOCOL, seed=3, text_model="hash")
SMALL = Protocol(steps=128, eval_episodes=3, ppo=PPOConfig(n_envs=2, n_steps=16, batch_size=16, n_epochs=1, head=(8,)))


def changed(request: RunRequest, protocol: dict[str, Any] | None = None, ppo: dict[str, Any] | None = None,
            **kwargs: Any) -> RunRequest:
    data = request.model_dump()
    data["protocol"] = {**data["protocol"], **(protocol or {}), "ppo": {**data["protocol"]["ppo"], **(ppo or {})}}
    return RunRequest.model_validate({**data, **kwargs})


def small(env: str, **kwargs: Any) -> RunRequest:
    """A run of a moment on an environment of ``helper_envs``."""
    encoder = {"sources": {"numbers": {"block": "linear"}, "words": {"block": "sentence_mlp"}},
               "fusion": {"block": "concat", "width": 16}}
    return RunRequest(**{"env": f"helper_envs:helper/{env}-v0", "protocol": SMALL, "text_model": "hash",
                         "encoder": encoder, **kwargs})


def same(a: Evaluation, b: Evaluation) -> None:
    """Equal in all that is not time."""
    times = {"train_seconds", "eval_seconds", "probe_seconds", "total_seconds", "steps_per_second"}
    x, y = (e.model_dump(exclude={"cost": times}) for e in (a, b))
    assert x == y


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Path, list[dict[str, Any]]]:
    """One short training: its evaluation, the saved agent, and the progress reports."""
    folder = tmp_path_factory.mktemp("run") / "agent"
    reports: list[dict[str, Any]] = []
    return run(changed(REQUEST, save_to=str(folder)), reports.append), folder, reports


@pytest.fixture(scope="module")
def noop() -> Evaluation:
    return run(changed(REQUEST, {"eval_episodes": 200}, encoder=None))


@pytest.fixture
def copy(trained: tuple[Evaluation, Path, Any], tmp_path: Path) -> Path:
    """The saved agent, to be damaged."""
    return Path(shutil.copytree(trained[1], tmp_path / "agent"))


def test_training_beats_doing_nothing(trained: tuple[Evaluation, Path, Any], noop: Evaluation) -> None:
    e = trained[0]
    assert e.ok, e.reason
    assert noop.ok, noop.reason
    assert abs(noop.objective or 0) < 0.05, "doing nothing earns 0 in expectation"
    assert (e.objective or 0) > 0.75, "1 is perfect"
    assert min(e.returns) > max(noop.returns)
    assert e.curve[-1][1] > e.curve[0][1] + 4
    assert noop.curve == []
    assert noop.probes == {}
    assert noop.cost.parameters == 0


def test_what_an_evaluation_says(trained: tuple[Evaluation, Path, Any]) -> None:
    e, folder, reports = trained
    assert e.episode_seeds == list(range(1_000_000, 1_000_007))
    assert len(e.returns) == 7
    assert e.metrics["score"] == pytest.approx([r / 16 for r in e.returns], abs=1e-5)
    assert e.objective == pytest.approx(np.mean(e.metrics["score"]))
    assert e.mean_return == pytest.approx(np.mean(e.returns))
    assert e.seed == 3
    assert e.versions["torch"] == torch.__version__
    assert "sentence-transformers" in e.versions
    assert e.cost.env_steps == 3072 + 7 * 16, "whole rollouts of training, and the evaluation"
    assert set(e.cost.parameters_by_module) == {"position", "words", "fusion"}
    agent = load(folder)
    assert e.cost.parameters == sum(p.numel() for p in agent.policy.parameters())
    assert e.cost.parameters > sum(e.cost.parameters_by_module.values()), "the heads count too"
    assert e.cost.total_seconds >= e.cost.train_seconds > 0
    assert [r["steps"] for r in reports] == [s for s, _ in e.curve] == list(range(256, 3073, 256))
    assert all(r["of"] == 3000 and r["return"] == c for r, (_, c) in zip(reports, e.curve, strict=True))
    assert json.loads(e.model_dump_json()) == e.model_dump(mode="json")
    assert Evaluation.model_validate_json(e.model_dump_json()) == e


def test_probes_tell_what_each_source_knows(trained: tuple[Evaluation, Path, Any]) -> None:
    p = trained[0].probes
    assert list(p) == ["position", "words", "fused"]
    assert p["position"]["linear_probe/target_position"] > 0.9
    assert p["position"]["linear_probe/target_words"] < 0.2
    assert p["words"]["linear_probe/target_words"] > 0.7
    assert p["words"]["linear_probe/target_position"] < 0.2
    assert min(p["fused"]["linear_probe/target_position"], p["fused"]["linear_probe/target_words"]) > 0.6
    assert all(0 < v["effective_rank"] <= 1 for v in p.values())


def test_the_same_request_gives_the_same_result(trained: tuple[Evaluation, Path, Any]) -> None:
    same(run(REQUEST), trained[0])


def test_another_seed_trains_another_agent_on_the_same_evaluation_episodes() -> None:
    a, b = (run(changed(REQUEST, {"steps": 256}, seed=s)) for s in (0, 1))
    assert a.returns != b.returns
    assert a.episode_seeds == b.episode_seeds


def test_the_saved_agent_played_by_hand_gets_the_same_returns(trained: tuple[Evaluation, Path, Any]) -> None:
    """In the plain environment: strings as strings, no vectorisation, one episode per held-out seed."""
    e, folder, _ = trained
    agent = load(folder)
    env = make(ENV, **SOURCES)
    for seed, want in zip(e.episode_seeds, e.returns, strict=True):
        obs, _ = env.reset(seed=seed)
        assert isinstance(obs["words"], str)
        total, done = 0.0, False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(agent.predict(obs))
            total, done = total + float(reward), terminated or truncated
        assert total == pytest.approx(want, abs=1e-3)


def test_number_of_environments_does_not_change_what_is_evaluated(trained: tuple[Evaluation, Path, Any]) -> None:
    e, folder, _ = trained
    agent = load(folder)
    for n in (1, 3, 16):
        protocol = changed(REQUEST, ppo={"n_envs": n}).protocol
        episodes = evaluate(agent.policy, agent.card, agent.table, ENV, SOURCES, protocol)
        assert episodes.seeds == e.episode_seeds
        assert episodes.returns == pytest.approx(e.returns, abs=1e-3)
        assert sorted(episodes.rows["episode"]) == sorted(16 * e.episode_seeds)


def test_probe_targets_belong_to_the_observation_beside_them(trained: tuple[Evaluation, Path, Any]) -> None:
    """Also at the first step of an episode, after an automatic reset."""
    agent = load(trained[1])
    rows = evaluate(None, agent.card, agent.table, ENV, SOURCES, PROTOCOL).rows
    seen = np.array([o["position"][0] for o in rows["obs"]])
    true = np.array([s["target_position"] for s in rows["state"]])
    assert len(seen) == 7 * 16
    np.testing.assert_allclose(seen, true, atol=1e-6)


def test_evaluation_arguments_of_the_environment_hold_for_the_evaluation_only() -> None:
    e = run(changed(REQUEST, {"steps": 256}, eval_env_kwargs={"horizon": 5}))
    assert e.cost.env_steps == 256 + 7 * 5


def test_load_restores_everything(trained: tuple[Evaluation, Path, Any]) -> None:
    e, folder, _ = trained
    agent = load(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["agent.json", "encoder.json", "policy.safetensors"]
    assert agent.spec == EncoderSpec.parse(ENCODER, agent.card)
    assert agent.evaluation.returns == e.returns
    assert agent.request == REQUEST
    assert not agent.policy.training
    assert agent.policy.observation_space == encoder_space(agent.card)
    again = load(str(folder))
    for (name, a), b in zip(agent.policy.state_dict().items(), again.policy.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    side = agent.policy.state_dict()
    assert torch.equal(side["features_extractor.encoder.fusion.net.0.weight"],
                       side["pi_features_extractor.encoder.fusion.net.0.weight"])


def test_a_loaded_agent_takes_strings_it_has_never_seen_and_can_act_at_random(
        trained: tuple[Evaluation, Path, Any]) -> None:
    agent = load(trained[1])
    obs = {"position": np.array([0.5, 0, 0, 0], np.float32), "words": "Go far left, please.",
           "noise": np.zeros(4, np.float32)}
    action = agent.predict(obs)
    assert action.shape == (2,)
    assert agent.card.action_space.contains(action)
    left, right = (agent.predict({**obs, "words": f"Kindly aim {w}, would you"})[1] for w in ("far left", "far right"))
    assert left < right, "what it learnt of the words holds in a new sentence"
    assert np.array_equal(agent.predict(obs), action)
    drawn = {tuple(agent.predict(obs, deterministic=False)) for _ in range(5)}
    assert len(drawn) == 5


Damage = Callable[[Path], Any]


def edit(**values: Any) -> Damage:
    def damage(folder: Path) -> None:
        about = json.loads((folder / "agent.json").read_text())
        for key, value in values.items():
            if value is None:
                del about[key]
            else:
                about[key] = value
        (folder / "agent.json").write_text(json.dumps(about))

    return damage


def cut_weights(folder: Path) -> None:
    path = folder / "policy.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def other_weights(folder: Path) -> None:
    state = load_file(folder / "policy.safetensors")
    save_file({k: v for k, v in state.items() if not k.startswith("action_net")}, folder / "policy.safetensors")


def other_encoder(folder: Path) -> None:
    data = json.loads((folder / "encoder.json").read_text())
    data["sources"]["position"]["width"] = 16
    (folder / "encoder.json").write_text(json.dumps(data))


@pytest.mark.parametrize(("damage", "says"), [
    (shutil.rmtree, "is no agent: it has no agent.json"),
    (lambda f: (f / "agent.json").unlink(), "is no agent: it has no agent.json"),
    (lambda f: (f / "agent.json").write_bytes(b"\xff\xfe"), "cannot read"),
    (lambda f: (f / "agent.json").write_text("[" * 100_000), "cannot read"),
    (lambda f: (f / "agent.json").write_text("[1]"), "not complete"),
    (lambda f: (f / "agent.json").write_text("null"), "not complete"),
    (lambda f: (f / "policy.safetensors").unlink(), "policy.safetensors"),
    (lambda f: (f / "policy.safetensors").write_bytes(b""), "policy.safetensors"),
    (cut_weights, "policy.safetensors"),
    (other_weights, "the weights do not fit the encoder"),
    (other_encoder, "the weights do not fit the encoder"),
    (lambda f: (f / "encoder.json").write_text("{"), "encoder.json"),
    (lambda f: (f / "encoder.json").unlink(), "encoder.json"),
    (edit(format=2), "has the format 2, this version reads 1"),
    (edit(format=None), "not complete"), (edit(request=None), "not complete"), (edit(strings=None), "not complete"),
    (edit(evaluation={"status": "great"}), "not complete"), (edit(strings=7), "not complete"),
    (edit(layout={}), "was trained for"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_a_damaged_agent_is_a_clear_error(copy: Path, damage: Damage, says: str) -> None:
    damage(copy)
    with pytest.raises(LacerError) as e:
        load(copy)
    assert says in str(e.value)
    assert str(copy) in str(e.value)


def test_an_agent_cut_at_any_byte_is_a_clear_error(copy: Path) -> None:
    data = (copy / "agent.json").read_bytes()
    for n in [0, 1, 2, *np.linspace(3, len(data) - 3, 40).astype(int)]:
        (copy / "agent.json").write_bytes(data[:n])
        with pytest.raises(LacerError, match=r"agent\.json"):
            load(copy)


def test_an_environment_of_another_layout_is_a_clear_error(trained: tuple[Evaluation, Path, Any]) -> None:
    for kwargs in ({"sources": ["position", "words"]}, {"relevant": ["words"]}):
        with pytest.raises(LacerError, match=r"was trained for lacer/KnownSources-v0 with .* but the environment now"):
            load(trained[1], env_kwargs=kwargs)
    assert load(trained[1], env_kwargs={"horizon": 3}).card.env_id == ENV
    assert load(trained[1]).request.env_kwargs == SOURCES


def test_an_agent_of_other_versions_that_is_not_understood_says_so(copy: Path) -> None:
    about = json.loads((copy / "agent.json").read_text())
    about["evaluation"]["versions"].update({"lacer": "0.0.1", "torch": "1.2"})
    (copy / "agent.json").write_text(json.dumps(about))
    assert load(copy).spec, "other versions alone do no harm"
    other_weights(copy)
    with pytest.raises(LacerError, match=r"(?s)not fit .*\. It was saved with lacer 0\.0\.1 \(here .*, torch 1\.2 \("):
        load(copy)


def test_an_agent_needs_its_folder_alone(trained: tuple[Evaluation, Path, Any], tmp_path: Path) -> None:
    """In another process, another working folder, at another place: no path of the training is in it."""
    moved = Path(shutil.copytree(trained[1], tmp_path / "elsewhere"))
    for file in ("agent.json", "encoder.json"):
        assert str(trained[1].parent) not in (moved / file).read_text()
    script = ("import sys, numpy as np; from lacer.agents import load; from stable_baselines3.common.policies import "
              "ActorCriticPolicy; a = load('elsewhere'); assert isinstance(a.policy, ActorCriticPolicy); "
              "print(a.predict({'position': np.full(4, .5, np.float32), 'words': 'Go left, please.', "
              "'noise': np.zeros(4, np.float32)}).tolist())")
    done = subprocess.run([sys.executable, "-P", "-c", script], cwd=tmp_path, capture_output=True, text=True,
                          check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr
    want = load(trained[1]).predict({"position": np.full(4, .5, np.float32), "words": "Go left, please.",
                                     "noise": np.zeros(4, np.float32)})
    assert json.loads(done.stdout) == pytest.approx(want.tolist(), abs=1e-6)


def test_a_text_model_that_lies_elsewhere(copy: Path) -> None:
    about = json.loads((copy / "agent.json").read_text())
    about["request"]["text_model"] = "/nobody/has/this"
    (copy / "agent.json").write_text(json.dumps(about))
    with pytest.raises(LacerError, match="cannot load the text model '/nobody/has/this'"):
        load(copy)
    assert load(copy, text_model="hash").table.model_name == "hash"


def test_loading_a_run_instead_of_its_agent_says_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    with pytest.raises(LacerError, match="It is a run; its agent is in best/"):
        load(tmp_path)


@pytest.mark.parametrize("rate", [1e6, 1e30])
def test_a_diverging_candidate_is_a_failed_evaluation(rate: float, capfd: pytest.CaptureFixture[str]) -> None:
    e = run(changed(REQUEST, {"steps": 1024}, {"learning_rate": rate}))
    assert e.status == "failed"
    assert not e.ok
    assert e.objective is None
    assert "diverged" in e.reason
    assert len(e.reason) < 200
    assert e.versions
    assert capfd.readouterr().err.count("\n") < 20, "no page-long tensors"


def test_rewards_that_are_not_finite_are_a_failed_evaluation() -> None:
    e = run(small("NotFinite"))
    assert e.status == "failed"
    assert e.reason == "the environment gave the reward nan (after 0 steps)"
    e = run(small("NotFinite", encoder=None))
    assert e.status == "failed"
    assert "not finite" in e.reason


@pytest.mark.parametrize("error", ["KeyError", "RuntimeError", "AssertionError", "ValueError"])
@pytest.mark.parametrize("train", [True, False])
def test_an_environment_that_raises_is_a_failed_evaluation(error: str, train: bool,
                                                           capfd: pytest.CaptureFixture[str]) -> None:
    request = small("Raises", env_kwargs={"error": error}, **({} if train else {"encoder": None}))
    e = run(request)
    assert e.status == "failed"
    assert e.reason.startswith(error)
    assert "broken sensor" in e.reason
    assert "in step" in capfd.readouterr().err, "the log has the traceback"


def test_an_environment_without_the_objective_is_a_clear_error() -> None:
    with pytest.raises(LacerError, match=r'NoMetrics-v0: info\["metrics"\] .* must hold the objective \'sum\''):
        run(small("NoMetrics"))


@pytest.mark.parametrize(("request_", "says"), [
    (small("Tini"), "did you mean 'helper/Tiny-v0'?"),
    (small("Tiny", env_kwargs={"horizn": 3}), "does not take these arguments"),
    (small("Tiny", encoder={"sources": {"number": {"block": "linear"}}, "fusion": {"block": "concat"}}),
     "did you mean 'numbers'?"),
    (small("Tiny", text_model="/no/such/model"), "cannot load the text model"),
], ids=["environment", "argument", "source", "text model"])
def test_a_wrong_request_is_raised(request_: RunRequest, says: str) -> None:
    with pytest.raises(LacerError) as e:
        run(request_)
    assert says in str(e.value)


@pytest.mark.parametrize("actions", ["Discrete", "MultiDiscrete", "MultiBinary", "Box far from 0"])
def test_every_kind_of_action_space(actions: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Training, saving, loading; and random actions, valid and the same each time, where there is no no-op."""
    original = helper_envs.Tiny.step
    taken: list[np.ndarray] = []

    def step(self: helper_envs.Tiny, action: Any) -> Any:
        taken.append(np.array(action))
        return original(self, action)

    monkeypatch.setattr(helper_envs.Tiny, "step", step)
    folder = tmp_path / "agent"
    request = small("Tiny", env_kwargs={"actions": actions}, save_to=str(folder))
    e = run(request)
    assert e.ok, e.reason
    agent = load(folder)
    space = agent.card.action_space
    assert space.contains(agent.predict({"numbers": np.zeros(2, np.float32), "words": ""}))
    assert all(space.contains(a.astype(space.dtype)) for a in taken)
    found = []
    for _ in range(2):
        taken.clear()
        assert run(request.model_copy(update={"encoder": None})).ok
        found.append(np.array(taken))
    assert np.array_equal(*found)
    assert len(np.unique(found[0], axis=0)) > 1
    assert all(space.contains(a.astype(space.dtype)) for a in found[0])


def test_observations_of_the_policy() -> None:
    card = task_card(ENV, sources=["position", "trend", "picture", "words", "crowd"])
    table = TextTable("hash")
    env = make(ENV, sources=["position", "trend", "picture", "words", "crowd"])
    obs, _ = env.reset(seed=0)
    batch = encode_batch({k: [v] if isinstance(v, str) else v[None] for k, v in obs.items()}, card, table)
    space = encoder_space(card)
    assert space.contains({k: v[0] for k, v in batch.items()})
    assert np.array_equal(batch["picture"][0, 1], obs["picture"][..., 1])
    assert table.strings == [obs["words"]]


def test_mean_interval() -> None:
    rng = np.random.default_rng(0)
    x = list(rng.normal(5, 2, 100))
    mean, iqm, low, high = mean_interval(x)
    assert mean == pytest.approx(np.mean(x))
    assert iqm == pytest.approx(np.mean(np.sort(x)[25:75]))
    assert (low, high) == pytest.approx((mean - 1.96 * np.std(x) / 10, mean + 1.96 * np.std(x) / 10), abs=0.05)
    assert mean_interval(x) == (mean, iqm, low, high)
    assert mean_interval([3.0]) == (3, 3, 3, 3)


def helper(env: str, **kwargs: Any) -> RunRequest:
    return RunRequest(env=f"helper_envs:helper/{env}-v0", text_model="hash", protocol=Protocol(
        steps=64, eval_episodes=3, ppo=PPOConfig(n_envs=2, n_steps=16, batch_size=32, n_epochs=1, head=(8,))), **kwargs)


def test_pictures_with_more_channels_than_rows() -> None:
    e = run(helper("ReusesState", encoder={"sources": {"picture": {"block": "cnn"}}, "fusion": {"block": "concat"}}))
    assert e.ok, e.reason


def test_states_that_an_environment_changes_in_place() -> None:
    request = helper("ReusesState", encoder=None)
    card = task_card(request.env)
    rows = evaluate(None, card, TextTable("hash"), request.env, {}, request.protocol).rows
    assert [s["step"] for s in rows["state"]] == [float(o["picture"].max()) for o in rows["obs"]]
    assert {s["step"] for s in rows["state"]} == {0, 1, 2, 3}


def test_an_environment_that_fails_is_a_failed_evaluation() -> None:
    e = run(helper("SeesNothing", encoder={"sources": {"numbers": {"block": "mlp"}}, "fusion": {"block": "concat"}}))
    assert e.status == "failed"
    assert "'numbers' holds NaN" in e.reason


@pytest.mark.parametrize(("seed", "wrong"), [(999_998, False), (999_999, True), (1_000_002, True), (1_000_003, False)])
def test_no_training_plays_the_evaluation(seed: int, wrong: bool) -> None:
    encoder = {"sources": {"numbers": {"block": "mlp"}}, "fusion": {"block": "concat"}}
    request = helper("Tiny", seed=seed, encoder=encoder)
    if wrong:
        with pytest.raises(LacerError, match=f"seed {seed} is among the evaluation's, 1000000 to 1000002"):
            run(request)
    else:
        assert run(request).ok


@pytest.mark.parametrize("space", [
    spaces.MultiDiscrete([2, 2], start=[1, 1]), spaces.Box(0, 3, (2,), np.int64), spaces.MultiBinary([2, 2]),
    spaces.MultiDiscrete([[2, 2], [3, 3]])])
def test_actions_that_ppo_cannot_take(space: spaces.Space) -> None:
    with pytest.raises(LacerError, match="must"):
        replace(task_card("helper_envs:helper/Tiny-v0"), action_space=space)


def test_an_episode_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ppo, "LONGEST_EPISODE", 50)
    with pytest.raises(LacerError, match=r"no episode ended within 50 steps; let it end, e\.g\. by max_episode_steps"):
        run(helper("Tiny", encoder=None, env_kwargs={"horizon": 10**9}))
    assert run(helper("Tiny", encoder=None, env_kwargs={"horizon": 49})).ok
