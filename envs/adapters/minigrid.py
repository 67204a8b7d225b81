"""MiniGrid and BabyAI (Chevalier-Boisvert et al. 2023): image, mission text, direction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lacer.envs.errors import LacerError, UnknownNameError
from lacer.envs.inference import Declared, Description, Part, leaf
from lacer.envs.sources import SourceSpec

PACKAGE, EXTRA, MODULE = "minigrid", "minigrid", "minigrid."
PREFIXES = ("MiniGrid-", "BabyAI-")
_HIGHEST = np.array([10, 5, 3], np.uint8)  # object, colour, state; minigrid.core.constants
_TEXTS = {
    "image": "What the agent sees before it, a symbolic picture: channel 0 kind of object, 1 colour, 2 state of doors; "
             "the agent stands at the middle of the lower edge.",
    "direction": "Where the agent faces, one-hot: right, down, left, up.",
    "mission": "What the agent is asked to do, in plain English.",
}


def prepare(env_id: str, kwargs: dict[str, Any], camera: int | None) -> dict[str, Any]:
    """Nothing to add."""
    return kwargs


def describe(env: gym.Env, said: Mapping[str, Declared | None]) -> Description:
    """``image`` (7, 7, 3) uint8, MiniGrid's small codes spread over 0..255; ``direction`` (4,); ``mission``."""
    space = env.observation_space
    assert isinstance(space, spaces.Dict)
    for name in said:
        if name not in space.spaces:
            raise UnknownNameError("source", name, space.spaces)
        if name == "image" and (said[name] or {}).get("modality", "image") != "image":
            raise LacerError("source 'image' is a picture here; only its description and history can be changed, or it "
                             "can be left out with None")
    world: Any = env.unwrapped
    parts = []
    for name in ("image", "direction", "mission", *(n for n in space.spaces if n not in _TEXTS)):
        word = said.get(name, {})
        if name not in space.spaces or word is None:
            continue
        word = {"description": _TEXTS.get(name, ""), **({"modality": "text"} if name == "mission" else {}), **word}
        part = leaf(name, space[name], word, (name,))
        # A wrapper may have put a picture of pixels in its place.
        if name == "image" and space[name].shape in ((world.agent_view_size,) * 2 + (3,),
                                                     (world.width, world.height, 3)):
            part = Part(SourceSpec(name, "image", part.spec.space, part.spec.description), _spread)
        parts.append(part)

    def state() -> dict[str, float]:
        x, y = world.agent_pos
        return {"agent_x": float(x), "agent_y": float(y), "carrying": float(world.carrying is not None)}

    return Description(
        parts,
        f"Grid world {env.spec.id if env.spec else type(world).__name__}: fulfil the mission told in the text within "
        f"{world.max_steps} steps. Actions: turn left, turn right, forward, pick up, drop, toggle, done. A mission "
        "fulfilled pays 1 - 0.9 * (steps taken / steps allowed), everything else nothing.",
        state=state, state_names=("agent_x", "agent_y", "carrying"),
        metrics=lambda reward, terminated, _: {"success": float(terminated and reward > 0)},
    )


def _spread(obs: Mapping[str, Any]) -> np.ndarray:
    return np.minimum(obs["image"], _HIGHEST) * (255 // _HIGHEST)
