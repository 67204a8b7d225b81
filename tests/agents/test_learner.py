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
