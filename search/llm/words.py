"""Words and numbers fit for a prompt. Text of environments, blocks and models goes in quoted, so it stays data."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from lacer.encoders import FUSION, EncoderSpec
from lacer.search.llm.reply import clean
from lacer.search.space import CONDITION

_PLAIN = re.compile(r"[\w+-]{1,80}")


def quoted(text: object, limit: int = 1500) -> str:
    """A text as a JSON string on one line."""
    return json.dumps(clean(text, limit).replace("`", "'"), ensure_ascii=False)


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
