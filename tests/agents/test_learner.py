"""Our PPO loop against Stable-Baselines3's own: the same numbers without shortcuts, close ones with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv

from lacer.agents.evaluation import PPOConfig, Protocol
from lacer.agents.learner import CompositePPO, Diverged
from lacer.agents.policy import CompositePolicy, policy_kwargs
from lacer.agents.ppo import make_model
from lacer.agents.rollout import SourceRolloutBuffer
from lacer.agents.vec import EncoderVecEnv, encoder_space
from lacer.encoders import EncoderSpec, TextTable
from lacer.envs import task_card
from lacer.envs.vec import close_vec, make_one, make_vec

ENV = "lacer/KnownSources-v0"
ENCODER = {"sources": {"position": {"block": "mlp"}, "trend": {"block": "gru"}, "picture": {"block": "cnn"},
                       "words": {"block": "sentence_mlp"}}, "fusion": {"block": "concat"}}
TINY = {"sources": {"numbers": {"block": "mlp"}, "words": {"block": "sentence_mlp"}}, "fusion": {"block": "concat"}}
CONFIG = PPOConfig(n_envs=3, n_steps=32, batch_size=40, n_epochs=2, ent_coef=0.01, head=(16,))
STEPS = 3 * 96


def ours(config: PPOConfig, encoder: dict[str, Any] = ENCODER, env: str = ENV, **kwargs: Any) -> CompositePPO:
    card, table = task_card(env, **kwargs), TextTable("hash")
    venv = EncoderVecEnv(make_vec(env, config.n_envs, kwargs, seed=7), card, table)
    model = make_model(EncoderSpec.parse(encoder, card), card, table, venv, Protocol(ppo=config), 7)
    assert isinstance(model, CompositePPO)
    return model


def theirs(p: PPOConfig, encoder: dict[str, Any] = ENCODER, env: str = ENV, **kwargs: Any) -> PPO:
    """SB3's own loop, buffer and vectorised environments, with the same policy."""
    card, table = task_card(env, **kwargs), TextTable("hash")
    venv = EncoderVecEnv(DummyVecEnv([lambda: make_one(env, kwargs)] * p.n_envs), card, table)
    model = PPO(CompositePolicy, venv, n_steps=p.n_steps, batch_size=p.batch_size, n_epochs=p.n_epochs,
                learning_rate=p.learning_rate, gamma=p.gamma, gae_lambda=p.gae_lambda, clip_range=p.clip_range,
                ent_coef=p.ent_coef, vf_coef=p.vf_coef, max_grad_norm=p.max_grad_norm, use_sde=p.use_sde,
                sde_sample_freq=p.sde_sample_freq, seed=7,
                policy_kwargs=policy_kwargs(EncoderSpec.parse(encoder, card), card, table, p.head, p.log_std_init))
    model.set_logger(Logger(None, []))
    return model


def learnt(model: PPO, steps: int = STEPS) -> dict[str, torch.Tensor]:
    model.learn(steps)
    assert model.env is not None
    close_vec(model.env)
    return {k: v.clone() for k, v in model.policy.state_dict().items()}


@pytest.mark.parametrize(("config", "env", "encoder", "kwargs"), [
    ({}, ENV, ENCODER, {}),
    ({"use_sde": True, "sde_sample_freq": 4}, ENV, ENCODER, {"horizon": 5}),
    ({"n_epochs": 3}, "helper_envs:helper/Tiny-v0", TINY, {"actions": "Discrete"}),
    ({}, "helper_envs:helper/Tiny-v0", TINY, {"actions": "MultiDiscrete"}),
    ({}, ENV, {**ENCODER, "fusion": {"block": "concat", "modality_dropout": 0.1}}, {}),
], ids=["Gaussian", "gSDE", "Discrete", "MultiDiscrete", "dropout"])
def test_without_shortcuts_the_weights_are_those_of_sb3s_own_loop(
        config: dict[str, Any], env: str, encoder: dict[str, Any], kwargs: dict[str, Any]) -> None:
    p = CONFIG.model_copy(update=config)
    a = ours(p, encoder, env, **kwargs)
    start = {k: v.clone() for k, v in a.policy.state_dict().items()}
    after = learnt(a)
    b = theirs(p, encoder, env, **kwargs)
    want = learnt(b)
    assert a.num_timesteps == b.num_timesteps == STEPS
    for name, value in want.items():
        assert torch.equal(after[name], value), name
    assert any(not torch.equal(start[k], v) for k, v in after.items())
    assert [i["r"] for i in a.ep_info_buffer or ()] == [i["r"] for i in b.ep_info_buffer or ()]


@pytest.mark.parametrize("shortcuts", [("fused_adam",), ("channels_last",), ("halves",), ("bf16",), ("overlap",),
                                       ("fused_adam", "channels_last", "halves", "overlap")])
def test_shortcuts_repeat_and_change_little(shortcuts: tuple[Any, ...]) -> None:
    """One update on the same rollout: rounding apart, the same weights. `overlap` changes the second rollout only."""
    config = CONFIG.model_copy(update={"n_steps": 16, "n_epochs": 1})
    p = config.model_copy(update={"shortcuts": shortcuts})
    threads = torch.get_num_threads()

    def train(config: PPOConfig, steps: int) -> dict[str, torch.Tensor]:
        model = ours(config)
        if "halves" in config.shortcuts:
            model.parts = 2
        return learnt(model, steps)

    start = ours(p).policy.state_dict()
    plain, short = train(config, 48), train(p, 48)
    longer, again, want = (train(c, 144) for c in (p, p, config))
    assert torch.get_num_threads() == threads
    moved = torch.cat([(plain[k] - start[k]).abs().flatten() for k in plain]).mean()
    apart = torch.cat([(plain[k] - short[k]).abs().flatten() for k in plain]).mean()
    assert apart < (0.1 if shortcuts == ("bf16",) else 2e-3) * moved
    assert all(torch.equal(longer[k], again[k]) for k in longer), "the same seed gives the same weights"
    assert any(not torch.equal(longer[k], want[k]) for k in longer), "it does something"


def test_an_encoder_with_random_numbers_is_neither_cut_nor_overlapped() -> None:
    random = {**ENCODER, "fusion": {"block": "concat", "modality_dropout": 0.1}}
    short = ours(CONFIG.model_copy(update={"shortcuts": ("halves", "overlap")}), random)
    got, want = learnt(short), learnt(ours(CONFIG, random))
    assert not short.plain
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_the_buffer_gives_sb3s_minibatches_and_takes_no_memory_twice() -> None:
    card = task_card(ENV)
    space = encoder_space(card)
    sides = [DictRolloutBuffer(6, space, card.action_space, n_envs=2),
             SourceRolloutBuffer(6, space, card.action_space, n_envs=2),
             SourceRolloutBuffer(6, space, card.action_space, n_envs=2, sources=["picture"], channels_last=True)]
    memory = [id(b._memory) for b in sides[1:] if isinstance(b, SourceRolloutBuffer)]
    for rollout in range(2):
        for b in sides:
            rng = np.random.default_rng(rollout)
            space.seed(rollout)
            b.reset()
            for _ in range(6):
                obs = {k: np.stack([space[k].sample() for _ in range(2)]) for k in space}
                numbers = torch.as_tensor(rng.normal(size=(3, 2)), dtype=torch.float32)
                b.add(obs, rng.normal(size=(2, 4)).astype(np.float32), numbers[0].numpy(), np.zeros(2, bool),
                      numbers[1], numbers[2])
            b.compute_returns_and_advantage(torch.zeros(2), np.zeros(2, bool))
        drawn = []
        for b in sides:
            np.random.seed(rollout)
            drawn.append(list(b.get(5)))
        for theirs_, mine, part in zip(*drawn, strict=True):
            assert set(part.observations) == {"picture"}
            assert part.observations["picture"].is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(part.observations["picture"], theirs_.observations["picture"])
            for k, v in theirs_.observations.items():
                assert torch.equal(mine.observations[k], v)
                assert mine.observations[k].dtype == v.dtype == torch.as_tensor(np.zeros(0, space[k].dtype)).dtype
            for a, b_ in zip(theirs_[1:], mine[1:], strict=True):
                assert torch.equal(a, b_)
    for b in sides[1:]:
        assert isinstance(b, SourceRolloutBuffer)
        assert id(b._memory) in memory
        assert all(np.shares_memory(b.observations[k], m) for k, m in b._memory.items())


@pytest.mark.parametrize("where", ["parameter", "rate"])
def test_it_ends_at_the_first_number_that_is_not_finite(where: str) -> None:
    model = ours(CONFIG)
    if where == "parameter":
        with torch.no_grad():
            model.policy.value_net.weight[0, 0] = float("nan")
    else:
        model.policy.action_net.weight.register_hook(lambda g: g * float("inf"))
    before = {k: v.clone() for k, v in model.policy.state_dict().items()}
    with pytest.raises(Diverged, match="after 96 steps"):
        model.learn(STEPS)
    assert model.num_timesteps == 96, "the first update"
    assert all(torch.equal(v, before[k]) or where == "parameter" for k, v in model.policy.state_dict().items())
    assert torch.distributions.Distribution._validate_args, "checks of distributions are back"
