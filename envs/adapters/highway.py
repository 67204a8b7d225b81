"""highway-env (Leurent 2018): several of its observation types at once, as sources."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lacer.envs.errors import LacerError, UnknownNameError
from lacer.envs.inference import Declared, Description, Part, infer, leaf
from lacer.envs.sources import SourceSpec

PACKAGE, EXTRA, MODULE = "highway_env", "highway", "highway_env."
PREFIXES = ("highway-", "merge-", "roundabout-", "intersection-", "racetrack-", "exit-", "parking-", "lane-keeping-",
            "two-way-", "u-turn-")

_TYPES: dict[str, dict[str, Any]] = {
    "Kinematics": {},
    "OccupancyGrid": {},
    "GrayscaleObservation": {"observation_shape": (128, 64), "stack_size": 4, "weights": [0.2989, 0.587, 0.114],
                             "scaling": 1.75},
    "LidarObservation": {"cells": 32},
    "TimeToCollision": {"horizon": 10},
}
"""Observation types that can be joined, with the settings that they need."""
JOINED = ("Kinematics", "OccupancyGrid", "GrayscaleObservation")
"""What is joined if nothing is said."""
_ALONE = ("KinematicsGoal", "AttributesObservation", "MultiAgentObservation", "TupleObservation")
# The environments that have these read them back themselves, so they stay as they are.


def prepare(env_id: str, kwargs: dict[str, Any], camera: int | None) -> dict[str, Any]:
    """Joins observation types: those in ``observations``, or :data:`JOINED`, unless ``config`` names an observation.

    Raises:
        LacerError: unknown observation type, or an environment that must keep its own.
    """
    kwargs = dict(kwargs)
    wanted = kwargs.pop("observations", None)
    config = dict(kwargs.get("config") or {})
    if "observation" in config and wanted is None:
        return kwargs
    own = _own(env_id).get("observation", {})
    if own.get("type") in _ALONE:
        if wanted is not None:
            raise LacerError(f"{env_id} must keep its own observation, {own['type']}; leave out `observations`")
        return kwargs
    if isinstance(wanted, str) or not isinstance(wanted, Sequence | None) or wanted == []:
        raise LacerError(f"observations must be a list of {', '.join(_TYPES)}, not {wanted!r}")
    names = JOINED if wanted is None else tuple(wanted)
    if wanted is None and camera is not None:
        names = tuple(n for n in names if n != "GrayscaleObservation")  # the camera comes in colour
    for name in names:
        if name not in _TYPES:
            raise UnknownNameError("observation type of highway-env", str(name), _TYPES)
    if os.environ.get("SDL_VIDEODRIVER") == "dummy" and (camera is not None or "GrayscaleObservation" in names):
        raise LacerError(f"{env_id}: highway-env draws black pictures with SDL_VIDEODRIVER=dummy; unset it (no display "
                         'is needed), or leave the pictures out, e.g. observations=["Kinematics", "OccupancyGrid"]')
    given = config.get("observation", {})
    settings = []
    for name in names:
        same = own.get("type") == name or (name == "Kinematics" and own.get("type") == "ExitObservation")
        more = given if given.get("type") == name else {}
        settings.append({**_TYPES[name], "type": name, **(own if same else {}), **more})
    kwargs["config"] = {**config, "observation": {"type": "TupleObservation", "observation_configs": settings}}
    return kwargs


def _own(env_id: str) -> dict[str, Any]:
    from gymnasium.envs.registration import load_env_creator

    entry = gym.registry[env_id].entry_point
    creator: Any = load_env_creator(entry) if isinstance(entry, str) else entry
    return dict(creator.default_config()) if hasattr(creator, "default_config") else {}


def describe(env: gym.Env, said: Mapping[str, Declared | None]) -> Description:
    """Kinematics: ``ego`` vector and ``vehicles`` set; OccupancyGrid: ``grid`` image; GrayscaleObservation: ``view``
    image; LidarObservation: ``lidar`` series; TimeToCollision: ``collisions`` vector."""
    world: Any = env.unwrapped
    kind = world.observation_type
    several = type(kind).__name__ == "TupleObservation"
    kinds = list(kind.observation_types) if several else [kind]
    parts: list[Part] = []
    for i, one in enumerate(kinds):
        made = _parts(one, _pick(i) if several else lambda obs: obs)
        if made is None:
            parts = infer(env.observation_space, said)
            break
        parts += made
    else:
        parts = _as_said(parts, said)
    discrete = hasattr(world.action_type, "actions_indexes")

    def state() -> dict[str, float]:
        v = world.vehicle
        lane = v.lane_index[2] if getattr(v, "lane_index", None) else None
        return {"speed": float(v.speed), "heading": float(v.heading), "lane": float(lane or 0)}

    return Description(
        parts,
        f"Drive a car in highway-env's {env.spec.id if env.spec else type(world).__name__}: get on without crashing. "
        + (f"Actions: {', '.join(world.action_type.actions_indexes)}." if discrete else
           "Actions: acceleration and steering."),
        noop=_noop(env.action_space, world.action_type.actions_indexes if discrete else None),
        state=state, state_names=("speed", "heading", "lane"),
        metrics=lambda _r, _t, info: {"crashed": float(info.get("crashed", False))},
    )


def _noop(space: gym.Space, indexes: Mapping[str, int] | None) -> np.ndarray | None:
    if indexes is not None:
        return np.asarray(indexes["IDLE"]) if "IDLE" in indexes else None
    return np.zeros(space.shape, np.float32) if isinstance(space, spaces.Box) else None


def _pick(i: int) -> Callable[[Any], Any]:
    return lambda obs: obs[i]


def _as_said(parts: list[Part], said: Mapping[str, Declared | None]) -> list[Part]:
    names = [p.spec.name for p in parts]
    for name, word in said.items():
        if name not in names:
            raise UnknownNameError("source", name, names)
        if word is not None and set(word) - {"description"}:
            raise LacerError(f"source {name!r} has its modality from highway-env; only its description can be changed, "
                             "or the source left out")
    return [Part(SourceSpec(s.name, s.modality, s.space, word.get("description") or s.description), p.read)
            for p in parts for s in (p.spec,) if (word := said.get(s.name, {})) is not None]


def _parts(kind: Any, get: Callable[[Any], Any]) -> list[Part] | None:
    """Sources of one observation type; None for types that have no better form than their spaces."""
    name = type(kind).__name__
    if name in ("KinematicObservation", "ExitObservation") and kind.features[0] == "presence":
        rows, columns = kind.space().shape
        what = ", ".join(kind.features)

        def box(*shape: int) -> spaces.Box:
            return spaces.Box(-np.inf, np.inf, shape, np.float32)

        return [
            Part(SourceSpec("ego", "vector", box(columns), f"The car itself: {what}."),
                 lambda obs: np.asarray(get(obs)[0], np.float32)),
            Part(SourceSpec("vehicles", "set", box(rows - 1, columns),
                            f"The nearest other vehicles, seen from the car: {what}."),
                 lambda obs: np.asarray(get(obs)[1:], np.float32)),
        ]
    if name == "OccupancyGridObservation":
        channels, *size = kind.space().shape
        if kind.as_image or not kind.clip:
            return None
        return [Part(SourceSpec("grid", "image", spaces.Box(0, 255, (*size, channels), np.uint8),
                                f"Bird's-eye grid around the car, channels: {', '.join(kind.features)}; 128 is 0."),
                     lambda obs: np.moveaxis(np.rint((get(obs) + 1) * 127.5).clip(0, 255), 0, -1).astype(np.uint8))]
    if name == "GrayscaleObservation":
        frames, width, height = kind.space().shape
        return [Part(SourceSpec("view", "image", spaces.Box(0, 255, (height, width, frames), np.uint8),
                                f"Camera above the road, grey, the last {frames} frames as channels, newest last."),
                     lambda obs: np.ascontiguousarray(np.transpose(get(obs), (2, 1, 0))))]
    if name == "LidarObservation":
        part = leaf("lidar", kind.space(), {"modality": "series", "description": "Laser scan around the car, by angle: "
                                            "distance and speed of what is hit."})
        return [Part(part.spec, lambda obs: part.read(get(obs)))]
    if name == "TimeToCollisionObservation":
        flat = leaf("collisions", kind.space(), {"modality": "vector", "description": "Times to collision by speed, "
                                                 "lane and second."})
        return [Part(flat.spec, lambda obs: flat.read(get(obs)))]
    return None
