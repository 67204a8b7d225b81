"""Registration of multi-source environments on top of Gymnasium's registry."""

from __future__ import annotations

import importlib
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import load_env_creator

from lacer.envs.errors import LacerError, UnknownNameError
from lacer.envs.sources import TaskCard

_SUMMARIES: dict[str, str] = {}


def register_env(env_id: str, entry_point: str, summary: str, **kwargs: Any) -> None:
    """Register a multi-source environment.

    Args:
        env_id: Gymnasium id, e.g. ``"lacer/MixedTraffic-v0"``.
        entry_point: ``"module:Class"``. The class has a ``task_card`` attribute (a :class:`TaskCard`).
        summary: one line for ``lacer envs``.
        **kwargs: default constructor arguments.
    """
    gym.register(id=env_id, entry_point=entry_point, kwargs=kwargs, disable_env_checker=True)
    _SUMMARIES[env_id] = summary


def list_envs() -> dict[str, str]:
    """Registered environment ids with their one-line summaries."""
    return dict(sorted(_SUMMARIES.items()))


def make(env_id: str, **kwargs: Any) -> gym.Env:
    """``gymnasium.make`` for multi-source environments.

    ``"module:Id-v0"`` imports the module first, as in Gymnasium.

    Raises:
        UnknownNameError: for an id that is not registered, with the nearest known one.
        LacerError: if the environment cannot be imported, rejects its arguments or has no task card.
    """
    name = env_id
    if ":" in env_id:
        module, name = env_id.split(":", 1)
        try:
            importlib.import_module(module)
        except (ImportError, ValueError, TypeError) as e:  # the last two for an empty and for a relative name
            raise LacerError(f"cannot import {module!r}, named in the environment id {env_id!r}: {e}") from e
    if name not in gym.registry:
        raise UnknownNameError("environment", name, _SUMMARIES)
    entry_point = gym.registry[name].entry_point
    if isinstance(entry_point, str):
        try:
            load_env_creator(entry_point)
        except (ImportError, AttributeError) as e:
            raise LacerError(f"cannot load {entry_point!r}, the class of {name}: {e}") from e
    try:
        env = gym.make(name, **kwargs)
    except TypeError as e:
        raise LacerError(f"{name} does not take these arguments: {e}") from e
    if not hasattr(env.unwrapped, "task_card"):
        env.close()
        raise LacerError(f"{name} has no `task_card`; give its class one (lacer.envs.TaskCard) that names its sources")
    return env


def task_card(env_id: str, **kwargs: Any) -> TaskCard:
    """The task card of a registered environment; makes the environment, reads it and closes it (no simulation runs)."""
    env = make(env_id, **kwargs)
    try:
        return env.unwrapped.task_card  # type: ignore[attr-defined]
    finally:
        env.close()
