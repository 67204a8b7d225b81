"""Closed loop with feedback memory: one call advises, another designs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from lacer.encoders import EncoderSpec, TextTable, build
from lacer.envs import LacerError, TaskCard
from lacer.search.designers.base import register_designer
from lacer.search.designers.llm_base import LLMDesigner, Turn, Wrong, text_field
from lacer.search.llm import LLMConfig
from lacer.search.llm.facts import facts, memory, ranked
from lacer.search.llm.prompt import SETS, render
from lacer.search.llm.reply import clean
from lacer.search.space import Point

ADVICE = {"reason": {"type": "string"},
          "suggestions": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 3}}


@register_designer
class FeedbackMemory(LLMDesigner):
    """a language model advises from the best, the latest and a memory of what was suggested; a second call designs

    Closed loop with feedback memory (2603.12091): the prompt improver sees the best design, the current one and the
    last K (problem, suggestion, outcome), failures included, and writes a reason and suggestions; the code generator
    sees the task, the best design and the suggestions. A design has to survive a dummy forward pass before it costs
    anything.

    Deviations: the generator writes an encoder as JSON instead of code; both calls are made when a proposal is wanted,
    instead of the improver's when a result comes in; invalid encoders go back with their error.

    Args:
        seed, llm, run_dir, batch, prompts: see :class:`LLMDesigner`.
        window: K, the proposals that the memory holds (the paper: 5); 0 is no memory.

    Raises:
        LacerError: for a negative window, and as :class:`LLMDesigner` does.
    """

    name: ClassVar[str] = "feedback-memory"
    requests: ClassVar[int] = 2
    paper: ClassVar[str] = "Closed loop with feedback memory, 2603.12091"

    def __init__(self, seed: int = 0, *, llm: LLMConfig, run_dir: Path | None = None, batch: int = 1,
                 prompts: str = SETS[0], window: int = 5) -> None:
        super().__init__(seed, llm=llm, run_dir=run_dir, batch=batch, prompts=prompts)
        if window < 0:
            raise LacerError(f"window must be at least 0, not {window}")
        self.window = window

    def design(self, turn: Turn, k: int) -> None:
        study = turn.study
        order = ranked(study)
        best = facts(order[0], study) if order else None
        last = max(order, key=lambda t: t.number, default=None)
        current = facts(last, study) if last is not None and last is not order[0] else None
        told: dict[str, Any] = {"prompts": self.prompts, "feedback": ("expert", "reward", "noise"), "best": best}
        advice = turn.fields("improver", render("improver", study, current=current, past=memory(
            study, self.window, (self.name,)), **told), ADVICE, _advice)
        turn.notes |= {"problem": advice["reason"], "suggestions": advice["suggestions"]}

        def forward(point: Point) -> Wrong | None:
            error = dummy_forward(study.encoders.to_spec(point), study.card)
            return Wrong(error, {"fault": "forward"}) if error else None

        ask = ("rationale", "expected")
        turn.encoders(render("generator", study, ask=ask, **advice, **told), ask=ask, step="generator", check=forward,
                      parents=[order[0].number] if order else [])


def _advice(data: dict[str, Any]) -> dict[str, Any]:
    given = data["suggestions"] if isinstance(data["suggestions"], list) else [data["suggestions"]]
    said = [clean(s.strip(), 500) for s in given if isinstance(s, str) and s.strip()]
    if not said:
        raise LacerError('"suggestions" must be a list with at least one text')
    return {"reason": text_field(data, "reason"), "suggestions": said[:3]}


def dummy_forward(spec: EncoderSpec, card: TaskCard) -> str:
    """Builds an encoder and sends two random observations through it, without a text model.

    Returns:
        What went wrong; empty if the output is finite.
    """
    rng = np.random.default_rng(0)
    try:
        table = TextTable("hash")
        with torch.no_grad():
            obs = {}
            for n in spec.sources:
                source = card.sources[n]
                shape = source.shape
                if source.modality == "text":
                    obs[n] = torch.tensor([[table.index(text)] for text in ("two words", "one")]).float()
                elif source.modality == "image":
                    obs[n] = torch.as_tensor(rng.integers(0, 256, (2, shape[2], *shape[:2]))).float()
                else:
                    obs[n] = torch.as_tensor(rng.normal(size=(2, *shape))).float()
                if source.modality == "set":
                    obs[n][..., 0] = (obs[n][..., 0] > 0).float()
            out = build(spec, card, table).eval()(obs)
    except (LacerError, ValueError, RuntimeError, IndexError, KeyError, TypeError) as e:
        return f"the encoder cannot be run: {clean(e, 300)}"
    return "" if bool(out.isfinite().all()) else "the encoder's output is not finite for random observations"
