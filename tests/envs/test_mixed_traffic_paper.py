"""The motorway with the paper's sources."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import lacer.envs
from lacer.envs import LacerError
from lacer.search.space import load_space

ENV = "lacer/MixedTrafficPaper-v0"


def test_it_has_the_papers_sources_objective_and_space() -> None:
    card = lacer.envs.task_card(ENV, scene="small")
    assert {n: s.modality for n, s in card.sources.items()} == {
        "time": "series", "traffic": "vector", "sequence": "set"}
    assert (card.objective.metric, card.objective.unit, card.objective.direction) == (
        "average_speed", "m/s", "maximize")
    assert card.env_id == ENV
    space = load_space("paper", card)
    for point in (space.sample(np.random.default_rng(s)) for s in range(3)):
        spec = space.to_spec(point)
        assert set(spec.sources) == set(card.sources)


def test_an_episode() -> None:
    env = lacer.envs.make(ENV, scene="small", warm_up=40.0, horizon=40.0)
    check_env(env.unwrapped, skip_render_check=True)
    obs, _ = env.reset(seed=1)
    done = False
    while not done:
        assert set(obs) == {"time", "traffic", "sequence"}
        assert env.observation_space.contains(obs)
        obs, reward, _, done, info = env.step(np.zeros(env.action_space.shape))
        assert reward == pytest.approx(info["reward_terms"]["speed"])
    assert info["metrics"]["average_speed"] > 0
    assert obs["sequence"][:, 2].any(), "lanes are known"
    env.close()


def test_what_the_paper_fixes_cannot_be_set() -> None:
    with pytest.raises(LacerError, match="news"):
        lacer.envs.make(ENV, news={"camera": 1})
