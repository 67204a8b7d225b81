"""Everything that is registered keeps to the contract that users' environments are held to."""

from __future__ import annotations

from typing import Any, ClassVar

from lacer.envs import list_envs
from lacer.envs.testing import EnvConformance

SMALL: dict[str, dict[str, Any]] = {
    "lacer/MixedTraffic": {"scene": "small", "warm_up": 30.0, "horizon": 60.0}, "lacer/TrafficSignal": {"horizon": 100},
}
"""Arguments that make an environment small, by the beginning of its id."""


def _tests_of(env_id: str) -> type[EnvConformance]:
    kwargs = next((v for k, v in SMALL.items() if env_id.startswith(k)), {})
    name = "Test" + "".join(c for c in env_id.split("/")[-1] if c.isalnum())
    return type(name, (EnvConformance,), {"env_id": env_id, "kwargs": kwargs, "start_methods": ("fork",)})


SHIPPED = [_tests_of(e) for e in list_envs() if e.startswith("lacer/")]
globals().update({c.__name__: c for c in SHIPPED})  # pytest finds them there


def test_all_that_ships_is_tested() -> None:
    assert {"TestKnownSourcesv0", "TestMixedTrafficv0", "TestTrafficSignalv0"} <= {c.__name__ for c in SHIPPED}
    assert len({c.__name__ for c in SHIPPED}) == len(SHIPPED)


class TestInferred(EnvConformance):
    env_id = "CartPole-v1"
    kwargs: ClassVar[dict[str, Any]] = {"describe": {"history": {"observation": 4}}}
    start_methods = ("fork",)
