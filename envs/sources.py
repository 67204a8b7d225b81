"""What an agent observes: sources, their modalities, and the task card that describes an environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lacer.envs.errors import LacerError

Modality = Literal["vector", "series", "image", "text", "set"]
MODALITIES: tuple[str, ...] = get_args(Modality)

_SHAPES = {
    "vector": "a Box of shape (D,)",
    "series": "a Box of shape (T, F), oldest step first",
    "image": "a uint8 Box of shape (H, W, C)",
    "text": "a Text space",
    "set": "a Box of shape (N, F) whose first column is 1 for present elements and 0 for padding",
}


@dataclass(frozen=True)
class SourceSpec:
    """One source of an observation.

    Attributes:
        name: key in the environment's Dict observation space.
        modality: how it is laid out. ``vector`` (D,); ``series`` (T, F), oldest first; ``image`` (H, W, C) uint8;
            ``text``, a string; ``set`` (N, F), where column 0 is 1 for present elements and 0 for padding.
        space: its Gymnasium space.
        description: one plain sentence that says what it carries; the LLM reads it.

    Raises:
        LacerError: if the space does not fit the modality, or the name cannot be used.
    """

    name: str
    modality: Modality
    space: gym.Space
    description: str

    def __post_init__(self) -> None:
        if not self.name or "." in self.name or self.name in ("fusion", "fused"):
            raise LacerError(f"a source cannot be called {self.name!r}: not empty, no dot, not 'fusion' or 'fused'")
        if self.modality not in MODALITIES:
            raise LacerError(f"source {self.name!r}: unknown modality {self.modality!r}; use one of {MODALITIES}")
        s = self.space
        fits = {
            "vector": isinstance(s, spaces.Box) and len(s.shape) == 1,
            "series": isinstance(s, spaces.Box) and len(s.shape) == 2,
            "image": isinstance(s, spaces.Box) and len(s.shape) == 3 and s.dtype == np.uint8,
            "text": isinstance(s, spaces.Text),
            "set": isinstance(s, spaces.Box) and len(s.shape) == 2 and s.shape[1] >= 2,
        }[self.modality]
        if not fits:
            raise LacerError(f"source {self.name!r} is declared {self.modality}, which needs "
                             f"{_SHAPES[self.modality]}; its space is {s}")
        if 0 in self.shape:
            raise LacerError(f"source {self.name!r} holds nothing: its space is {s}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one observation of this source; ``()`` for text."""
        return () if self.modality == "text" else tuple(self.space.shape or ())


@dataclass(frozen=True)
class Objective:
    """The task metric that a search optimises, found in ``info["metrics"]`` at the end of every episode."""

    metric: str
    unit: str = ""
    direction: Literal["maximize", "minimize"] = "maximize"

    def better(self, a: float, b: float) -> bool:
        """Whether ``a`` is strictly better than ``b``."""
        return a > b if self.direction == "maximize" else a < b

    def signed(self, value: float) -> float:
        """The value with its sign turned, if need be, so that more is better."""
        return value if self.direction == "maximize" else -value


@dataclass(frozen=True)
class TaskCard:
    """Everything about an environment that a designer, a builder or a report needs.

    Attributes:
        env_id: registered id.
        sources: sources by name; their order is that of encoders and reports (a Dict space sorts its own).
        action_space: the environment's action space.
        objective: task metric with unit and direction.
        description: the task in plain words; the LLM reads it.
        state_names: privileged variables in ``info["state"]``, the targets of linear probes.
        noop: the action that means "do nothing", or None where there is none.
    """

    env_id: str
    sources: Mapping[str, SourceSpec]
    action_space: gym.Space
    objective: Objective
    description: str
    state_names: tuple[str, ...] = ()
    noop: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not self.sources:
            raise LacerError(f"{self.env_id}: a task needs at least one source")
        for key, source in self.sources.items():
            if key != source.name:
                raise LacerError(f"{self.env_id}: source {source.name!r} stands under the key {key!r}")
        a = self.action_space
        if not isinstance(a, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
            raise LacerError(f"{self.env_id}: PPO acts in a Box, Discrete, MultiDiscrete or MultiBinary space, not in "
                             f"{a}")
        if isinstance(a, spaces.Box) and not (np.isfinite(a.low).all() and np.isfinite(a.high).all()):
            raise LacerError(f"{self.env_id}: the bounds of the action space {a} must be finite")
        if isinstance(a, spaces.Discrete | spaces.MultiDiscrete) and np.any(a.start != 0):
            raise LacerError(f"{self.env_id}: the actions must count from 0, not from {a.start}")
        if isinstance(a, spaces.Box) and a.dtype.kind != "f":
            raise LacerError(f"{self.env_id}: a Box of actions must hold floats, not {a.dtype}; for whole numbers "
                             "there is MultiDiscrete")
        if isinstance(a, spaces.MultiDiscrete | spaces.MultiBinary) and len(a.shape) != 1:
            raise LacerError(f"{self.env_id}: the action space {a} must have one dimension, not {len(a.shape)}: "
                             "flatten it in the environment")

    @property
    def observation_space(self) -> spaces.Dict:
        """The Dict space of all sources."""
        return spaces.Dict({name: s.space for name, s in self.sources.items()})

    def source_lines(self) -> list[str]:
        """One line per source: name, modality, shape, dtype, description."""
        rows = [(n, s.modality, "" if s.modality == "text" else f"{s.shape} {s.space.dtype}", s.description)
                for n, s in self.sources.items()]
        widths = [max(len(r[i]) for r in rows) for i in range(3)]
        return [f"{r[0]:{widths[0]}}  {r[1]:{widths[1]}}  {r[2]:{widths[2]}}  {r[3]}" for r in rows]

    def __str__(self) -> str:
        """The card as a person reads it."""
        o = self.objective
        return "\n".join([
            self.env_id, f"  {self.description}",
            "sources", *(f"  {line}" for line in self.source_lines()),
            f"actions    {self.action_space}" + ("" if self.noop is None else f"; do nothing: {self.noop.tolist()}"),
            f"objective  {o.direction} {o.metric}" + (f" ({o.unit})" if o.unit else ""),
            *([f"state      {', '.join(self.state_names)}"] if self.state_names else [])])
