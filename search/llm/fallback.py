"""What a designer does where its language model made no valid proposal."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lacer.search.config import FallbackName
from lacer.search.designers.base import DesignerStopped, make_plain
from lacer.search.llm.reply import clean
from lacer.search.study import Proposal, Study

log = logging.getLogger("lacer")

PATIENCE = 2
"""Calls in a row that the model fails before it is asked without retries, so that a dead server cannot eat hours."""


@dataclass(frozen=True)
class Fallback:
    """Another designer proposes, under its own name, or the search stops and can be resumed.

    Attributes:
        name: ``evolution``, ``bo``, ``random``, or ``stop``.
        seed: seed of that designer.
    """

    name: FallbackName = "evolution"
    seed: int = 0

    def propose(self, study: Study, k: int, reason: str, *, before: Sequence[Proposal] = (),
                spent: Mapping[str, Any] | None = None, unreachable: bool = False,
                designer: str = "") -> list[Proposal]:
        """``before`` and up to ``k`` proposals that say why the model did not make them.

        Args:
            study: the search so far.
            k: proposals that the model was to make.
            reason: why it made none.
            before: rejected proposals of the same call, which come first.
            spent: what failed requests cost (``LLMError.spent()``); counted on the first proposal.
            unreachable: whether the model gave no answer at all, see :meth:`gave_up`.
            designer: who asked the model.

        Raises:
            DesignerStopped: the fallback is ``stop``; it holds ``before``, and a rejected proposal for ``spent``.
        """
        reason = clean(reason, 500)
        if self.name == "stop":
            if spent and any(spent.get(k) for k in ("tokens_in", "tokens_out")):  # failed requests alone cost nothing
                before = [*before, Proposal(None, designer, rejected=reason, meta=dict(spent))]
            raise DesignerStopped(f"the language model made no valid proposal, and --llm-fallback is stop: {reason}",
                                  before)
        log.warning("the language model made no valid proposal, %s does instead: %s", self.name, reason)
        made = make_plain(self.name, self.seed).propose(study, k)
        return [*before, *(replace(p, rationale=f"{p.rationale} (in place of the LLM, which failed: {reason})",
                                   meta={**p.meta, "llm_failed": reason, "unreachable": unreachable,
                                         **((spent or {}) if i == 0 else {})}) for i, p in enumerate(made))]

    def gave_up(self, study: Study, designer: str) -> bool:
        """Whether the last calls of a designer got no answer from the model at all: ask it without retries."""
        last = [t for t in study.trials if t.proposal.designer == designer or "llm_failed" in t.proposal.meta]
        return len(last) >= PATIENCE and all(t.proposal.meta.get("unreachable") for t in last[-PATIENCE:])
