"""Composite encoders: block library and registry, encoder specs, building a spec into a network, and its cost."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lacer.encoders.composite import CompositeEncoder, build
    from lacer.encoders.cost import EncoderCost, ModuleCost, measure_latency, predict, predict_parameters
    from lacer.encoders.limits import Limits
    from lacer.encoders.registry import (
        FUSION,
        BlockConfig,
        Features,
        FusionConfig,
        choice,
        list_blocks,
        parse_block,
        register_block,
    )
    from lacer.encoders.spec import EncoderSpec
    from lacer.encoders.text import MINILM, TextTable, text_model

_HOME = {
    **dict.fromkeys(("CompositeEncoder", "build"), "composite"),
    **dict.fromkeys(("EncoderCost", "ModuleCost", "measure_latency", "predict", "predict_parameters"), "cost"),
    "Limits": "limits",
    **dict.fromkeys(("FUSION", "BlockConfig", "Features", "FusionConfig", "choice", "list_blocks", "parse_block",
                     "register_block"), "registry"),
    "EncoderSpec": "spec",
    **dict.fromkeys(("MINILM", "TextTable", "text_model"), "text"),
}

__all__ = [
    "FUSION",
    "MINILM",
    "BlockConfig",
    "CompositeEncoder",
    "EncoderCost",
    "EncoderSpec",
    "Features",
    "FusionConfig",
    "Limits",
    "ModuleCost",
    "TextTable",
    "build",
    "choice",
    "list_blocks",
    "measure_latency",
    "parse_block",
    "predict",
    "predict_parameters",
    "register_block",
    "text_model",
]


def __getattr__(name: str) -> Any:
    # On demand: torch takes seconds to import, and a search's configuration needs only the limits.
    if name in _HOME:
        return getattr(importlib.import_module(f"lacer.encoders.{_HOME[name]}"), name)
    raise AttributeError(f"module 'lacer.encoders' has no attribute {name!r}")
