"""Everything that is registered keeps to the contract that users' environments are held to."""

from __future__ import annotations

from typing import Any, ClassVar

from lacer.envs import list_envs
from lacer.envs.testing import EnvConformance


class TestKnownSources(EnvConformance):
    env_id = "lacer/KnownSources-v0"
    start_methods = ("fork",)


class TestMixedTraffic(EnvConformance):
    env_id = "lacer/MixedTraffic-v0"
    kwargs: ClassVar[dict[str, Any]] = {"scene": "small", "warm_up": 30.0, "horizon": 60.0}
    start_methods = ("fork",)


class TestTrafficSignal(EnvConformance):
    env_id = "lacer/TrafficSignal-v0"
    kwargs: ClassVar[dict[str, Any]] = {"horizon": 100}
    start_methods = ("fork",)


class TestInferred(EnvConformance):
    env_id = "CartPole-v1"
    kwargs: ClassVar[dict[str, Any]] = {"describe": {"history": {"observation": 4}}}
    start_methods = ("fork",)


def test_all_that_ships_is_tested() -> None:
    tested = {c.env_id for c in EnvConformance.__subclasses__()}
    assert {e for e in list_envs() if e.startswith("lacer/")} <= tested
