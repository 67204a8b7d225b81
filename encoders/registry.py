"""The block library: one pydantic config per block, registered under (modality, name)."""

from __future__ import annotations

import importlib
import math
import pkgutil
import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, ClassVar, NamedTuple, Self, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from lacer.envs import LacerError, UnknownNameError, did_you_mean

FUSION = "fusion"


class Features(NamedTuple):
    """What a source block returns, so that every fusion works with every block.

    Attributes:
        vector: (B, D) summary of the source.
        tokens: (B, N, D) parts of the source; ``vector[:, None]`` for blocks that have none.
        mask: (B, N), True for tokens that are there; None if all are.
    """

    vector: Tensor
    tokens: Tensor
    mask: Tensor | None = None


def choice(default: Any, options: Sequence[Any], description: str, *, when: tuple[str, Sequence[Any]] | None = None,
           most: float | None = None) -> Any:
    """A hyper-parameter of a block: its default, the options that a search may take, and what it does.

    Args:
        default: what a spec that does not name the field gets.
        options: what a search may take.
        description: a few words; the LLM reads them.
        when: (an earlier field, its values) with which this field has an effect. With any other value it is set to its
            default, so encoders that are the same network are the same spec.
        most: largest value of a number; by default 16 times the largest option.
    """
    if default not in options:
        raise ValueError(f"default {default!r} is not among {options}")
    extra: dict[str, Any] = {"choices": list(options)}
    if when is not None:
        extra["when"] = [when[0], list(when[1])]
    field: dict[str, Any] = {"default": default, "description": description, "json_schema_extra": extra}
    if isinstance(default, int | float) and not isinstance(default, bool):
        # A space may be widened in YAML, within reason: a typing slip must not ask for a terabyte.
        low = min(options) / 16
        field |= {"ge": math.ceil(low) if isinstance(default, int) else low,
                  "le": 16 * max(options) if most is None else most}
    return Field(**field)


def dropout() -> Any:
    """The field ``dropout``. It acts in the updates only: SB3 collects and evaluates in evaluation mode."""
    return choice(0.0, (0.0, 0.1), "share of units switched off in training", most=0.9)


def modality_dropout() -> Any:
    """The field of fusions that leaves whole sources out; it acts in the updates only, as :func:`dropout`."""
    return choice(0.0, (0.0, 0.1), "share of samples in which a source is left out in training", most=0.9)


class BlockConfig(BaseModel):
    """Base of all block configs. Fields are hyper-parameters, declared with :func:`choice`.

    A concrete config names itself in ``block: Literal["gru"] = "gru"``, says in its docstring in one or two plain
    sentences what it does and when it helps (the LLM reads it), and implements :meth:`build`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    block: str
    modality: ClassVar[str]
    paper: ClassVar[str] = ""
    text_level: ClassVar[str] = "sentence"
    """For text blocks: ``sentence`` gets one embedding (B, E), ``token`` gets (B, L, E) and a mask (B, L)."""

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        """The network. A source block gets the source's shape without the batch (for text: ``(E,)``, the width of the
        embedding) and returns a module with ``dim`` whose forward gives :class:`Features`; see :class:`FusionConfig`
        for fusion blocks."""
        raise NotImplementedError

    @classmethod
    def choices(cls) -> dict[str, list[Any]]:
        """Searchable fields with their options, in order."""
        out: dict[str, list[Any]] = {}
        for name, field in cls.model_fields.items():
            extra = field.json_schema_extra
            options = extra.get("choices") if isinstance(extra, dict) else None
            if isinstance(options, list):
                out[name] = list(options)
        return out

    @classmethod
    def conditions(cls) -> dict[str, tuple[str, list[Any]]]:
        """Fields that have an effect only with some values of another field: name -> (other field, those values)."""
        out: dict[str, tuple[str, list[Any]]] = {}
        for name, field in cls.model_fields.items():
            extra = field.json_schema_extra
            when = extra.get("when") if isinstance(extra, dict) else None
            if isinstance(when, list):
                out[name] = (str(when[0]), list(cast(list[Any], when[1])))
        return out

    @model_validator(mode="after")
    def _canonical(self) -> Self:
        for name, (other, values) in self.conditions().items():
            if getattr(self, other) not in values:
                self.__dict__[name] = type(self).model_fields[name].default  # frozen, so not by assignment
        return self

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring."""
        return (cls.__doc__ or "").strip().split("\n")[0]

    def short(self) -> str:
        """The block in a few characters, e.g. ``gru(width=32,depth=1)``."""
        fields = ",".join(f"{k}={v}" for k, v in self.model_dump(exclude={"block"}).items())
        return f"{self.block}({fields})"


class FusionConfig(BlockConfig):
    """Base of fusion configs. :meth:`build_fusion` gets the width of each source's features, by source name.

    A fusion that treats one chosen source apart sets ``conditioned`` and implements :meth:`build_routed` instead; the
    source is part of the spec (``routing.condition``) and of the search space.
    """

    modality: ClassVar[str] = FUSION
    conditioned: ClassVar[bool] = False

    def build_fusion(self, dims: Mapping[str, int]) -> nn.Module:
        """A module with ``dim`` (width of the state) whose forward takes ``dict[str, Features]`` and gives (B, dim)."""
        raise NotImplementedError

    def build_routed(self, dims: Mapping[str, int], condition: str | None) -> nn.Module:
        """As :meth:`build_fusion`, given the source that conditions the fusion; None unless ``conditioned``."""
        return self.build_fusion(dims)


C = TypeVar("C", bound=BlockConfig)
_BLOCKS: dict[tuple[str, str], type[BlockConfig]] = {}
_loaded = False

ENTRY_POINTS = "lacer.blocks"
"""Group of the entry points by which other packages bring blocks."""


def register_block(cls: type[C]) -> type[C]:
    """Class decorator: registers a block config under (``modality``, default of ``block``).

    A name that is taken is overwritten with a warning that names both origins.
    """
    name = cls.model_fields["block"].default
    if not isinstance(name, str):
        raise TypeError(f"{cls.__name__} needs `block: Literal['name'] = 'name'`")
    key = (cls.modality, name)
    old = _BLOCKS.get(key)
    if old is not None and (old.__module__, old.__qualname__) != (cls.__module__, cls.__qualname__):
        warnings.warn(f"{cls.modality} block {name!r} of {old.__module__} is replaced by that of {cls.__module__}",
                      stacklevel=2)
    _BLOCKS[key] = cls
    return cls


def list_blocks(modality: str | None = None) -> dict[tuple[str, str], type[BlockConfig]]:
    """Registered blocks, of one modality or of all, sorted by (modality, name).

    Those of other packages are among them: every entry point in the group ``lacer.blocks`` names a module that
    registers blocks, or a block config. One that cannot be imported is left out with a warning.
    """
    global _loaded
    if not _loaded:
        _loaded = True  # first: a module that is imported here may ask for the blocks itself
        package = importlib.import_module("lacer.encoders.blocks")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"lacer.encoders.blocks.{module.name}")
        for entry in metadata.entry_points(group=ENTRY_POINTS):
            _load(entry)
    return {k: v for k, v in sorted(_BLOCKS.items()) if modality is None or k[0] == modality}


def _load(entry: metadata.EntryPoint) -> None:
    try:
        loaded = entry.load()
        if isinstance(loaded, type) and issubclass(loaded, BlockConfig):
            register_block(loaded)
    except (Exception, SystemExit) as e:  # somebody else's code must not be the end of ours
        origin = "" if entry.dist is None else f" of the package {entry.dist.name} {entry.dist.version}"
        warnings.warn(f"the blocks of the entry point {entry.name} = {entry.value}{origin} are left out: "
                      f"{type(e).__name__}: {e}", stacklevel=2)


def parse_block(modality: str, data: Any, where: str) -> BlockConfig:
    """Checks one block given as a dict, e.g. ``{"block": "gru", "width": 32}``.

    Raises:
        LacerError: unknown block or field ("did you mean"), value of the wrong type or out of range; names ``where``.
    """
    if isinstance(data, BlockConfig):
        data = data.model_dump()
    if not isinstance(data, dict):
        raise LacerError(f"{where}: expected an object such as {{\"block\": \"...\"}}, got {_shown(data)}")
    known = {name: cls for (_, name), cls in list_blocks(modality).items()}
    name = data.get("block")
    if not isinstance(name, str):
        raise LacerError(f"{where}: needs a \"block\", one of: {', '.join(known)}")
    if name not in known:
        raise UnknownNameError(f"{modality} block at {where}", name[:80], known)
    cls = known[name]
    for key in data:
        if key not in cls.model_fields:
            fields = [f for f in cls.model_fields if f != "block"]
            raise LacerError(f"{where}: {name} has no field {str(key)[:80]!r}{did_you_mean(str(key)[:80], fields)} "
                             f"Fields: {', '.join(fields) or 'none'}.")
    try:
        return cls.model_validate(data)
    except ValidationError as e:
        first = e.errors()[0]
        raise LacerError(f"{where}.{'.'.join(map(str, first['loc']))}: {first['msg']} "
                         f"(got {_shown(first['input'])})") from None


def _shown(value: Any) -> str:
    """A value for an error message, cut short; some cannot be printed (5,000 digits, lists in lists)."""
    try:
        return repr(str(value)[:80])
    except (ValueError, RecursionError):
        return f"{type(value).__name__} too large to show"
