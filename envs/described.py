"""Any Gymnasium environment as a multi-source one: inferred or declared sources, frame history, a camera."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from lacer.envs.errors import LacerError, UnknownNameError
from lacer.envs.inference import Description, Part, declared, infer
from lacer.envs.sources import Objective, SourceSpec, TaskCard

log = logging.getLogger("lacer.envs")
_told: set[str] = set()

OPTIONS = ("sources", "objective", "description", "history", "camera", "noop")
"""What can be said of an environment, to :func:`describe`, ``register_env`` and ``make(..., describe={...})``."""


class Described(gym.Wrapper, RecordConstructorArgs):
    """An environment with a task card, whose observation is a Dict of sources; see :func:`describe`."""

    def __init__(
        self,
        env: gym.Env,
        sources: Mapping[str, Any] | None = None,
        objective: str | Objective | Mapping[str, str] | None = None,
        description: str = "",
        history: Mapping[str, int] | None = None,
        camera: int | None = None,
        noop: Any = None,
    ) -> None:
        RecordConstructorArgs.__init__(self, sources=sources, objective=objective, description=description,
                                       history=history, camera=camera, noop=noop)
        gym.Wrapper.__init__(self, env)
        self.env_id = env.spec.id if env.spec else type(env.unwrapped).__name__
        try:
            self._base = _base(env, declared(sources))
            parts = list(self._base.parts)
            if camera is not None:
                parts.append(_camera(env, camera))
            self._parts = {p.spec.name: p for p in parts}
            if len(self._parts) < len(parts):
                raise LacerError("the environment has a source `camera` already")
            if not isinstance(history, Mapping | None):
                raise LacerError(f"history must map names of sources to lengths, not {history!r}")
            self._histories = {n: History(self._find(n), length) for n, length in (history or {}).items()}
            made = [*self._parts.values(), *(Part(h.spec, h.read) for h in self._histories.values())]
            if len({p.spec.name for p in made}) < len(made):
                raise LacerError(f"the sources {sorted(p.spec.name for p in made)} are not unique")
            self.task_card = TaskCard(
                env_id=self.env_id, sources={p.spec.name: p.spec for p in made}, action_space=env.action_space,
                objective=_objective(objective) or self._base.objective, description=description or self._base.text,
                state_names=self._base.state_names, noop=_noop(noop, env) if noop is not None else self._base.noop)
        except LacerError as e:
            name = "" if self.env_id in str(e) else f"{self.env_id}: "
            if isinstance(e, UnknownNameError):
                raise
            raise LacerError(f"{name}{e}") from e
        self.observation_space = self.task_card.observation_space
        self.action_space = self.task_card.action_space
        self.inferred = tuple(f"{p.spec.name}: {p.note}" for p in made if p.note)
        """What may be doubted, by source; to be declared if it is wrong."""

    def _find(self, name: str) -> Part:
        if name not in self._parts:
            raise UnknownNameError(f"source of {self.env_id} (for its history)", name, self._parts)
        return self._parts[name]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """As the environment's; with the sources as observation."""
        obs, info = self.env.reset(seed=seed, options=options)
        self._return, self._length = 0.0, 0
        for h in self._histories.values():
            h.clear()
        return self._observe(obs), self._about(info)

    def step(self, action: Any) -> tuple[dict, SupportsFloat, bool, bool, dict]:
        """As the environment's; at the end of an episode ``info["metrics"]`` has ``return`` and ``length`` too."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        self._return += float(reward)
        self._length += 1
        own = info.get("metrics")
        info = self._about(info)
        if terminated or truncated:
            metrics = {"return": self._return, "length": float(self._length)}
            if self._base.metrics is not None:
                metrics |= self._base.metrics(float(reward), bool(terminated), info)
            metrics |= own if isinstance(own, Mapping) else {}
            wanted = self.task_card.objective.metric
            if wanted not in metrics and wanted in info:
                metrics[wanted] = float(info[wanted])
            info["metrics"] = metrics
        return self._observe(obs), float(reward), bool(terminated), bool(truncated), info

    def _about(self, info: Mapping[str, Any]) -> dict[str, Any]:
        """The environment's info with the state as the card announces it; metrics come at the end of an episode."""
        out = {k: v for k, v in info.items() if k != "metrics" and (k != "state" or self._base.state_names)}
        if self._base.state is not None:
            out["state"] = self._base.state()
        return out

    def _observe(self, obs: Any) -> dict[str, Any]:
        out = {n: p.read(obs) for n, p in self._parts.items()}
        for h in self._histories.values():
            out[h.spec.name] = h.read(out[h.of])
        return out


class History:
    """The last ``length`` values of a source as a further source ``<name>_history``, oldest first.

    vector -> series (T, D); series (T0, F) -> series (T T0, F); image -> image with T times the channels; text -> text,
    joined by line breaks; set (N, F) -> set (T N, F + 1), whose last column is the age, 0 now to 1 oldest. At the start
    of an episode the first value fills the past, as in Gymnasium's ``FrameStackObservation``.

    Raises:
        LacerError: for a length below 2.
    """

    def __init__(self, part: Part, length: int) -> None:
        s = part.spec
        if isinstance(length, bool) or not isinstance(length, int) or length < 2:
            raise LacerError(f"the history of {s.name!r} needs a length of at least 2, not {length!r}")
        self.of, self._length = s.name, length
        self._past: deque[Any] = deque(maxlen=length)
        self._modality = s.modality
        space: gym.Space
        if isinstance(s.space, spaces.Text):
            space = spaces.Text((s.space.max_length + 1) * length, min_length=0,
                                charset="".join(sorted(s.space.character_set)) + "\n")
        else:
            assert isinstance(s.space, spaces.Box)
            low, high = (self._join([b] * length) for b in (s.space.low, s.space.high))
            if s.modality == "set":
                low[:, -1], high[:, -1] = 0, 1
            space = spaces.Box(low, high, dtype=s.space.dtype.type)
        self.spec = SourceSpec(f"{s.name}_history", "series" if s.modality == "vector" else s.modality, space,
                               f"The last {length} values of `{s.name}`, oldest first. {s.description}")

    def clear(self) -> None:
        """Forget the past, at the start of an episode."""
        self._past.clear()

    def read(self, value: Any) -> Any:
        """Remember a value; the history with it."""
        value = value if isinstance(value, str) else np.array(value)  # some environments reuse their arrays
        self._past.extend([value] * (1 if self._past else self._length))
        return self._join(list(self._past))

    def _join(self, values: Sequence[Any]) -> Any:
        if self._modality == "text":
            return "\n".join(values)
        if self._modality == "vector":
            return np.stack(values)
        if self._modality == "image":
            return np.concatenate(values, -1)
        if self._modality == "series":
            return np.concatenate(values)
        ages = np.linspace(1, 0, self._length, dtype=np.float32)
        return np.concatenate([np.pad(v, ((0, 0), (0, 1)), constant_values=a)
                               for v, a in zip(values, ages, strict=True)])


def describe(
    env: gym.Env | str,
    *,
    sources: Mapping[str, Any] | None = None,
    objective: str | Objective | Mapping[str, str] | None = None,
    description: str = "",
    history: Mapping[str, int] | None = None,
    camera: int | None = None,
    noop: Any = None,
    quiet: bool = False,
) -> gym.Env:
    """An environment with sources and a task card, inferred where it has none.

    ::

        env = lacer.envs.describe(gym.make("CartPole-v1"), history={"observation": 8})
        print(env.task_card)

    A Dict or Tuple space is taken apart; Box becomes vector, series or image by its shape and dtype, Discrete a one-hot
    vector, Text stays text. What was inferred is written to the log ``lacer.envs`` (standard error, if nothing else is
    set up), once per process. ``info["metrics"]`` has ``return`` and ``length`` at the end of every episode.

    Args:
        env: an environment, or the id of one.
        sources: what is known better, by source name: a modality, or ``{"modality", "description", "low", "high",
            "mask"}`` (``low`` and ``high`` are the values of black and white of an image made of numbers;
            ``mask: False`` is for a set whose elements are always there), or None to leave the source out.
        objective: metric to optimise: ``return`` (the default), ``length``, one in ``info["metrics"]`` or ``info`` at
            the end of an episode; an :class:`Objective` or ``{"metric", "unit", "direction"}`` gives its direction.
        description: the task in plain words, for designers that read.
        history: length by source name: adds the source ``<name>_history``, see :class:`History`.
        camera: adds an image source ``camera`` of that many pixels in height and width, from ``render()``.
        noop: the action that means "do nothing".
        quiet: nothing is logged.

    Raises:
        LacerError: a space that cannot be a source, a declaration that does not fit it, an action space that
            Stable-Baselines3's PPO cannot act in.
        UnknownNameError: a source that is not there.
    """
    given = {"sources": sources, "objective": objective, "description": description, "history": history,
             "camera": camera, "noop": noop}
    if isinstance(env, str):
        from lacer.envs.registration import make

        return make(env, describe={k: v for k, v in given.items() if v is not None})
    made = Described(env, **given)
    if not quiet:
        tell(made)
    return made


def tell(env: Described) -> None:
    """Logs the sources that an environment was given and what of them may be doubted, once per process; nothing if it
    declares them itself."""
    if env.env.has_wrapper_attr("task_card"):
        return
    lines = [f"{env.env_id}: sources taken from its observation",
             *(f"  {line}" for line in env.task_card.source_lines())]
    if env.inferred:
        lines += [f"  check {line}" for line in env.inferred]
        lines.append('  what is wrong can be declared: describe(env, sources={"name": "set"}), or on the command line '
                     '--env-kwargs \'{"describe": {"sources": {"name": "set"}}}\'')
    text = "\n".join(lines)
    if text not in _told:
        _told.add(text)
        log.warning(text)


def _base(env: gym.Env, said: Mapping[str, Any]) -> Description:
    """What is known of an environment: from its own card, its adapter, or its spaces."""
    if not env.has_wrapper_attr("task_card"):
        from lacer.envs.adapters import adapter_of

        adapter = adapter_of(env)
        if adapter is not None:
            return adapter.describe(env, said)
        return Description(infer(env.observation_space, said), text=f"The environment {_name(env)}.")
    card: TaskCard = env.get_wrapper_attr("task_card")
    for name, word in said.items():
        if name not in card.sources:
            raise UnknownNameError(f"source of {card.env_id}", name, card.sources)
        if word is not None and set(word) - {"description"}:
            raise LacerError(f"source {name!r} is declared by the environment itself; only its description can be "
                             "changed, or the source left out")
    parts = []
    for name, s in card.sources.items():
        word = said.get(name, {})
        if word is not None:
            parts.append(Part(SourceSpec(name, s.modality, s.space, word.get("description") or s.description),
                              _item(name)))
    return Description(parts, card.description, card.objective, card.noop, state_names=card.state_names)


def _item(name: str) -> Callable[[Any], Any]:
    return lambda obs: obs[name]


def _name(env: gym.Env) -> str:
    return env.spec.id if env.spec else type(env.unwrapped).__name__


def _objective(given: str | Objective | Mapping[str, str] | None) -> Objective | None:
    if given is None or isinstance(given, Objective):
        return given
    if isinstance(given, str):
        return Objective(given)
    try:
        made = Objective(**given)  # type: ignore[arg-type]
    except TypeError as e:
        raise LacerError(f"objective needs metric, and may have unit and direction: {e}") from None
    if made.direction not in ("maximize", "minimize"):
        raise UnknownNameError("direction of the objective", str(made.direction), ("maximize", "minimize"))
    return made


def _noop(given: Any, env: gym.Env) -> np.ndarray:
    space = env.action_space
    try:
        action = np.asarray(given, space.dtype)
    except (TypeError, ValueError):
        raise LacerError(f"noop {given!r} is no action of {space}") from None
    if action.shape != (space.shape or ()) or not space.contains(action):
        raise LacerError(f"noop {given!r} is no action of {space}")
    return action


def _camera(env: gym.Env, size: int) -> Part:
    if isinstance(size, bool) or not isinstance(size, int) or not 8 <= size <= 1024:
        raise LacerError(f"camera must be a number of pixels from 8 to 1024, not {size!r}")
    if env.render_mode != "rgb_array":
        raise LacerError('a camera needs render_mode="rgb_array": gym.make(..., render_mode="rgb_array")')

    def read(_: Any) -> np.ndarray:
        frame = env.render()
        if not isinstance(frame, np.ndarray) or frame.ndim != 3 or frame.shape[2] != 3:
            raise LacerError(f"render() gave {type(frame).__name__} instead of a picture (H, W, 3)")
        return shrink(frame, size)

    return Part(SourceSpec("camera", "image", spaces.Box(0, 255, (size, size, 3), np.uint8),
                           "A camera picture of the scene, from the environment's own rendering."), read)


def shrink(picture: np.ndarray, size: int) -> np.ndarray:
    """A picture (H, W, C) uint8 at (size, size, C), each new pixel the mean of the area it covers."""
    if picture.shape[:2] == (size, size):
        return picture
    rows, columns = (_areas(n, size) for n in picture.shape[:2])
    return np.rint(np.einsum("ih,hwc,jw->ijc", rows, picture.astype(np.float32), columns, optimize=True)).astype(
        np.uint8)


def _areas(old: int, new: int) -> np.ndarray:
    """(new, old): the share that each old pixel has in each new one."""
    edges = np.linspace(0, old, new + 1)
    pixel = np.arange(old)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return (overlap.clip(0) * (new / old)).astype(np.float32)
