"""Our PPO loop against Stable-Baselines3's own: the same numbers without shortcuts, close ones with them."""

from __future__ import annotations

import platform
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from lacer.agents.evaluation import PPOConfig, Protocol
from lacer.agents.gradient import Gradient
from lacer.agents.learner import CompositePPO, Diverged, kept_memory
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


class CutOff(VecEnvWrapper):
    """Episodes that are cut off, and rewards with 64 bits, as environments in processes of their own give them."""

    def reset(self) -> VecEnvObs:
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        obs, rewards, dones, infos = self.venv.step_wait()
        for i in np.flatnonzero(dones):
            infos[i]["TimeLimit.truncated"] = True
        return obs, rewards.astype(np.float64) / 3, dones, infos


def ours(config: PPOConfig, encoder: dict[str, Any] = ENCODER, env: str = ENV, **kwargs: Any) -> CompositePPO:
    card, table = task_card(env, **kwargs), TextTable("hash")
    venv = EncoderVecEnv(CutOff(make_vec(env, config.n_envs, kwargs, seed=7)), card, table)
    model = make_model(EncoderSpec.parse(encoder, card), card, table, venv, Protocol(ppo=config), 7)
    assert isinstance(model, CompositePPO)
    return model


def theirs(p: PPOConfig, encoder: dict[str, Any] = ENCODER, env: str = ENV, **kwargs: Any) -> PPO:
    """SB3's own loop, buffer and vectorised environments, with the same policy."""
    card, table = task_card(env, **kwargs), TextTable("hash")
    venv = EncoderVecEnv(CutOff(DummyVecEnv([lambda: make_one(env, kwargs)] * p.n_envs)), card, table)
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


class Log(KVWriter):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: Any, step: int = 0) -> None:
        self.rows.append({k: v for k, v in key_values.items() if not k.startswith("time/")})


@pytest.mark.parametrize("settings", [{"clip_range_vf": lambda _: 0.02}, {"target_kl": 1e-4},
                                      {"normalize_advantage": False}], ids=lambda s: next(iter(s)))
def test_sb3s_other_settings_count_too_and_the_log_is_sb3s(settings: dict[str, Any]) -> None:
    weights, logs, updates = [], [], []
    for make in (ours, theirs):
        model = make(CONFIG)
        for name, value in settings.items():
            setattr(model, name, value)
        logs.append(Log())
        model.set_logger(Logger(None, [logs[-1]]))
        weights.append(learnt(model))
        updates.append(model._n_updates)
    (got, want), plain = weights, learnt(ours(CONFIG))
    assert all(torch.equal(got[k], want[k]) for k in want)
    assert any(not torch.equal(got[k], plain[k]) for k in plain), "the setting does something"
    assert updates[0] == updates[1]
    assert (updates[0] < 6) == ("target_kl" in settings)
    assert len(logs[0].rows) == len(logs[1].rows) == 3
    for a, b in zip(logs[0].rows, logs[1].rows, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-8, nan_ok=True)
        assert ("train/approx_kl" in a) == ("train/clip_fraction" in a) == ("train/n_updates" in a)
    assert "train/approx_kl" in logs[0].rows[-1]


@pytest.mark.parametrize("settings", [{}, {"clip_range_vf": lambda _: 0.02}, {"normalize_advantage": False},
                                      {"ent_coef": 0.0, "vf_coef": 2.0}], ids=lambda s: next(iter(s), "plain"))
def test_microbatches_give_the_gradient_and_the_figures_of_the_whole_minibatch(settings: dict[str, Any]) -> None:
    sources = {k: v for k, v in ENCODER["sources"].items() if k != "words"}  # whose embeddings have 32 bits
    model = ours(CONFIG, {**ENCODER, "sources": sources})
    learnt(model, 96)  # the policy is no longer that of the rollout
    for name, value in settings.items():
        setattr(model, name, value)
    model.policy.double()

    def found(rows: int, *how: Any) -> tuple[list[torch.Tensor], tuple[float, ...]]:
        model.policy.zero_grad()
        figures = Gradient(model, *how, model._side_by_side, told=True)(np.arange(96)[::-1][:rows])
        return [p.grad.clone() for p in model._parameters if p.grad is not None], figures

    for rows in (40, 16, 1):
        gradient, figures = found(rows, None, 1)
        assert len(gradient) == len(model._parameters) - 3, "all but those of the picture's tokens"
        assert all(np.isfinite(figures))
        for how in ((16, 1), (7, 1), (1, 1), (1000, 1), (16, 2), (5, 2), (None, 2)):
            other, others = found(rows, *how)
            assert others == pytest.approx(figures, rel=1e-9, abs=1e-12), how
            for a, b in zip(gradient, other, strict=True):
                assert torch.allclose(a, b, rtol=1e-8, atol=1e-12), how
    model._finish()
    assert figures[1] > 0, "approx_kl"


@pytest.mark.parametrize("norm", [False, True])
def test_microbatches_show_the_encoder_so_many_rows_at_a_time(norm: bool) -> None:
    model = ours(CONFIG.model_copy(update={"shortcuts": ("microbatches",), "microbatch_size": 15}))
    encoder = model.policy.features_extractor.encoder
    if norm:  # its statistics are those of minibatches
        encoder.fusion = torch.nn.Sequential(encoder.fusion, torch.nn.BatchNorm1d(encoder.dim))
    rows: list[int] = []
    encoder.register_forward_pre_hook(lambda m, args: rows.append(len(args[0]["picture"])) if m.training else None)
    learnt(model, 96)
    assert rows == ([40, 40, 16] if norm else [13, 13, 14, 13, 13, 14, 8, 8]) * 2


@pytest.mark.parametrize("shortcuts", [("fused_adam",), ("channels_last",), ("batched_ends",), ("halves",), ("bf16",),
                                       ("overlap",), ("microbatches",), ("microbatches", "halves"),
                                       ("fused_adam", "channels_last", "halves", "overlap")])
def test_shortcuts_repeat_and_change_little(shortcuts: tuple[Any, ...]) -> None:
    """One update on the same rollout: rounding apart, the same weights. `overlap` changes the second rollout only."""
    config = CONFIG.model_copy(update={"n_steps": 16, "n_epochs": 1, "microbatch_size": 15})
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


def test_memory_of_rollouts_that_was_given_back_is_taken_anew() -> None:
    def train(free: bool) -> dict[str, torch.Tensor]:
        model = ours(CONFIG)
        model.learn(96)
        if free:
            model.free()
            assert not model.rollout_buffer._memory
        model.learn(96)
        close_vec(model.env)
        return {k: v.clone() for k, v in model.policy.state_dict().items()}

    kept, given = train(False), train(True)
    assert all(torch.equal(kept[k], given[k]) for k in kept)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a matter of glibc")
def test_freed_memory_is_kept_during_a_training_and_given_back_after_it() -> None:
    def work() -> None:
        held = [torch.ones(3_000_000) for _ in range(5)]  # 60 MB, as the activations of a minibatch
        del held

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    faults: list[int] = []
    with kept_memory():
        for _ in range(6):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            work()
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        pages = resident()
    assert faults[-1] < 1000 < faults[0], "of 14,648 pages"
    assert pages - resident() > 10_000


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
