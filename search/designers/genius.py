"""GENIUS: a language model designs from scores alone."""

from __future__ import annotations

from typing import ClassVar

from lacer.search.designers.base import register_designer
from lacer.search.designers.llm_base import LLMDesigner, Turn
from lacer.search.llm.prompt import render


@register_designer
class Genius(LLMDesigner):
    """a language model proposes a better encoder from the space and the scores of all encoders, nothing else

    GENIUS (2304.10970): the model sees the space and all former pairs of architecture and metric, and is asked for a
    better one with its rationale; temperature 0.

    Deviations: the prompt is rebuilt from the study instead of carrying the chat on; with many trials the best are told
    in full, others by what sets them apart from the best, and the worst are left out; invalid and repeated encoders go
    back with their error.
    """

    name: ClassVar[str] = "genius"
    paper: ClassVar[str] = "GENIUS, 2304.10970"
    temperature: ClassVar[float] = 0.0

    def design(self, turn: Turn, k: int) -> None:
        ask = ("rationale",)
        turn.encoders(render("genius", turn.study, prompts=self.prompts, feedback=("expert",), ask=ask, carries=False),
                      ask=ask)
