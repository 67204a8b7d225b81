"""Probes of real runs: in mid-training without a trace, of permuted sources, of gradients; hopeless runs end."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from pydantic import ValidationError
from stable_baselines3.common.callbacks import BaseCallback

from lacer.agents import Evaluation, PPOConfig, Protocol, RunRequest, probing, run
from lacer.agents.policy import CompositePolicy, policy_kwargs
from lacer.agents.ppo import Episodes, evaluate, make_model
from lacer.agents.probes import FUSED, MEANING
from lacer.agents.probing import Permuted, Probing, Rows, gradients, rows_of_episodes, take
from lacer.agents.vec import EncoderVecEnv, encoder_space
from lacer.encoders import EncoderSpec, TextTable
from lacer.envs import task_card
from lacer.envs.vec import close_vec, make_vec

ENV = "lacer/KnownSources-v0"
SOURCES = {"sources": ["position", "words", "noise"], "relevant": ["position"]}
ENCODER = {"sources": {"position": {"block": "mlp", "width": 16}, "words": {"block": "sentence_mlp"},
                       "noise": {"block": "linear", "width": 8}},
           "fusion": {"block": "concat", "width": 16}}
PPO = PPOConfig(n_envs=4, n_steps=16, batch_size=32, n_epochs=2, learning_rate=3e-3, gamma=0.01, head=(16,))
PLAIN = Protocol(steps=512, eval_episodes=4, probes=(), ppo=PPO)
NEEDS = frozenset({"layers", "permuted", "gradient"})


def request(**protocol: Any) -> RunRequest:
    changed = Protocol.model_validate({**PLAIN.model_dump(), **protocol})
    return RunRequest(env=ENV, env_kwargs=SOURCES, encoder=ENCODER, protocol=changed, seed=1, text_model="hash")


@pytest.fixture(scope="module")
def plain() -> Evaluation:
    return run(request())


@pytest.fixture(scope="module")
def probed() -> Evaluation:
    return run(request(probes=None, probe_at=(0.25, 0.6), permuted_episodes=2))


def built(space: spaces.Space | None = None, **ppo: Any) -> tuple[CompositePolicy, Any, TextTable]:
    """A policy that was not trained, for any action space; the card; the texts."""
    card, table = task_card(ENV, **SOURCES), TextTable("hash", ["left", "right", "centre"])
    torch.manual_seed(0)
    policy = CompositePolicy(encoder_space(card), space or card.action_space, lambda _: 0.0,
                             **policy_kwargs(EncoderSpec.parse(ENCODER, card), card, table, (16,), -1.0))
    return policy, card, table


def some_rows(n: int = 100) -> Rows:
    rng = np.random.default_rng(0)
    obs = {"position": rng.normal(size=(n, 4)).astype(np.float32), "noise": rng.normal(size=(n, 4)).astype(np.float32),
           "words": rng.integers(3, size=(n, 1))}
    return Rows(obs, {"x": obs["position"][:, 0]}, rng.normal(size=n), rng.normal(size=n), np.arange(n) // 10)


def test_probes_change_nothing(plain: Evaluation, probed: Evaluation) -> None:
    """All of them, in mid-training too: the same training, bit for bit."""
    assert plain.probes == {"position": {}, "words": {}, "noise": {}, FUSED: {}}
    assert plain.probe_curve == []
    assert probed.curve == plain.curve
    assert probed.returns == plain.returns
    assert probed.metrics == plain.metrics


def test_what_a_run_tells(probed: Evaluation) -> None:
    assert [step for step, _ in probed.probe_curve] == [128, 320], "the first rollouts that end at or after the points"
    for probes in (probed.probes, *(p for _, p in probed.probe_curve)):
        assert list(probes) == ["position", "words", "noise", FUSED]
        names = {k for v in probes.values() for k in v if "/" not in k}
        assert names == set(MEANING) - ({"permuted_return"} if probes is not probed.probes else set())
        assert sum(v["gradient_share"] for v in probes.values()) == pytest.approx(1)
        assert probes["position"]["linear_probe"] > probes["noise"]["linear_probe"]
    assert probed.probe_curve[1][1]["position"]["linear_probe/target_position"] > 0.8
    again = Evaluation.model_validate_json(probed.model_dump_json())
    assert again == probed
    assert json.loads(probed.model_dump_json()) == probed.model_dump(mode="json")
    assert probed.cost.env_steps == 512 + 4 * 16 + 3 * 2 * 16, "the episodes of permuted_return count"
    assert 0 < probed.cost.probe_seconds < probed.cost.total_seconds


def test_chosen_probes_only() -> None:
    e = run(request(steps=128, probes=["srank", "dead_units"]))
    assert set(e.probes[FUSED]) == {"srank", "dead_units"}


def test_states_in_mid_training_belong_to_the_observations_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """In KnownSources the target is the first number of `position`; also at the first step of an episode."""
    seen: list[Rows] = []
    original = probing.take

    def take(policy: Any, rows: Rows, *args: Any) -> Any:
        seen.append(rows)
        return original(policy, rows, *args)

    monkeypatch.setattr(probing, "take", take)
    run(request(steps=256, probe_at=(0.5,), probes=["linear_probe"], ppo={**PPO.model_dump(), "n_steps": 23}))
    rows = seen[0]
    assert len(rows) == 4 * 23 * 2, "the rollouts within reach of probe_rows are joined"
    np.testing.assert_allclose(rows.obs["position"][:, 0], rows.state["target_position"], atol=1e-6)
    counts = np.unique(rows.groups, return_counts=True)[1]
    assert counts.max() == 16, "an episode that two rollouts share is one"
    assert len(counts) == 4 * 3


def test_rows_of_episodes() -> None:
    rows = {"obs": [{"x": np.array([float(i)])} for i in range(5)],
            "state": [*({"s": i, "t": 0} for i in range(4)), {"s": 4}],
            "reward": [1.0, 2.0, 3.0, 4.0, 5.0], "episode": [7, 8, 7, 8, 7]}
    got = rows_of_episodes(rows, 0.5, 99)
    assert got.returns.tolist() == [1 + 3 / 2 + 5 / 4, 2 + 4 / 2, 3 + 5 / 2, 4, 5]
    assert got.groups.tolist() == [7, 8, 7, 8, 7]
    assert got.obs["x"].tolist() == [[0], [1], [2], [3], [4]]
    assert {k: v.tolist() for k, v in got.state.items()} == {"s": [0, 1, 2, 3, 4]}, "what every row tells"
    few = rows_of_episodes(rows, 0.5, 3)
    assert len(few) == 3
    kept = few.obs["x"][:, 0].astype(int)
    assert (np.diff(kept) > 0).all()
    assert few.returns.tolist() == got.returns[kept].tolist()


@pytest.mark.parametrize("space", [
    spaces.Box(-1, 1, (2,), np.float32), spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(4)],
    ids=lambda s: type(s).__name__)
def test_every_kind_of_action(space: spaces.Space) -> None:
    policy, *_ = built(space)
    policy.set_training_mode(True)
    rows = some_rows()
    sample = take(policy, rows, NEEDS)
    assert policy.training, "as it was"
    greedy, _ = policy.predict(rows.obs, deterministic=True)
    assert sample.action is not None
    np.testing.assert_allclose(sample.action, np.asarray(greedy).reshape(100, -1), atol=1e-5)
    assert np.issubdtype(sample.action.dtype, np.integer) == (not isinstance(space, spaces.Box))
    assert set(sample.permuted) == {"position", "words", "noise"}
    assert all(a > 0 and v > 0 for a, v in sample.permuted.values())


def test_a_source_that_the_policy_ignores_changes_nothing_when_permuted() -> None:
    policy, *_ = built()
    encoder = policy.features_extractor.encoder  # type: ignore[union-attr]
    first = encoder.fusion.net[0]
    with torch.no_grad():
        first.weight[:, -8:] = 0  # noise comes last
        first.weight[:, :16] *= 100  # and position is all that counts
    permuted = take(policy, some_rows(), NEEDS).permuted
    assert permuted["noise"] == (0, 0)
    assert min(permuted["position"]) > 0.7
    assert max(permuted["words"]) < 0.3


class Grab(BaseCallback):
    """At the first rollout's end: shares, and what PPO's own loss gives by backward()."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        if hasattr(self, "shares"):
            return
        model: Any = self.model
        before = torch.get_rng_state()
        self.shares = gradients(model)
        model.microbatch = 10
        self.in_pieces = gradients(model)
        assert torch.equal(torch.get_rng_state(), before)
        assert all(p.grad is None for p in model.policy.parameters())
        encoder = model.policy.features_extractor.encoder
        data = next(iter(model.rollout_buffer.get(64)))
        model.rollout_buffer.generator_ready = False
        values, log_prob, _ = model.policy.evaluate_actions(data.observations, data.actions)
        adv = (data.advantages - data.advantages.mean()) / (data.advantages.std() + 1e-8)
        critic = ((data.returns - values.flatten()) ** 2).mean()
        loss = 0.5 * critic - (adv * (log_prob - data.old_log_prob).exp()).mean()
        model.policy.zero_grad()
        loss.backward()
        self.want = {n: float(torch.cat([p.grad.flatten() for p in m.parameters()]).norm())
                     for n, m in {**dict(encoder.blocks.items()), FUSED: encoder.fusion}.items()}
        raise StopIteration


def test_gradients_against_backward() -> None:
    card, table = task_card(ENV, **SOURCES), TextTable("hash")
    env = EncoderVecEnv(make_vec(ENV, 4, SOURCES, seed=0), card, table)
    grab = Grab()
    try:
        model = make_model(EncoderSpec.parse(ENCODER, card), card, table, env, PLAIN, 0)
        with pytest.raises(StopIteration):
            model.learn(64, callback=grab)
    finally:
        close_vec(env)
    assert grab.shares == pytest.approx(grab.want, rel=1e-3)
    assert grab.shares == pytest.approx(grab.in_pieces, rel=1e-5)


def test_mid_training_probes_copy_their_rows_and_not_the_rollout() -> None:
    """And these are the rows that were drawn when all were copied first."""
    card, table = task_card(ENV), TextTable("hash")
    env = EncoderVecEnv(make_vec(ENV, 4, seed=0), card, table)
    protocol = PLAIN.model_copy(update={"steps": 4096, "probe_at": (0.2, 0.6), "probe_rows": 64, "ppo": PPO.model_copy(
        update={"n_steps": 256, "n_epochs": 1})})
    spec = EncoderSpec.parse({"sources": {"picture": {"block": "cnn"}}, "fusion": {"block": "concat"}}, card)
    peaks: list[int] = []
    seen: list[Rows] = []
    want: list[np.ndarray] = []

    class Watched(Probing):
        def _on_rollout_end(self) -> None:
            pictures = self.model.rollout_buffer.observations["picture"]
            rows = pictures.reshape(-1, *pictures.shape[2:])
            want.append(rows[np.sort(np.random.default_rng(0).choice(len(rows), 64, replace=False))].copy())
            del rows
            tracemalloc.start()
            super()._on_rollout_end()
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

    def taken(policy: Any, rows: Rows, *args: Any) -> Any:
        seen.append(rows)
        return take(policy, rows, *args)

    try:
        model = make_model(spec, card, table, env, protocol, 0)
        with pytest.MonkeyPatch.context() as m:
            m.setattr(probing, "take", taken)
            model.learn(1024, callback=Watched(protocol.model_copy(update={"probes": ("gradient_share",)})))
    finally:
        close_vec(env)
    assert len(seen) == 1
    np.testing.assert_array_equal(seen[0].obs["picture"], want[0])
    assert max(peaks) < model.rollout_buffer._memory["picture"].nbytes / 2


def test_a_permuted_policy_is_shown_another_moment() -> None:
    policy, card, table = built()
    rows = some_rows()
    fooled = Permuted(policy, "position", rows.obs["position"], 0)
    greedy = [p.predict(rows.obs, deterministic=True)[0] for p in (policy, fooled)]
    assert not np.allclose(*greedy)
    assert len(evaluate(fooled, card, table, ENV, SOURCES, PLAIN).returns) == 4
    only = Permuted(policy, "position", rows.obs["position"][:1], 0)
    shown = {**rows.obs, "position": np.repeat(rows.obs["position"][:1], 100, 0)}
    np.testing.assert_allclose(only.predict(rows.obs)[0], policy.predict(shown, deterministic=True)[0], atol=1e-6)


class Reader:
    """Answers with the target that ``position`` holds, and 0 for others."""

    def predict(self, obs: Mapping[str, np.ndarray], deterministic: bool = True) -> Any:
        return obs["position"][:, :1], None


def test_return_lost_without_a_source_in_closed_form() -> None:
    """A perfect reader gets 1 a step; shown another moment, it errs as two independent uniform numbers on [-1, 1]
    do, (a - t)^2 = 2/3 on average, and gets 1 - 3 * 2/3 = -1."""
    kwargs = {"sources": ["position", "noise"], "relevant": ["position"]}
    card = task_card(ENV, **kwargs)
    protocol = Protocol(eval_episodes=60, ppo=PPOConfig(n_envs=20))

    def played(policy: Any) -> Episodes:
        return evaluate(policy, card, TextTable("hash"), ENV, kwargs, protocol)

    intact = played(Reader())
    assert np.mean(intact.returns) == pytest.approx(16, abs=1e-3)
    for source, lost in (("position", 32), ("noise", 0)):
        seen = np.stack([o[source] for o in intact.rows["obs"]])
        assert 16 - np.mean(played(Permuted(Reader(), source, seen, 0)).returns) == pytest.approx(lost, abs=2.5)


def test_the_truth_in_small() -> None:
    """What benchmarks/probe_truth.py asks with more sources and seeds: use, redundancy."""
    used = ("position", "trend", "echo", "noise")
    encoder = {"sources": {n: {"block": "cnn" if n == "trend" else "mlp", "width": 16} for n in used},
               "fusion": {"block": "concat", "width": 32}}
    ppo = PPOConfig(n_envs=16, n_steps=16, batch_size=128, n_epochs=4, learning_rate=3e-3, gamma=0.01, gae_lambda=0.0,
                    log_std_init=-1.0)
    p = run(RunRequest(env=ENV, env_kwargs={"sources": used, "relevant": used[:2]}, encoder=encoder, text_model="hash",
                       protocol=Protocol(steps=2048, eval_episodes=16, ppo=ppo))).probes
    for name in ("permuted_action", "mi_action", "linear_probe"):
        assert min(p[s][name] for s in used[:2]) > 2 * p["noise"].get(name, 0.0), name
    assert p["trend"]["unique_r2"] > 0.3 > 3 * max(p[s]["unique_r2"] for s in ("position", "echo", "noise"))
    for name in ("redundancy", "mi_redundancy"):
        others = [p[a][f"{name}/{b}"] for a in used for b in used if a < b and {a, b} != {"position", "echo"}]
        assert p["position"][f"{name}/echo"] > 2 * max(others), name


# -- hopeless runs -----------------------------------------------------------------------------------------------------


class Broken(Probing):
    """Damages the fusion before the rollout ends that is looked at."""

    how: Any = None

    def _on_rollout_end(self) -> None:
        with torch.no_grad():
            Broken.how(self.model.policy.features_extractor.encoder.fusion)
        super()._on_rollout_end()


def kill(fusion: Any) -> None:
    fusion.net[0].bias[:12] = -1000.0  # 12 of 16 units
    fusion.net[0].bias[12:] = 1000.0


def collapse(fusion: Any) -> None:
    fusion.net[0].weight[:] = fusion.net[0].weight[:1].abs()
    fusion.net[0].bias[:] = 5.0


@pytest.mark.parametrize(("how", "rule", "says"), [
    (kill, {"stop_dead": 0.7}, "dead units: 75.0% of the fusion's units are zero in every row after 256 steps, more "
                               "than 70.0%"),
    (collapse, {"stop_rank": 0.2}, "collapsed rank: the fused state's effective rank is 0.0625 of its width after 256 "
                                   "steps, below 0.2"),
])
def test_hopeless_runs_end_with_their_reason(how: Any, rule: dict[str, float], says: str,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lacer.agents.ppo.Probing", Broken)
    monkeypatch.setattr(Broken, "how", staticmethod(how))
    e = run(request(probe_at=(0.5,), **rule))
    assert (e.status, e.reason) == ("pruned", says)
    assert not e.ok
    assert e.objective is None
    assert e.cost.env_steps == 256
    assert len(e.curve) == 4
    assert [s for s, _ in e.probe_curve] == [256]
    assert e.cost.parameters > 0
    assert run(request(probe_at=(0.5,))).ok, "the same without the rule"


def test_a_sound_run_is_not_ended(plain: Evaluation) -> None:
    e = run(request(probe_at=(0.5,), stop_rank=0.03, stop_dead=0.9))
    assert e.ok
    assert e.returns == plain.returns


@pytest.mark.parametrize(("wrong", "says"), [
    ({"stop_rank": 0.1}, "set probe_at"), ({"stop_dead": 0.5}, "set probe_at"),
    ({"probe_at": [0.0]}, "between 0 and 1"), ({"probe_at": [1.0]}, "between 0 and 1"),
    ({"stop_dead": 2, "probe_at": [0.5]}, "less than or equal to 1"),
    ({"permuted_episodes": 5}, "of which there are 4"),
    ({"probes": ["dead_unit"]}, "did you mean 'dead_units'"), ({"probe_rows": 1}, "greater than or equal to 8"),
])
def test_wrong_protocols(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        request(**wrong)


def test_rewards_in_mid_training_are_the_steps_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """PPO adds the value of the rest to the last reward of a truncated episode; one of KnownSources is at most 1."""
    seen: list[Rows] = []
    original = probing.take
    monkeypatch.setattr(probing, "take", lambda policy, rows, *args: (
        seen.append(rows), original(policy, rows, *args))[1])
    run(request(steps=1024, probe_at=(0.7,), probes=["reward_probe"]).model_copy(update={"env_kwargs": {"horizon": 4}}))
    assert 0 < seen[0].reward.max() <= 1 + 1e-6
