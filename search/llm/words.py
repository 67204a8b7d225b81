"""Words and numbers fit for a prompt. Text of environments, blocks and models goes in quoted, so it stays data."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from lacer.encoders import FUSION, EncoderSpec
from lacer.search.llm.reply import clean
from lacer.search.space import CONDITION

_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
_PLAIN = re.compile(r"[\w+-]{1,80}")


def as_json(value: object) -> str:
    """JSON on one line, whose strings hold no character that ends a line, closes a fence or hides text."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(f"\\u{ord(c):04x}" if c == "`" or (ord(c) < 0x10000 and unicodedata.category(c) in _UNSEEN) else c
                   for c in text)


@lru_cache(maxsize=2_000)  # a prompt is rendered several times, until it is short enough
def quoted(text: object, limit: int = 1500) -> str:
    """A text as a JSON string on one line, without characters that are not seen."""
    return as_json(clean(text, limit).replace("`", "'"))


def name(text: object) -> str:
    """A name as it is if it is a plain word, else quoted."""
    text = str(text)
    return text if _PLAIN.fullmatch(text) else quoted(text, 100)


def num(x: float | None) -> str:
    """A number in three significant digits."""
    return "?" if x is None else f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}"


def short(spec: EncoderSpec, sources: Sequence[str]) -> str:
    """An encoder with its hyper-parameters in one line."""
    parts = [f"{name(n)}={spec.sources[n].short()}" if n in spec.sources else f"{name(n)} left out" for n in sources]
    routing = [] if spec.condition is None else [f"{CONDITION}={name(spec.condition)}"]
    return "; ".join([*parts, f"{FUSION}={spec.fusion.short()}", *routing])
