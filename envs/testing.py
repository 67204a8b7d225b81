"""What an environment must keep to, as tests to inherit.

::

    from lacer.envs.testing import EnvConformance

    class TestThermostat(EnvConformance):
        env_id = "thermostat:Thermostat-v0"

With pytest, that is a test module. It needs nothing but the id, from which other processes can make the environment
too; ``kwargs`` holds constructor arguments that make it small.
"""

from __future__ import annotations

import copy
import hashlib
import math
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.utils.env_checker import check_env, data_equivalence
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.vec_env import SubprocVecEnv

from lacer.envs.described import Described
from lacer.envs.errors import LacerError
from lacer.envs.registration import make
from lacer.envs.sources import MODALITIES, TaskCard
from lacer.envs.vec import StartMethod, TextAsBytes, close_vec, make_one, make_vec

_ADVICE = ("recommend", "different from the unwrapped version", "infinity", "minimal resolution")
"""What marks those warnings of Gymnasium's and SB3's checks that are advice for their own default policies."""


class EnvConformance:
    """Inherit, set :attr:`env_id`, and run with pytest.

    Attributes:
        env_id: as for ``lacer.envs.make``.
        kwargs: constructor arguments.
        longest: steps after which an episode must have ended.
        episodes: episodes played by the tests that look at many steps.
        start_methods: how the processes of vectorised environments are started; without ``fork`` for environments that
            render with OpenGL, whose threads do not survive it.
    """

    env_id: ClassVar[str]
    kwargs: ClassVar[Mapping[str, Any]] = {}
    longest: ClassVar[int] = 2_000
    episodes: ClassVar[int] = 2
    start_methods: ClassVar[tuple[StartMethod, ...]] = ("fork", "spawn", "forkserver")

    def make(self, **more: Any) -> gym.Env:
        """The environment under test."""
        return make(self.env_id, **{**self.kwargs, **more})

    def test_gymnasium_checks(self) -> None:
        """Gymnasium's ``check_env`` passes without warnings that matter."""
        env = self.make()
        try:
            with warnings.catch_warnings():
                _strict()
                # Gymnasium wants the bare environment; one that is described by a wrapper has its sources only there.
                check_env(env if _described(env) else env.unwrapped, skip_render_check=True)
        finally:
            env.close()

    def test_stable_baselines3_checks(self) -> None:
        """SB3's ``check_env`` passes; text as bytes, since SB3 has no Text spaces."""
        env = TextAsBytes(self.make())
        try:
            with warnings.catch_warnings():
                _strict()
                sb3_check_env(env)
        finally:
            env.close()

    def test_task_card(self) -> None:
        """The card fits the environment, and reading it starts nothing."""
        env = self.make()
        try:
            card = _card(env)
            assert card.description.strip(), "the card has no description"
            assert env.observation_space == card.observation_space, "observation_space differs from the card's sources"
            assert env.action_space == card.action_space, "action_space differs from the card's"
            for source in card.sources.values():
                assert source.modality in MODALITIES
                assert source.description.strip(), f"the source {source.name} has no description"
            if card.noop is not None:
                assert card.action_space.contains(np.asarray(card.noop)), "noop is no action"
            assert str(card).startswith(card.env_id)
        finally:
            env.close()

    def test_episodes(self) -> None:
        """Observations in their spaces and finite, episodes that end, metrics at their end, the state as announced."""
        env = self.make()
        try:
            card = _card(env)
            for episode in range(self.episodes):
                actions = copy.deepcopy(env.action_space)
                actions.seed(episode)
                obs, info = env.reset(seed=episode)
                total, done, steps = 0.0, False, 0
                while not done:
                    self._look(card, obs, info)
                    assert "metrics" not in info, "metrics belong to the end of an episode"
                    action = card.noop if card.noop is not None and episode == 0 else actions.sample()
                    obs, reward, terminated, truncated, info = env.step(action)
                    assert math.isfinite(float(reward)), f"the reward is {reward}"
                    total, steps, done = total + float(reward), steps + 1, terminated or truncated
                    assert steps <= self.longest, f"an episode has not ended after {self.longest} steps"
                self._look(card, obs, info)
                metrics = info.get("metrics", {})
                assert card.objective.metric in metrics, (
                    f'info["metrics"] at the end of an episode lacks the objective {card.objective.metric!r}')
                for name, value in metrics.items():
                    assert math.isfinite(float(value)), f"the metric {name} is {value}"
                if "return" in metrics:
                    assert math.isclose(float(metrics["return"]), total, rel_tol=1e-6, abs_tol=1e-6)
        finally:
            env.close()

    def _look(self, card: TaskCard, obs: Mapping[str, Any], info: Mapping[str, Any]) -> None:
        assert set(obs) == set(card.sources), "the observation's keys differ from the card's sources"
        for name, source in card.sources.items():
            assert source.space.contains(obs[name]), f"{name}: {obs[name]!r} is not in {source.space}"
            if source.modality != "text":
                assert np.isfinite(obs[name]).all(), f"{name} holds NaN or infinite values"
            if source.modality == "set":
                assert np.isin(obs[name][:, 0], (0, 1)).all(), f"{name}: the mask in column 0 must be 0 or 1"
        state = info.get("state", {})
        assert set(state) == set(card.state_names), (
            f"info['state'] has {sorted(state)}, the card announces {sorted(card.state_names)}")
        for name, value in state.items():
            assert math.isfinite(float(value)), f"the state variable {name} is {value}"

    def test_same_seed_same_episode(self) -> None:
        """A seed fixes the episode, also after other episodes; another seed does not give the same one."""
        env = self.make()
        try:
            first, other, again = (_play(env, seed) for seed in (3, 4, 3))
            assert first == again, "the same seed gives another episode the second time"
            assert first != other, "another seed gives the same episode"
        finally:
            env.close()

    def test_vectorised_in_processes(self) -> None:
        """The environment is made in other processes, however they are started, and a seed gives the same there."""
        env = TextAsBytes(self.make())
        try:
            space = copy.deepcopy(env.action_space)
            space.seed(5)
            actions, seen = [], [dict(env.reset(seed=5)[0])]
            while len(seen) < 20:
                actions.append(space.sample())
                obs, _, terminated, truncated, _ = env.step(actions[-1])
                if terminated or truncated:
                    break
                seen.append(dict(obs))
        finally:
            env.close()
        for method in self.start_methods:
            venv = SubprocVecEnv([partial(make_one, self.env_id, dict(self.kwargs))], start_method=method)
            try:
                venv.seed(5)
                there: Any = venv.reset()
                for i, here in enumerate(seen):
                    assert data_equivalence({k: v[0] for k, v in there.items()}, here, exact=True), (
                        f"a process started by {method} gives another observation in step {i}")
                    if i < len(actions):
                        there = venv.step(np.asarray(actions[i])[None])[0]
            finally:
                close_vec(venv)

    def test_make_vec(self) -> None:
        """Two copies at once, as training has them."""
        venv = make_vec(self.env_id, 2, self.kwargs, seed=0, start_method=self.start_methods[0])
        try:
            venv.reset()
            for _ in range(3):
                action = np.stack([venv.action_space.sample() for _ in range(2)])
                _, reward, _, _ = venv.step(action)
                assert np.isfinite(reward).all()
        finally:
            close_vec(venv)

    def test_two_in_one_process(self) -> None:
        """Two copies in a process do not disturb each other; or the second is refused with a word on the fix."""
        one, two = self.make(), self.make()
        try:
            alone = _play(one, 7)
            one.reset(seed=7)
            if one.metadata.get("one_per_process"):
                refused = ""
                try:
                    two.reset(seed=8)
                except LacerError as e:
                    refused = str(e)
                assert "SubprocVecEnv" in refused, "a second copy must be refused, naming the fix, SubprocVecEnv"
                one.close()
                two.reset(seed=8)  # the place is free now
            else:
                assert _play(one, 7, beside=two) == alone, "a second copy in the process disturbs the first one"
        finally:
            one.close()
            two.close()

    def test_close(self) -> None:
        """Closing does no harm before a reset, in an episode, and twice."""
        self.make().close()
        env = self.make()
        env.reset(seed=0)
        env.step(env.action_space.sample())
        env.close()
        env.close()


def _card(env: gym.Env) -> TaskCard:
    card = env.get_wrapper_attr("task_card")
    assert isinstance(card, TaskCard)
    return card


def _described(env: gym.Env) -> bool:
    while isinstance(env, gym.Wrapper):
        if isinstance(env, Described):
            return True
        env = env.env
    return False


def _play(env: gym.Env, seed: int, steps: int = 60, beside: gym.Env | None = None) -> list[str]:
    """Digests of what an episode of random actions gives; another environment may be played in between."""
    actions = copy.deepcopy(env.action_space)  # some environments make themselves a new one, unseeded, in reset
    actions.seed(seed)
    obs, _ = env.reset(seed=seed)
    out = [_digest(obs)]
    if beside is not None:
        beside.reset(seed=seed + 1)
    done = other_done = False
    while not done and len(out) < steps:
        obs, reward, terminated, truncated, _ = env.step(actions.sample())
        out.append(_digest(obs) + repr(float(reward)))
        done = terminated or truncated
        if beside is not None and not other_done:
            _, _, terminated, truncated, _ = beside.step(beside.action_space.sample())
            other_done = terminated or truncated
    return out


def _digest(obs: Mapping[str, Any]) -> str:
    """A digest that is the same in every process."""
    h = hashlib.sha256()
    for name in sorted(obs):
        value = obs[name]
        h.update(name.encode() + (value.encode() if isinstance(value, str) else np.asarray(value).tobytes()))
    return h.hexdigest()


def _strict() -> None:
    """Warnings of the checks become errors, except those that are advice."""
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", category=UserWarning)
    for text in _ADVICE:
        warnings.filterwarnings("ignore", message=f"(?s).*{text}")
