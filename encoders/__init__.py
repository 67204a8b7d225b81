"""Composite encoders: block library and registry, encoder specs, and building a spec into a network."""

from lacer.encoders.composite import CompositeEncoder, build
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

__all__ = [
    "FUSION",
    "MINILM",
    "BlockConfig",
    "CompositeEncoder",
    "EncoderSpec",
    "Features",
    "FusionConfig",
    "TextTable",
    "build",
    "choice",
    "list_blocks",
    "parse_block",
    "register_block",
    "text_model",
]
