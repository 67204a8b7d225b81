"""Environments of other packages whose own observation types are joined into sources: MiniGrid and BabyAI, highway-env,
Gymnasium's MuJoCo. ``lacer.envs.make`` and ``describe`` take the adapter by themselves."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any, Protocol

import gymnasium as gym

from lacer.envs.adapters import highway, minigrid, mujoco
from lacer.envs.errors import LacerError
from lacer.envs.inference import Declared, Description


class Adapter(Protocol):
    """What a module of this folder offers.

    Attributes:
        PACKAGE: import name of the package that the environments need.
        EXTRA: extra of this project that installs it.
        MODULE: what the entry points of its environments begin with.
        PREFIXES: how ids begin that are known to be its own before the package is imported.
    """

    PACKAGE: str
    EXTRA: str
    MODULE: str
    PREFIXES: tuple[str, ...]

    def prepare(self, env_id: str, kwargs: dict[str, Any], camera: int | None) -> dict[str, Any]:
        """Constructor arguments, given the user's, and the size of the camera picture if one is wanted."""
        ...

    def describe(self, env: gym.Env, said: Mapping[str, Declared | None]) -> Description:
        """Sources and task of an environment."""
        ...


ADAPTERS: tuple[Adapter, ...] = (minigrid, highway, mujoco)  # type: ignore[assignment]


def adapter_of(env: gym.Env) -> Adapter | None:
    """The adapter of an environment, by the module of its class or of a base class."""
    modules = [c.__module__ for c in type(env.unwrapped).__mro__]
    return next((a for a in ADAPTERS if any(m.startswith(a.MODULE) for m in modules)), None)


def adapter_of_id(env_id: str) -> Adapter | None:
    """The adapter of a registered id."""
    entry = getattr(gym.registry.get(env_id), "entry_point", None)
    name = entry if isinstance(entry, str) else getattr(entry, "__module__", "")
    return next((a for a in ADAPTERS if name.startswith(a.MODULE)), None)


def import_for(env_id: str) -> None:
    """Imports the package that registers an id of a known family, if its id says so.

    Raises:
        LacerError: if the package is missing; names the extra.
    """
    for a in ADAPTERS:
        if env_id.startswith(a.PREFIXES):
            if importlib.util.find_spec(a.PACKAGE) is None:
                raise missing(env_id, a)
            importlib.import_module(a.PACKAGE)


def missing(env_id: str, adapter: Adapter) -> LacerError:
    """The error for a package that is not installed."""
    return LacerError(f"{env_id} needs the package {adapter.PACKAGE}; install it with: "
                      f"pip install 'lacer[{adapter.EXTRA}]'")
