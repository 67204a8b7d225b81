"""Gymnasium's MuJoCo tasks: positions, velocities and forces as sources, and a camera."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lacer.envs.errors import LacerError, UnknownNameError
from lacer.envs.inference import Declared, Description, Part, infer, leaf

PACKAGE, EXTRA, MODULE = "mujoco", "mujoco", "gymnasium.envs.mujoco"
PREFIXES: tuple[str, ...] = ()  # Gymnasium itself registers them

_NAMES = {
    "qpos": ("position", "Positions and angles of the joints."),
    "qvel": ("velocity", "Velocities of the joints."),
    "cinert": ("inertia", "Masses and inertias of the bodies."),
    "cvel": ("body_velocity", "Velocities of the bodies."),
    "qfrc_actuator": ("actuator_force", "Forces of the actuators on the joints."),
    "cfrc_ext": ("contact_force", "External forces on the bodies, ground contacts above all."),
}


def prepare(env_id: str, kwargs: dict[str, Any], camera: int | None) -> dict[str, Any]:
    """For a camera: pictures of its size are rendered, off screen where there is no display."""
    if camera is None:
        return kwargs
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # GLFW, the default, needs a display
    return {"render_mode": "rgb_array", "width": camera, "height": camera, **kwargs}


def describe(env: gym.Env, said: Mapping[str, Declared | None]) -> Description:
    """The parts of the observation by its ``observation_structure``: ``position``, ``velocity``, ...; tasks without one
    keep the single source ``observation``."""
    world: Any = env.unwrapped
    space = env.observation_space
    structure = getattr(world, "observation_structure", {})
    sizes = {k: int(n) for k, n in structure.items() if n and not k.startswith("skipped")}
    text = (f"Gymnasium's MuJoCo task {env.spec.id if env.spec else type(world).__name__}: move a body by the torques "
            "of its joints; see its documentation for the reward.")
    noop = np.zeros(env.action_space.shape or (), np.float32)  # no torque
    if not isinstance(space, spaces.Box) or space.shape != (sum(sizes.values()),) or not set(sizes) <= set(_NAMES):
        return Description(infer(space, said), text, noop=noop)
    names = [_NAMES[k][0] for k in sizes]
    for name in said:
        if name not in names:
            raise UnknownNameError("source", name, names)
    parts, start = [], 0
    for key, n in sizes.items():
        name, words = _NAMES[key]
        word = said.get(name, {})
        piece = slice(start, start + n)
        start += n
        if word is not None:
            made = leaf(name, spaces.Box(space.low[piece], space.high[piece], dtype=space.dtype.type),
                        {"description": words, **word})
            parts.append(Part(made.spec, _cut(made, piece)))
    return Description(parts, text, noop=noop)


def _cut(part: Part, piece: slice) -> Any:
    return lambda obs: part.read(obs[piece])


def cheap_pictures(env: gym.Env) -> None:
    """Renders without shadows and smoothing, which take most of the time where there is no graphics card.

    Raises:
        LacerError: if there is no way to render off screen; says what to install.
    """
    world: Any = env.unwrapped
    world.model.vis.quality.shadowsize = 0
    world.model.vis.quality.offsamples = 0
    try:
        env.reset()
        env.render()
    except Exception as e:  # whatever the graphics library raises: RuntimeError, AttributeError, ImportError, ...
        raise LacerError(
            f"MuJoCo cannot render here ({type(e).__name__}: {e}). Without a display it needs EGL (Debian: apt install "
            "libegl1) or OSMesa (apt install libosmesa6 and MUJOCO_GL=osmesa); or leave the camera out") from e
