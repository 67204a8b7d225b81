"""From spaces to sources: which modality a space has, how it is read, and what remains a guess."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lacer.envs.errors import LacerError, UnknownNameError, did_you_mean
from lacer.envs.sources import MODALITIES, Modality, Objective, SourceSpec

LONGEST_ONE_HOT = 10_000
"""A Discrete space of more values does not become a one-hot vector."""
TEXT_LENGTH = 512
"""Letters allowed to spaces that hold text and do not say how long."""
_FIELDS = ("modality", "description", "low", "high", "mask")

Declared = Mapping[str, Any]
"""What a user says of one source: ``modality``, ``description``, and for images made of numbers ``low`` and ``high``;
for a set without a mask ``mask: false``."""


@dataclass(frozen=True)
class Part:
    """A source and how its value is read from the environment's own observation.

    Attributes:
        spec: the source.
        read: own observation -> value in ``spec.space``.
        note: what was inferred and what may be doubted; empty for what was declared.
    """

    spec: SourceSpec
    read: Callable[[Any], Any]
    note: str = ""


@dataclass(frozen=True)
class Description:
    """What an adapter or the inference knows of an environment.

    Attributes:
        parts: the sources, in order.
        text: the task in plain words.
        objective: what a search optimises.
        noop: action that means "do nothing", if known.
        state: privileged variables of the moment, the targets of probes.
        metrics: (reward of the last step, terminated, info) -> metrics of an episode beside return and length.
    """

    parts: list[Part]
    text: str
    objective: Objective = field(default_factory=lambda: Objective("return"))
    noop: Any = None
    state: Callable[[], dict[str, float]] | None = None
    metrics: Callable[[float, bool, Mapping[str, Any]], dict[str, float]] | None = None
    state_names: tuple[str, ...] = ()


def declared(sources: Mapping[str, Any] | None) -> dict[str, Declared | None]:
    """What a user says of sources in its full form: a bare modality becomes ``{"modality": ...}``.

    Raises:
        LacerError: unknown modality or field.
    """
    out: dict[str, Declared | None] = {}
    if sources is not None and not isinstance(sources, Mapping):
        raise LacerError(f"sources must map names to modalities or declarations, not {sources!r}")
    for name, said in (sources or {}).items():
        if isinstance(said, str):
            said = {"modality": said}
        if said is not None and not isinstance(said, Mapping):
            raise LacerError(f"source {name!r}: expected a modality, a mapping with {', '.join(_FIELDS)}, or null to "
                             f"leave it out, not {said!r}")
        for key in said or {}:
            if key not in _FIELDS:
                raise LacerError(f"source {name!r} has no field {key!r}{did_you_mean(str(key), _FIELDS)} "
                                 f"Fields: {', '.join(_FIELDS)}.")
        if said and "modality" in said and said["modality"] not in MODALITIES:
            raise UnknownNameError(f"modality of source {name!r}", str(said["modality"]), MODALITIES)
        out[str(name)] = said
    return out


def infer(space: gym.Space, said: Mapping[str, Declared | None] | None = None) -> list[Part]:
    """The sources of an observation space. Dict and Tuple spaces are taken apart, names joined by ``_``.

    Args:
        space: any composition of Box, Discrete, MultiDiscrete, MultiBinary, Text, Dict and Tuple; and spaces whose
            samples are strings.
        said: what is known better, by source name (:func:`declared`); None for a source that is left out.

    Raises:
        LacerError: a space that cannot be a source, a declaration that does not fit, an unknown source.
    """
    said = said or {}
    leaves = _leaves(space, ())
    names = {"_".join(path).replace(".", "_") or "observation": (path, s) for path, s in leaves}
    if len(names) < len(leaves):
        raise LacerError("two entries of the observation space would get the same name; rename one of them: "
                         f"{sorted('_'.join(p) for p, _ in leaves)}")
    for name in said:
        if name not in names:
            raise UnknownNameError("source", name, names)
    parts = []
    for name, (path, leaf_space) in names.items():
        word = said.get(name, {})
        if word is not None:
            parts.append(leaf(name, leaf_space, word, path))
    return parts


def _leaves(space: gym.Space, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], gym.Space]]:
    if isinstance(space, spaces.Dict):
        return [x for k, s in space.spaces.items() for x in _leaves(s, (*path, str(k)))]
    if isinstance(space, spaces.Tuple):
        return [x for i, s in enumerate(space.spaces) for x in _leaves(s, (*path, str(i) if path else f"part_{i}"))]
    return [(path, space)]


def _get(space_path: tuple[str, ...]) -> Callable[[Any], Any]:
    def get(obs: Any) -> Any:
        for key in space_path:
            obs = obs[int(key.removeprefix("part_"))] if isinstance(obs, tuple) else obs[key]
        return obs

    return get


def leaf(name: str, space: gym.Space, said: Declared | None = None, path: tuple[str, ...] = ()) -> Part:
    """One source from one space that is no composition; see :func:`infer`."""
    said = said or {}
    modality, note = said.get("modality"), ""
    if modality is None:
        modality, note = _modality(name, space)
    convert, out, how = _reader(name, space, modality, said)
    text = said.get("description") or f"The environment's own observation{f' `{name}`' if path else ''}: {how}."
    get = _get(path)
    return Part(SourceSpec(name, modality, out, text), lambda obs: convert(get(obs)), note)


def _modality(name: str, space: gym.Space) -> tuple[Modality, str]:
    """The modality that a space has for sure, or is taken to have; and a note if that may be doubted."""
    if _is_text(space):
        return "text", "" if isinstance(space, spaces.Text) else f"taken as text of up to {TEXT_LENGTH} letters"
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        return "vector", ""
    if not isinstance(space, spaces.Box):
        raise LacerError(f"the entry {name!r} of the observation space, {space}, cannot be a source; leave it out with "
                         f"sources={{{name!r}: None}} or turn it into a Box, Discrete or Text space")
    pixels = space.dtype == np.uint8 and space.low.min() == 0 and space.high.max() == 255
    if pixels and len(space.shape) == 2 and min(space.shape) >= 8:
        return "image", "one channel; if its rows are steps in time, declare it 'series'"
    if pixels and len(space.shape) == 3:
        return "image", "channels first, moved last" if _first(space.shape) else ""
    if pixels and len(space.shape) == 4:
        return "image", "frames stacked into channels"
    if len(space.shape) == 2 and min(space.shape) > 1:
        return "series", ("rows taken as steps in time, oldest first; if they are elements whose first number says "
                          "whether they are there, declare it 'set'; 'vector' flattens it")
    if len(space.shape) > 2:
        return "vector", "flattened; if it is a picture, declare it 'image' (with low and high if it has no bounds)"
    return "vector", ""


def _is_text(space: gym.Space) -> bool:
    return isinstance(space, spaces.Text) or getattr(space.dtype, "kind", "") == "U"


def _first(shape: tuple[int, ...]) -> bool:
    """Whether channels stand first: the shorter of the outer axes holds them, the last one if in doubt."""
    return shape[0] < shape[-1]


def _reader(name: str, space: gym.Space, modality: Modality,
            said: Declared) -> tuple[Callable[[Any], Any], gym.Space, str]:
    """How a value is brought into its modality's layout; the space of the result; the layout in words."""
    if modality == "text":
        if isinstance(space, spaces.Text):
            return lambda x: x, space, "text"
        if not _is_text(space):
            raise LacerError(f"source {name!r} is declared text; its space is {space}")
        return str, spaces.Text(TEXT_LENGTH, min_length=0, charset=string.printable), "text"
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        if modality != "vector":
            raise LacerError(f"source {name!r} is declared {modality}; its space {space} can only be a vector")
        size = int(spaces.flatdim(space))
        if size > LONGEST_ONE_HOT:
            raise LacerError(f"source {name!r}: {space} would become a vector of {size} numbers; leave it out with "
                             f"sources={{{name!r}: None}}")
        flat = spaces.flatten
        return (lambda x: np.asarray(flat(space, x), np.float32), spaces.Box(0, 1, (size,), np.float32),
                f"{size} numbers, 0 or 1")
    if not isinstance(space, spaces.Box):
        raise LacerError(f"source {name!r} is declared {modality}; its space is {space}")
    if modality == "image":
        return _image(name, space, said)
    if modality == "set" and said.get("mask") is False and len(space.shape) == 2:
        low, high = (np.pad(_float(b), ((0, 0), (1, 0)), constant_values=v)
                     for b, v in ((space.low, 0), (space.high, 1)))
        return (lambda x: np.pad(_float(x), ((0, 0), (1, 0)), constant_values=1), spaces.Box(low, high),
                f"{space.shape[0]} x {space.shape[1] + 1} elements x numbers, all present")
    shape: tuple[int, ...] = (int(np.prod(space.shape)),) if modality == "vector" else space.shape
    out = spaces.Box(_float(space.low).reshape(shape), _float(space.high).reshape(shape), dtype=np.float32)
    words = {"vector": "numbers", "series": "steps x numbers", "set": "elements x numbers"}[modality]
    return (lambda x: _float(x).reshape(shape)), out, f"{' x '.join(map(str, shape))} {words}"


def _float(x: Any) -> np.ndarray:
    with np.errstate(over="ignore"):  # a bound beyond float32 is no bound
        return np.asarray(x).astype(np.float32)


def _image(name: str, space: spaces.Box, said: Declared) -> tuple[Callable[[Any], Any], gym.Space, str]:
    n = len(space.shape)
    if n not in (2, 3, 4):
        raise LacerError(f"source {name!r} is declared image; its shape is {space.shape}, not (H, W), (H, W, C) or "
                         "frames of these")
    scale = None
    if space.dtype != np.uint8:
        low, high = (float(said[k]) if k in said else float(getattr(space, k).flat[0]) for k in ("low", "high"))
        if not (np.isfinite([low, high]).all() and low < high):
            raise LacerError(f"source {name!r} is declared image and has no bounds; add low and high, the values of "
                             "black and white")
        scale = (low, 255 / (high - low))

    def convert(x: Any) -> np.ndarray:
        x = np.asarray(x)
        if scale is not None:
            x = ((x - scale[0]) * scale[1]).clip(0, 255).astype(np.uint8)
        if n == 2:
            return x[..., None]
        if n == 3:
            return np.moveaxis(x, 0, -1) if _first(space.shape) else x
        frames = np.moveaxis(x, 1, -1) if _first(space.shape[1:]) else x  # (T, H, W, C)
        return np.moveaxis(frames, 0, -2).reshape(*frames.shape[1:3], -1)

    shape = convert(np.zeros(space.shape, space.dtype)).shape
    return convert, spaces.Box(0, 255, shape, np.uint8), f"a picture of {shape[0]}x{shape[1]}, {shape[2]} channels"
