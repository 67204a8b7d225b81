"""LACER: a language model designs the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from lacer.envs import LacerError, did_you_mean
from lacer.search.designers.base import Designer, register_designer
from lacer.search.llm import (
    Fallback,
    LLMClient,
    LLMConfig,
    LLMError,
    Message,
    Reply,
    parse_reply,
    render,
    reply_schema,
)
from lacer.search.llm.prompt import FEEDBACK, template
from lacer.search.llm.reply import MAX_TEXT, clean
from lacer.search.space import Point
from lacer.search.study import Proposal, Study


@register_designer
class Lacer(Designer):
    """a language model proposes encoders from the task, the space, and the scores and probes of all trials

    LACER (2512.06982): the prompt holds the task, the typed space, the expert's encoder with its score and what came of
    every trial: task metric, mean return and learning curve, probes of every source and of the fused state.

    Deviations: the prompt is rebuilt from the study each time instead of carrying one dialogue on, so it stays short
    and survives a restart; replies are JSON checked against the space, and an invalid or repeated encoder goes back to
    the model with its error and is recorded; where the model does not answer, another designer proposes, under its own
    name (``LLMConfig.fallback``).

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
        self.fallback = Fallback(llm.fallback, seed)

    def check(self) -> None:
        """Checks key or transcript, without network. Raises LacerError naming what to set."""
        self.client.check()

    def propose(self, study: Study, n: int) -> list[Proposal]:
        """Up to ``min(n, batch)`` valid proposals, by the fallback if the model failed, and before them a rejected one
        for every invalid or repeated encoder of the model.

        Raises:
            LacerError: if the very first request shows that key, model or address are wrong.
            DesignerStopped: if the model failed, and the fallback is to stop.
        """
        k = min(n, self.batch)
        if len({t.ncode for t in study.trials if t.ncode}) >= study.space.size():
            return Fallback(seed=self.seed).propose(study, k, "every encoder of the space has been tried")
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
                                             0 if self.fallback.gave_up(study, self.name) else None)
            except LLMError as e:
                if e.fatal and not self.client.answered:
                    raise LacerError(str(e)) from None
                if accepted:
                    return [*rejected, *accepted]
                return self.fallback.propose(study, k, str(e), before=rejected, unreachable=not e.limit,
                                             spent={**e.spent(), "attempt": attempt})
            errors = self._read(reply, study, need, attempt, accepted, rejected)
            if len(accepted) >= k or (accepted and not errors):
                break
            messages = [*messages, {"role": "assistant", "content": reply.text},
                        {"role": "user", "content": template("repair.md").render(
                            errors=errors, accepted=len(accepted), k=k - len(accepted), truncated=reply.truncated)}]
        if accepted:
            return [*rejected, *accepted]
        reason = f"{len(rejected)} invalid or repeated encoders, the last: {rejected[-1].rejected}"
        return self.fallback.propose(study, k, reason, before=rejected)

    def _read(self, reply: Reply, study: Study, need: int, attempt: int, accepted: list[Proposal],
              rejected: list[Proposal]) -> list[str]:
        """Sorts the encoders of a reply into accepted and rejected ones; the errors to tell the model."""
        errors: list[str] = []
        answers = parse_reply(reply.text, study.encoders, need)
        for i, a in enumerate(answers):
            meta: dict[str, Any] = {**reply.spent(counted=i == 0), "expected": a.expected, "attempt": attempt}
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
