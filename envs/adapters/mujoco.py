"""Gymnasium's MuJoCo tasks: positions, velocities and forces as sources, and a camera."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
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
        LacerError: if there is no way to render; says what to install.
    """
    error = _render_error(os.environ.get("MUJOCO_GL"))
    if error:
        raise LacerError(
            f"MuJoCo cannot render here ({error}). Without a display it needs EGL (Debian: apt install libegl1) or "
            "OSMesa (apt install libosmesa6, and MUJOCO_GL=osmesa); or leave the camera out")
    world: Any = env.unwrapped
    world.model.vis.quality.shadowsize = 0
    world.model.vis.quality.offsamples = 0


@lru_cache
def _render_error(backend: str | None) -> str:
    """Why MuJoCo cannot render with a backend, "" if it can. Tried in a process of its own: OpenGL's threads do not
    survive the fork by which runs are started, so a process that will be forked must not have rendered."""
    code = ("import gymnasium as g; env = g.make('InvertedPendulum-v5', render_mode='rgb_array', width=16, height=16)"
            "; env.reset(); env.render()")
    try:
        done = subprocess.run([sys.executable, "-P", "-W", "ignore", "-c", code], capture_output=True, text=True,
                              timeout=60, check=False, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return "no picture within a minute"
    lines = [line for line in done.stderr.splitlines() if "Error" in line]
    return "" if done.returncode == 0 else (lines[0] if lines else f"exit {done.returncode}").strip()[:200]
