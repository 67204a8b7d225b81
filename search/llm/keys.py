"""API keys: read from the environment when a request is made, kept in no attribute, cut out of every text."""

from __future__ import annotations

import os
import re
from typing import Any

from lacer.envs import LacerError
from lacer.search.llm.base import KEYS

HIDDEN = "[API key]"


def api_key(provider: str) -> str:
    """The key of a provider, empty if none is set. Raises LacerError if it is none that could be sent."""
    variable = KEYS[provider]
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or (key and not key.isprintable()) or set(key) & set(" \"'\\"):
        raise LacerError(f"{variable} holds characters that no API key has; set it anew")
    return key


def redact(value: Any) -> Any:
    """A text, or all texts in plain data, without any API key."""
    if isinstance(value, dict):
        return {k: redact(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact(v) for v in value]
    if isinstance(value, str):
        for variable in KEYS.values():
            key = os.environ.get(variable, "").strip()
            if len(key) >= 6:
                value = value.replace(key, HIDDEN)
    return value


def short(error: object) -> str:
    """Text of an error in one short line, without keys, also half-hidden ones, which servers like to repeat."""
    text = re.sub(r"\bsk-[\w*.-]+", HIDDEN, redact(str(error)[:20_000]))
    for variable in KEYS.values():
        key = os.environ.get(variable, "").strip()
        if len(key) >= 12:  # "abcd...wxyz", "abcd****wxyz"
            text = re.sub(re.escape(key[:4]) + r"[\w*.…-]*[*.…]{2,}[\w*.…-]*", HIDDEN, text)
    return " ".join(text.split())[:300]
