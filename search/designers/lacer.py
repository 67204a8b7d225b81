"""LACER: a language model designs the encoder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from lacer.envs import LacerError, did_you_mean
from lacer.search.designers.base import Designer, register_designer
from lacer.search.designers.evolution import Evolution
from lacer.search.llm import LLMClient, LLMConfig, LLMError, Message, Reply, parse_reply, render, reply_schema
from lacer.search.llm.prompt import FEEDBACK, template
from lacer.search.llm.reply import MAX_TEXT, clean
from lacer.search.space import Point
from lacer.search.study import Proposal, Study

log = logging.getLogger("lacer")

PATIENCE = 2
"""Calls in a row that the model fails before it is asked without retries, so that a dead server cannot eat hours."""


@register_designer
class Lacer(Designer):
    """a language model proposes encoders from the task, the space, and the scores and probes of all trials

    LACER (2512.06982): the prompt holds the task, the typed space, the expert's encoder with its score and what came of
    every trial: task metric, mean return and learning curve, probes of every source and of the fused state.

    Deviations: the prompt is rebuilt from the study each time instead of carrying one dialogue on, so it stays short
    and survives a restart; replies are JSON checked against the space, and an invalid or repeated encoder goes back to
    the model with its error and is recorded; where the model does not answer, regularized evolution proposes, under its
    own name.

    Args:
        seed: seed of the fallback.
        llm: the language model.
        run_dir: folder for the transcript; None: none.
        batch: encoders per request (the paper: 1 and 5).
        feedback: what the model learns beside the objective, out of "expert", "reward" and "probes".

    Raises:
        LacerError: for a model string of the wrong form or unknown feedback.
    """

    name: ClassVar[str] = "lacer"
    needs_llm: ClassVar[bool] = True
    paper: ClassVar[str] = "LACER, 2512.06982"

    def __init__(self, seed: int = 0, *, llm: LLMConfig, run_dir: Path | None = None, batch: int = 1,
                 feedback: Sequence[str] = FEEDBACK) -> None:
        super().__init__(seed)
        if batch < 1:
            raise LacerError(f"batch must be at least 1, not {batch}")
        for f in feedback:
            if f not in FEEDBACK:
                raise LacerError(f"unknown feedback {f!r}{did_you_mean(f, FEEDBACK)} Known: {', '.join(FEEDBACK)}.")
        self.llm, self.batch, self.feedback = llm, batch, tuple(feedback)
        self.client = LLMClient(llm, run_dir)

    def check(self) -> None:
        """Checks key or transcript, without network. Raises LacerError naming what to set."""
        self.client.check()

    def propose(self, study: Study, n: int) -> list[Proposal]:
        """Up to ``min(n, batch)`` valid proposals, by evolution if the model failed, and before them a rejected one for
        every invalid or repeated encoder of the model.

        Raises:
            LacerError: if the very first request shows that key, model or address are wrong.
        """
        k = min(n, self.batch)
        if len({t.ncode for t in study.trials if t.ncode}) >= study.space.size():
            return self._fallback(study, k, "every encoder of the space has been tried")
        accepted: list[Proposal] = []
        rejected: list[Proposal] = []
        messages: list[Message] = [
            {"role": "system", "content": template("system.md").render()},
            {"role": "user", "content": render(study, k, self.feedback)},
        ]
        for attempt in range(1 + self.llm.repairs):
            need = k - len(accepted)
            try:
                reply = self.client.complete(messages, reply_schema(study.encoders, need),
                                             0 if self._gave_up(study) else None)
            except LLMError as e:
                if e.fatal and not self.client.answered:
                    raise LacerError(str(e)) from None
                spent = {"tokens_in": 0, "tokens_out": 0, "seconds": round(e.seconds, 3), "requests": e.requests,
                         "attempt": attempt, "transcript": e.line}
                fallback = [] if accepted else self._fallback(study, k, str(e), spent, unreachable=True)
                return [*rejected, *accepted, *fallback]
            errors = self._read(reply, study, need, attempt, accepted, rejected)
            if len(accepted) >= k or (accepted and not errors):
                break
            messages = [*messages, {"role": "assistant", "content": reply.text},
                        {"role": "user", "content": template("repair.md").render(
                            errors=errors, accepted=len(accepted), k=k - len(accepted), truncated=reply.truncated)}]
        if accepted:
            return [*rejected, *accepted]
        reason = f"{len(rejected)} invalid or repeated encoders, the last: {rejected[-1].rejected}"
        return [*rejected, *self._fallback(study, k, reason)]

    def _read(self, reply: Reply, study: Study, need: int, attempt: int, accepted: list[Proposal],
              rejected: list[Proposal]) -> list[str]:
        """Sorts the encoders of a reply into accepted and rejected ones; the errors to tell the model."""
        errors: list[str] = []
        answers = parse_reply(reply.text, study.encoders, need)
        for i, a in enumerate(answers):
            first = i == 0  # what the reply cost is counted once
            meta: dict[str, Any] = {
                "tokens_in": reply.tokens_in if first else 0, "tokens_out": reply.tokens_out if first else 0,
                "seconds": round(reply.seconds, 3) if first else 0.0, "requests": reply.requests if first else 0,
                "expected": a.expected, "attempt": attempt, "transcript": reply.line,
            }
            parents = tuple(j for j in a.based_on if 0 <= j < len(study.trials))
            error = a.error or self._repeated(a.point, study, accepted)
            if not error:
                accepted.append(Proposal(a.point, self.name, a.rationale, parents, "", meta))
                continue
            if reply.truncated and a.point is None:
                error = f"cut off after max_output_tokens={self.llm.max_output_tokens}; {error}"
            errors.append(error if len(answers) == 1 else f"encoder {i + 1}: {error}")
            meta["reply"] = clean(reply.text, MAX_TEXT)
            rejected.append(Proposal(a.point, self.name, a.rationale, parents, error, meta))
        return errors

    def _repeated(self, point: Point | None, study: Study, accepted: list[Proposal]) -> str:
        assert point is not None
        code = study.space.to_ncode(point)
        first = study.seen(code)
        if first is not None:
            t = study[first]
            became = (f"scored {t.objective:.3g}" if t.objective is not None else
                      {"running": "is being evaluated", "failed": "failed", "pruned": "was ended early as hopeless"}
                      .get(t.status, "was rejected"))
            return f"this encoder is the same as #{t.number}, which {became}; propose a new one"
        if any(p.point is not None and study.space.to_ncode(p.point) == code for p in accepted):
            return "this encoder is the same as another one of your reply; propose a new one"
        return ""

    def _gave_up(self, study: Study) -> bool:
        """Whether the last calls got no answer from the model at all."""
        last = [t for t in study.trials if t.proposal.designer in (self.name, Evolution.name)][-PATIENCE:]
        return len(last) == PATIENCE and all(t.proposal.meta.get("unreachable") for t in last)

    def _fallback(self, study: Study, k: int, reason: str, spent: dict[str, Any] | None = None,
                  unreachable: bool = False) -> list[Proposal]:
        """Proposals by evolution that say why the model did not make them."""
        reason = clean(reason, 500)
        log.warning("the language model made no valid proposal, evolution does instead: %s", reason)
        out = Evolution(self.seed).propose(study, k)
        return [replace(p, rationale=f"{p.rationale} (in place of the LLM, which failed: {reason})",
                        meta={"llm_failed": reason, "unreachable": unreachable, **((spent or {}) if i == 0 else {})})
                for i, p in enumerate(out)]
