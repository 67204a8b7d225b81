"""LACER: a language model designs the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from lacer.envs import LacerError, did_you_mean
from lacer.search.designers.base import register_designer
from lacer.search.designers.llm_base import LLMDesigner, Turn
from lacer.search.llm import LLMConfig
from lacer.search.llm.facts import FEEDBACK, PAPER, memory
from lacer.search.llm.prompt import SETS, render
from lacer.search.study import Study

SETTINGS = {"all": tuple(FEEDBACK), "paper": PAPER, "none": ()}
"""Names for lists of feedback."""


@register_designer
class Lacer(LLMDesigner):
    """a language model proposes encoders from the task, the space, and the scores and probes of all trials

    LACER (2512.06982): the prompt holds the task, the typed space, the expert's encoder with its score and what came of
    every trial: task metric, mean return, feature information of the modules. ``feedback: paper`` is what the paper
    tells; by default the model also learns learning curves, what the probes mean, cost, standard errors, what was
    expected against what came out, problem, change and outcome of its last proposals, failures with their reasons and
    mean scores by block.

    Deviations: the prompt is rebuilt from the study each time instead of carrying one dialogue on, so it stays short
    and survives a restart; feature information is probes and linear CKA instead of mutual information, whose estimator,
    target and layer the paper does not state; replies are JSON checked against the space, and an invalid or repeated
    encoder goes back to the model with its error and is recorded; where the model does not answer, another
    designer proposes, under its own name (``LLMConfig.fallback``).

    Args:
        seed, llm, run_dir, prompts: see :class:`LLMDesigner`.
        batch: encoders per request (the paper: 1 and 5).
        feedback: what the model learns beside every encoder's score: "all", "paper", "none", or a list.
        without: parts of the feedback to leave out, for ablations.
        window: proposals that the memory holds.

    Raises:
        LacerError: for a model string of the wrong form or unknown feedback.
    """

    name: ClassVar[str] = "lacer"
    paper: ClassVar[str] = "LACER, 2512.06982"
    most: ClassVar[int | None] = None

    def __init__(self, seed: int = 0, *, llm: LLMConfig, run_dir: Path | None = None, batch: int = 1,
                 prompts: str = SETS[0], feedback: str | Sequence[str] = "all", without: Sequence[str] = (),
                 window: int = 8) -> None:
        super().__init__(seed, llm=llm, run_dir=run_dir, batch=batch, prompts=prompts)
        if window < 0:
            raise LacerError(f"window must be at least 0, not {window}")
        parts = _parts(feedback, "feedback", SETTINGS)
        left_out = _parts(without, "without", {})
        self.feedback, self.window = tuple(f for f in parts if f not in left_out), window

    def prompt(self, study: Study, k: int) -> str:
        """The prompt that asks for ``k`` encoders."""
        past = memory(study, self.window, (self.name,)) if "memory" in self.feedback else []
        return render("lacer", study, prompts=self.prompts, feedback=self.feedback, k=k, past=past,
                      remembered=[m["t"].number for m in past], ask=self._ask)

    def design(self, turn: Turn, k: int) -> None:
        turn.encoders(self.prompt(turn.study, k), k, ask=self._ask)

    @property
    def _ask(self) -> list[str]:
        problem, expected = (["problem"] if "memory" in self.feedback else [],
                             ["expected"] if "expected" in self.feedback else [])
        return [*problem, "rationale", "based_on", *expected]


def _parts(value: str | Sequence[str], option: str, names: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    if isinstance(value, str):
        if value in names:
            return names[value]
        value = [value]
    for f in value:
        if f not in FEEDBACK:
            raise LacerError(f"{option}: unknown feedback {f!r}{did_you_mean(str(f), [*FEEDBACK, *names])} "
                             f"Known: {', '.join([*names, *FEEDBACK])}.")
    return tuple(value)
