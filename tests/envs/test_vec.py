"""Vectorised environments: text as bytes, given seeds, a process each where one is needed."""

from __future__ import annotations

import os
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import data_equivalence
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from lacer.envs import LacerError, make
from lacer.envs.vec import SeededEpisodes, StartMethod, TextAsBytes, close_vec, decode_text, make_vec

TINY = "helper_envs:helper/Tiny-v0"
ALONE = "helper_envs:helper/OnePerProcess-v0"


class Says(gym.Env):
    """Says what it is told to."""

    def __init__(self, text: str, max_length: int = 16) -> None:
        self.text = text
        self.observation_space = spaces.Dict({"words": spaces.Text(max_length, min_length=0),
                                              "x": spaces.Box(0, 1, (1,), np.float32)})
        self.action_space = spaces.Discrete(2)

    def reset(self, **_: Any) -> tuple[dict, dict]:
        return {"words": self.text, "x": np.zeros(1, np.float32)}, {}


@pytest.mark.parametrize("text", [
    "", "a", "Keep left.", "sixteen letters!", "Fahre 50 km/h, größer", "减速慢行", "😀" * 16, "\u00a0 \t\n", "é" * 16,
    "\U0010ffff" * 16, "\ud7ff\ue000",
])
def test_text_survives_as_bytes(text: str) -> None:
    env = TextAsBytes(Says(text, max_length=max(16, len(text))))
    obs, _ = env.reset()
    assert env.observation_space.contains(obs)
    assert decode_text(obs["words"]) == text
    assert decode_text(np.stack([obs["words"]] * 2)[1]) == text
    assert obs["x"] == 0
    assert isinstance(env.observation_space, spaces.Dict)
    assert env.observation_space["x"] == env.unwrapped.observation_space["x"]  # type: ignore[index]


def test_text_that_is_longer_than_declared_is_cut() -> None:
    env = TextAsBytes(Says("x" * 100, max_length=5))
    obs, _ = env.reset()
    assert env.observation_space.contains(obs)
    assert decode_text(obs["words"]) == "x" * 20
    obs, _ = TextAsBytes(Says("aa" + "减" * 10, max_length=5)).reset()
    assert decode_text(obs["words"]).startswith("aa减减减减减减"), "cut within a letter: the rest is readable"


def test_seeded_episodes_play_their_seeds_in_order() -> None:
    env = SeededEpisodes(make("lacer/KnownSources-v0", horizon=2), [7, 3, 11])
    plain = make("lacer/KnownSources-v0", horizon=2)
    action = np.zeros(4)
    for seed in (7, 3, 11, 7):
        obs, info = env.reset(seed=999)
        want, want_info = plain.reset(seed=seed)
        assert data_equivalence(obs, want)
        assert info == {**want_info, "episode_seed": seed}
        for _ in range(2):
            obs, reward, _, done, info = env.step(action)
            want, want_reward, *_ = plain.step(action)
            assert data_equivalence(obs, want)
            assert reward == want_reward
            assert info["episode_seed"] == seed
        assert done


def play(venv: Any, steps: int) -> list[list[int]]:
    """Seeds of the episodes that each copy ended, in order."""
    ended: list[list[int]] = [[] for _ in range(venv.num_envs)]
    venv.reset()
    for _ in range(steps):
        _, _, done, infos = venv.step(np.zeros((venv.num_envs, *venv.action_space.shape), np.float32))
        for i in range(venv.num_envs):
            if done[i]:
                ended[i].append(infos[i]["episode_seed"])
    venv.close()
    return ended


@pytest.mark.parametrize("n", [1, 2, 3])
def test_episode_seeds_are_dealt_out(n: int) -> None:
    seeds = [100, 101, 102, 103, 104]
    ended = play(make_vec(TINY, n, episode_seeds=seeds), 4 * 5)
    for i, got in enumerate(ended):
        mine = seeds[i::n]
        assert got[: len(mine)] == mine
    assert sorted(s for i, got in enumerate(ended) for s in got[: len(seeds[i::n])]) == seeds


def test_dummy_for_ordinary_environments() -> None:
    venv = make_vec("lacer/KnownSources-v0", 3, {"sources": ["position", "words"], "horizon": 4}, seed=5)
    assert isinstance(venv, DummyVecEnv)
    assert venv.num_envs == 3
    obs = venv.reset()
    assert isinstance(obs, dict)
    for i in range(3):
        want, _ = make("lacer/KnownSources-v0", sources=["position", "words"], horizon=4).reset(seed=5 + i)
        np.testing.assert_array_equal(obs["position"][i], want["position"])
        assert decode_text(obs["words"][i]) == want["words"]
    assert obs["words"].dtype == np.uint8
    for _ in range(4):
        _, _, done, infos = venv.step(np.zeros((3, 2)))
    assert done.all()
    assert infos[0]["episode"]["l"] == 4, "Monitor counts"
    assert infos[0]["terminal_observation"]["words"].dtype == np.uint8
    close_vec(venv)


def test_no_seed_no_repetition() -> None:
    first = [make_vec(TINY, 1).reset()["numbers"] for _ in range(2)]  # type: ignore[call-overload]
    assert not np.array_equal(*first)


@pytest.mark.parametrize(("method", "n"), [
    ("fork", 2), ("forkserver", 1), pytest.param("spawn", 1, marks=pytest.mark.slow)])
def test_a_process_each_where_one_is_needed(method: StartMethod, n: int) -> None:
    venv = make_vec(ALONE, n, {"horizon": 3}, seed=9, start_method=method)
    assert isinstance(venv, SubprocVecEnv)
    processes = list(venv.processes)
    obs = venv.reset()
    pids = [i["pid"] for i in venv.reset_infos]
    assert sorted(pids) == sorted(p.pid for p in processes)
    assert os.getpid() not in pids
    twin = make_vec(TINY, n, {"horizon": 3}, seed=9)
    for a, b in zip(obs.values(), twin.reset().values(), strict=True):  # type: ignore[union-attr]
        np.testing.assert_array_equal(a, b)
    for _ in range(4):
        action = np.full((n, 1), 0.5, np.float32)
        x, y = venv.step(action), twin.step(action)
        np.testing.assert_array_equal(x[0]["words"], y[0]["words"])
        np.testing.assert_array_equal(x[1], y[1])
        np.testing.assert_array_equal(x[2], y[2])
    close_vec(venv)
    assert not any(p.is_alive() for p in processes)


def test_two_simulations_in_one_process_would_clash() -> None:
    """The environment that the tests above use does what SUMO does."""
    from helper_envs import OnePerProcess

    envs = [OnePerProcess(), OnePerProcess()]
    try:
        envs[0].reset(seed=0)
        envs[0].reset(seed=1)
        with pytest.raises(RuntimeError, match="a second simulation"):
            envs[1].reset(seed=0)
    finally:
        OnePerProcess.running = 0


def test_closing_after_an_environment_died() -> None:
    venv = make_vec(ALONE, 2, start_method="fork")
    assert isinstance(venv, SubprocVecEnv)
    venv.reset()
    processes = list(venv.processes)
    processes[0].kill()
    processes[0].join()
    with pytest.raises((EOFError, ConnectionError)):
        venv.step(np.zeros((2, 1), np.float32))
    close_vec(venv)
    assert not any(p.is_alive() for p in processes)


@pytest.mark.parametrize(("args", "kwargs", "says"), [
    ((TINY, 0), {}, "at least one environment is needed, not 0"),
    ((TINY, -1), {}, "at least one environment is needed, not -1"),
    (("helper_envs:helper/Tinny-v0", 1), {}, "did you mean 'helper/Tiny-v0'?"),
    ((TINY, 1, {"speed": 1}), {}, "does not take these arguments"),
    ((ALONE, 1, {"speed": 1}), {}, "does not take these arguments"),
    ((TINY, 1, {"describe": {"histroy": {}}}), {}, "did you mean 'history'?"),
    ((TINY, 3), {"episode_seeds": [1, 2]}, "3 environments"),
])
def test_errors_show_before_any_process_starts(args: tuple, kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(LacerError) as e:
        make_vec(*args, **kwargs)
    assert says in str(e.value)
