"""KnownSources: the truth that it claims to know is the truth."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from lacer.envs import LacerError, UnknownNameError, make, task_card
from lacer.envs.known_sources import _KINDS, _WORDS, KnownSourcesEnv

ALL = tuple(_KINDS)
CAN = tuple(k for k in ALL if k not in ("echo", "noise"))


def play(env: KnownSourcesEnv, policy: Any, episodes: int, seed: int = 0) -> np.ndarray:
    """Returns of episodes; ``policy(observation, info)``."""
    out = []
    for i in range(episodes):
        obs, info = env.reset(seed=seed + i)
        total, done = 0.0, False
        while not done:
            obs, reward, terminated, truncated, info = env.step(policy(obs, info))
            total += reward
            assert not terminated, "the horizon truncates"
            done = truncated
        assert info["metrics"]["score"] == pytest.approx(total / env.horizon)
        out.append(total)
    return np.array(out)


def perfect(_: Any, info: dict[str, Any]) -> np.ndarray:
    return np.array(list(info["state"].values()))


def read(obs: dict[str, Any], source: str) -> float:
    """A source's target, read from the observation alone, as an ideal encoder could."""
    x = obs[source]
    if source == "position":
        return float(x[0])
    if source == "trend":
        return float(np.polyfit(np.linspace(-1, 1, 8), x[:, 0], 1)[0])
    if source == "picture":
        light = np.clip(x.astype(float).mean(2) - 60, 0, None)
        return float(((light.sum(0) @ np.arange(16)) / light.sum() - 2) / 11 * 2 - 1)
    if source == "words":
        level = max((w for w in _WORDS if f" {w}" in f" {x}"), key=len)
        return _WORDS.index(level) / 3 - 1
    present = x[:, 0] > 0.5
    return float(x[present, 1].mean())


@pytest.mark.parametrize("sources", [ALL, *[(c,) for c in CAN], ("position", "echo")], ids="+".join)
def test_gymnasium_checks(sources: tuple[str, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*minimum and maximum.*|.*not an instance.*|.*unwrapped.*")
        check_env(make("lacer/KnownSources-v0", sources=sources).unwrapped, skip_render_check=True)


def test_observations_lie_in_their_spaces_for_many_steps() -> None:
    env = KnownSourcesEnv(ALL, horizon=2000)
    obs, _ = env.reset(seed=0)
    for _ in range(2000):
        for name, space in env.observation_space.items():
            assert space.contains(obs[name]), name
        obs, *_ = env.step(env.action_space.sample())


def test_reproducible_by_seed() -> None:
    def record(seed: int) -> list[Any]:
        env = KnownSourcesEnv(ALL)
        actions = np.random.default_rng(0).uniform(-1, 1, (20, 5))
        out: list[Any] = [env.reset(seed=seed)]
        out += [env.step(a) for a in actions[:16]]
        out.append(env.reset())  # the next episode goes on with the same generator
        return out

    a, b, c = record(3), record(3), record(4)
    np.testing.assert_equal(a, b)
    assert a[0][1] != c[0][1]
    assert a[-1][1] != a[0][1]


def test_what_is_shown_does_not_change_the_targets_of_an_episode() -> None:
    """Only the noise differs, so scores of different source sets on one seed can be compared at the first step."""
    states = [KnownSourcesEnv(s).reset(seed=7)[1]["state"]["target_position"] for s in (("position",), ALL)]
    assert states[0] == states[1]


@pytest.mark.parametrize("relevant", [None, ["words"], ["position", "crowd"]])
def test_expected_returns(relevant: list[str] | None) -> None:
    env = KnownSourcesEnv(("position", "words", "crowd", "noise"), relevant=relevant)
    n, episodes = len(env.relevant), 200
    noop = play(env, lambda *_: env.task_card.noop, episodes) / 16
    assert abs(noop.mean()) < 4 * noop.std() / np.sqrt(episodes)
    assert noop.std() > 0.05
    assert play(env, perfect, 20) == pytest.approx(np.full(20, 16.0)), "knowing the truth, beyond the words' levels"
    assert env.optimal_return == pytest.approx(16 * (1 - ("words" in env.relevant) * 7 / 288 / n))

    def blind_to_the_first(_: Any, info: dict[str, Any]) -> np.ndarray:
        return perfect(_, info) * (np.arange(n) > 0)

    blind = play(env, blind_to_the_first, episodes) / 16
    assert blind.mean() == pytest.approx(1 - 1 / n, abs=4 * blind.std() / np.sqrt(episodes))


@pytest.mark.parametrize("source", CAN)
def test_each_source_tells_its_target(source: str) -> None:
    """An ideal reader of the observation comes near the optimum; words cost their rounding, within its bound."""
    env = KnownSourcesEnv((source,))
    errors = []

    def policy(obs: dict[str, Any], info: dict[str, Any]) -> np.ndarray:
        guess = read(obs, source)
        errors.append(guess - info["state"][f"target_{source}"])
        return np.array([guess])

    score = play(env, policy, 60).mean() / 16
    if source == "words":
        assert np.abs(errors).max() <= 1 / 6 + 1e-9
        assert score == pytest.approx(1 - 3 * (1 / 6) ** 2 / 3, abs=3e-3)
    else:
        assert score > 0.97
        assert np.abs(errors).max() < 0.25


@pytest.mark.parametrize("relevant", [["words"], ["position", "crowd"], ["position", "words", "crowd"]])
def test_optimal_return_is_reached_by_an_ideal_reader_and_not_beaten(relevant: list[str]) -> None:
    """Reading the observation alone, with the mean of the level for the words."""
    env = KnownSourcesEnv(("position", "words", "crowd", "noise"), relevant=relevant)

    def ideal(obs: dict[str, Any], _: Any) -> np.ndarray:
        return np.array([np.clip(read(obs, s), -11 / 12, 11 / 12) if s == "words" else read(obs, s) for s in relevant])

    returns = play(env, ideal, 300)
    error = returns.std() / np.sqrt(len(returns))
    assert returns.mean() == pytest.approx(env.optimal_return, abs=max(4 * error, 1e-3))
    if "words" in relevant:
        assert error < 0.02, "tight enough to tell 7/288 from the old bound, 8/288"
        level = play(env, lambda o, i: np.array([read(o, s) for s in relevant]), 300)  # its middle, not its mean
        assert level.mean() < returns.mean()


def test_echo_copies_and_noise_tells_nothing() -> None:
    env = KnownSourcesEnv(ALL, horizon=3000)
    obs, info = env.reset(seed=0)
    rows, states = [], []
    for _ in range(3000):
        rows.append([obs["echo"][0], *obs["noise"], *obs["position"][1:]])
        states.append(list(info["state"].values()))
        obs, *_, info = env.step(env.task_card.noop)
    x, y = np.array(rows), np.array(states)
    correlation = np.corrcoef(x.T, y.T)[: x.shape[1], x.shape[1]:]
    assert correlation[0, 0] > 0.97
    assert np.abs(correlation[0, 1:]).max() < 0.08
    assert np.abs(correlation[1:]).max() < 0.08
    assert np.abs(np.corrcoef(y.T) - np.eye(5)).max() < 0.08, "targets are independent"
    assert y.std(0) == pytest.approx(np.full(5, 1 / np.sqrt(3)), abs=0.02)


def test_task_card() -> None:
    card = task_card("lacer/KnownSources-v0")
    assert list(card.sources) == ["position", "trend", "picture", "words", "noise"]
    assert card.env_id == "lacer/KnownSources-v0"
    assert card.state_names == tuple(f"target_{s}" for s in ("position", "trend", "picture", "words"))
    assert card.action_space.shape == (4,)
    assert card.action_space.contains(card.noop)
    env = KnownSourcesEnv(relevant=("trend",), horizon=1)
    _, info = env.reset(seed=0)
    assert set(info["state"]) == set(env.task_card.state_names) == {"target_trend"}
    *_, truncated, info = env.step(np.zeros(1))
    assert truncated
    assert set(info["state"]) == {"target_trend"}


@pytest.mark.parametrize(("kwargs", "says"), [
    ({"sources": ["postion"]}, "did you mean 'position'?"),
    ({"sources": ["position"], "relevant": ["psition"]}, "did you mean 'position'?"),
    ({"sources": []}, "non-empty"),
    ({"sources": ["noise"]}, "non-empty"),
    ({"relevant": []}, "non-empty"),
    ({"relevant": ["noise"]}, "must be a non-empty part of"),
    ({"sources": ["words"], "relevant": ["position"]}, "must be a non-empty part of ['words']"),
    ({"sources": ["words", "echo"]}, "'echo' is a copy of 'position'"),
    ({"sources": ["words", "words"]}, "twice"),
    ({"relevant": ["words", "words"]}, "twice"),
    ({"horizon": 0}, "horizon must be at least 1, not 0"),
    ({"horizons": 3}, "does not take these arguments"),
])
def test_wrong_arguments(kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(LacerError) as e:
        make("lacer/KnownSources-v0", **kwargs)
    assert says in str(e.value)
    if "postion" in str(kwargs):
        assert isinstance(e.value, UnknownNameError)


@pytest.mark.parametrize("action", [np.zeros(2), np.zeros((1, 1)), np.array([np.nan]), np.array([np.inf]), 0.0])
def test_wrong_actions(action: Any) -> None:
    env = KnownSourcesEnv(("position",))
    env.reset(seed=0)
    with pytest.raises(LacerError, match=r"action must be \(1,\) finite numbers"):
        env.step(action)


def test_actions_are_clipped_to_their_space() -> None:
    rewards = []
    for a in (1.0, 50.0):
        env = KnownSourcesEnv(("position",))
        env.reset(seed=0)
        rewards.append(env.step(np.array([a]))[1])
    assert rewards[0] == rewards[1]
