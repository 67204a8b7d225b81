"""Registration of multi-source environments on top of Gymnasium's registry."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import WrapperSpec, load_env_creator

from lacer.envs.adapters import adapter_of_id, import_for, missing, mujoco
from lacer.envs.described import OPTIONS, Described, tell
from lacer.envs.errors import LacerError, UnknownNameError, did_you_mean
from lacer.envs.inference import declared
from lacer.envs.sources import Objective, TaskCard

ENTRY_POINTS = "lacer.envs"
"""Group of the entry points by which other packages announce environments."""

_SUMMARIES: dict[str, str] = {}
_announced = False


def register_env(
    env_id: str,
    entry_point: str,
    summary: str = "",
    *,
    sources: Mapping[str, Any] | None = None,
    objective: str | Objective | Mapping[str, str] | None = None,
    description: str = "",
    history: Mapping[str, int] | None = None,
    camera: int | None = None,
    noop: Any = None,
    max_episode_steps: int | None = None,
    **kwargs: Any,
) -> None:
    """Register a multi-source environment; ``lacer.envs.make``, ``gymnasium.make`` and ``lacer search`` then know it.

    ::

        register_env("Cart-v0", "gymnasium.envs.classic_control:CartPoleEnv", "balance a pole",
                     history={"observation": 8}, max_episode_steps=500)

    Args:
        env_id: Gymnasium id, e.g. ``"lacer/MixedTraffic-v0"``.
        entry_point: ``"module:Class"``. Without any of the next six arguments, a class with a ``task_card`` attribute
            (a :class:`TaskCard`) is taken as it is, and others are described by inference when they are made.
        summary: one line for ``lacer envs``; without one the description, or the entry point, stands there.
        sources, objective, description, history, camera, noop: as for :func:`lacer.envs.describe`.
        max_episode_steps: steps after which an episode is truncated, as in Gymnasium.
        **kwargs: default constructor arguments.

    Raises:
        LacerError: a declaration that cannot be right for any environment.
    """
    given = {"sources": sources, "objective": objective, "description": description, "history": history,
             "camera": camera, "noop": noop}
    given = {k: v for k, v in given.items() if v is not None and not (isinstance(v, str) and not v)}
    declared(sources)
    if camera is not None:
        kwargs.setdefault("render_mode", "rgb_array")
    wrappers = (WrapperSpec("Described", "lacer.envs.described:Described", given),) if given else ()
    gym.register(id=env_id, entry_point=entry_point, kwargs=kwargs, disable_env_checker=True,
                 max_episode_steps=max_episode_steps, additional_wrappers=wrappers)
    _SUMMARIES[env_id] = summary or description or f"registered as {entry_point}"


def list_envs() -> dict[str, str]:
    """Registered environment ids with their one-line summaries.

    Those of other packages are among them: an entry point in the group ``lacer.envs`` names a module that registers
    environments, or a function that does. One that cannot be loaded is left out with a warning.
    """
    global _announced
    if not _announced:
        _announced = True  # first: a module that is imported here may ask for the list itself
        for entry in metadata.entry_points(group=ENTRY_POINTS):
            _announce(entry)
    return dict(sorted(_SUMMARIES.items()))


def _announce(entry: metadata.EntryPoint) -> None:
    try:
        loaded = entry.load()
        if entry.attr:
            loaded()
    except (Exception, SystemExit) as e:  # somebody else's code must not be the end of ours
        origin = "" if entry.dist is None else f" of the package {entry.dist.name} {entry.dist.version}"
        warnings.warn(f"the environments of the entry point {entry.name} = {entry.value}{origin} are left out: "
                      f"{type(e).__name__}: {e}", stacklevel=2)


def make(env_id: str, *, describe: Mapping[str, Any] | None = None, **kwargs: Any) -> gym.Env:
    """``gymnasium.make`` for multi-source environments: the result has a ``task_card``.

    ``"module:Id-v0"`` imports the module first, as in Gymnasium. Ids of MiniGrid, BabyAI and highway-env import their
    packages by themselves. An environment without a task card is described by inference.

    Args:
        env_id: any id that Gymnasium knows.
        describe: options of :func:`lacer.envs.describe`, e.g. ``{"history": {"observation": 8}}``.
        **kwargs: constructor arguments; also Gymnasium's ``max_episode_steps`` and ``render_mode``.

    Raises:
        UnknownNameError: for an id that is not registered, with the nearest known one.
        LacerError: if the environment cannot be imported, rejects its arguments or cannot be described.
    """
    if not isinstance(describe, Mapping | None):
        raise LacerError(f"describe must hold options by name ({', '.join(OPTIONS)}), not {describe!r}")
    options = dict(describe or {})
    for key in options:
        if key not in OPTIONS:
            raise LacerError(f"describe has no option {key!r}{did_you_mean(str(key), OPTIONS)} "
                             f"Options: {', '.join(OPTIONS)}.")
    name = _found(env_id)
    adapter = adapter_of_id(name)
    entry_point = gym.registry[name].entry_point
    camera = options.get("camera")
    if camera is not None:
        kwargs = {"render_mode": "rgb_array", **kwargs}
    try:
        if isinstance(entry_point, str):
            load_env_creator(entry_point)
        if adapter is not None:
            kwargs = {"disable_env_checker": True, **adapter.prepare(name, kwargs, camera)}
    except gym.error.DependencyNotInstalled as e:
        raise (missing(name, adapter) if adapter else LacerError(f"{name} needs more packages: {e}")) from e
    except (ImportError, AttributeError) as e:
        raise LacerError(f"cannot load {entry_point!r}, the class of {name}: {e}") from e
    try:
        env = gym.make(name, **kwargs)
    except TypeError as e:
        raise LacerError(f"{name} does not take these arguments: {e}") from e
    except gym.error.DependencyNotInstalled as e:
        raise (missing(name, adapter) if adapter else LacerError(f"{name} needs more packages: {e}")) from e
    except ImportError as e:
        raise LacerError(f"{name} cannot be made: {e}") from e
    try:
        if adapter is mujoco and camera is not None:
            mujoco.cheap_pictures(env)
        if options or not env.has_wrapper_attr("task_card"):
            env = Described(env, **options)
            tell(env)
    except TypeError as e:
        env.close()
        raise LacerError(f"{name} cannot be described: {e}") from e
    except LacerError:
        env.close()
        raise
    return env


def _found(env_id: str) -> str:
    """The id without its module, which is imported; anything that an id may stand for has been tried then.

    Raises:
        LacerError, UnknownNameError: see :func:`make`.
    """
    name = env_id
    if ":" in env_id:
        module, name = env_id.split(":", 1)
        try:
            importlib.import_module(module)
        except Exception as e:  # its own code runs; ValueError and TypeError also for an empty and a relative name
            why = str(e) if isinstance(e, ImportError | ValueError | TypeError) else f"{type(e).__name__}: {e}"
            raise LacerError(f"cannot import {module!r}, named in the environment id {env_id!r}: {why}") from e
    if name not in gym.registry:
        import_for(name)
    if name not in gym.registry and name not in list_envs():
        raise UnknownNameError("environment", name, list_envs(), gym.registry)
    return name


def task_card(env_id: str, **kwargs: Any) -> TaskCard:
    """The task card of an environment; makes it, reads the card and closes it (no simulation runs).

    Args:
        env_id: any id that :func:`make` takes.
        **kwargs: as for :func:`make`.

    Raises:
        LacerError: as :func:`make`.
    """
    env = make(env_id, **kwargs)
    try:
        card: TaskCard = env.get_wrapper_attr("task_card")
        return card
    finally:
        env.close()
