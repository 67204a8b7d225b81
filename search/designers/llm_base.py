"""What all designers with a language model share: asking, reading, feeding errors back, recording them, falling back.

A designer of a paper is a short file: which templates it renders (what the model sees), what it asks for, and what it
checks beside the search space and repetitions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from lacer.envs import LacerError, UnknownNameError
from lacer.search.designers.base import Designer
from lacer.search.llm import Fallback, LLMClient, LLMConfig, LLMError, Message, Reply, parse_reply, reply_schema
from lacer.search.llm.prompt import SETS, fill, messages
from lacer.search.llm.reply import MAX_TEXT, Answer, clean, find_json
from lacer.search.space import Point
from lacer.search.study import USAGE, Proposal, Study

LONGEST_BACK = 12_000
"""Characters of a reply that go back to the model with its errors, so that repairs fit into its context too."""


class LLMDesigner(Designer):
    """Base of the designers with a language model. A subclass implements :meth:`design`.

    Args:
        seed: seed of the fallback, and of what a designer draws itself.
        llm: the language model.
        run_dir: folder for the transcript; None: none.
        batch: encoders per request, for designers that can ask for several.
        prompts: set of templates, see ``prompts/``.

    Raises:
        LacerError: for a model string of the wrong form, an unknown set, a batch that this designer cannot ask for.
    """

    needs_llm: ClassVar[bool] = True
    any_space: ClassVar[bool] = False
    temperature: ClassVar[float] = 1.0
    """Sampling temperature unless the user sets one."""
    most: ClassVar[int | None] = 1
    """Largest batch; None: any."""
    requests: ClassVar[int] = 1
    """Requests of a turn in which nothing goes wrong."""

    def __init__(self, seed: int = 0, *, llm: LLMConfig, run_dir: Path | None = None, batch: int = 1,
                 prompts: str = SETS[0]) -> None:
        super().__init__(seed)
        if batch < 1:
            raise LacerError(f"batch must be at least 1, not {batch}")
        if self.most is not None and batch > self.most:
            raise LacerError(f"the designer {self.name!r} asks for one encoder at a time, not for batch={batch}")
        if prompts not in SETS:
            raise UnknownNameError("set of prompts", prompts, SETS)
        self.llm, self.batch, self.prompts = llm, batch, prompts
        self.client = LLMClient(llm, run_dir)
        self.fallback = Fallback(llm.fallback, seed)

    def check(self) -> None:
        """Checks key or transcript, without network. Raises LacerError naming what to set."""
        self.client.check()

    @abstractmethod
    def design(self, turn: Turn, k: int) -> None:
        """Asks the model and hands ``k`` encoders, or fewer, to ``turn``; errors of the client and :class:`NoAnswer` go
        through, and the fallback proposes."""

    def propose(self, study: Study, n: int) -> list[Proposal]:
        """Up to ``min(n, batch)`` valid proposals, by the fallback if the model failed, and before them a rejected one
        for every reply that could not be used.

        Raises:
            LacerError: if the very first request shows that key, model or address are wrong.
            DesignerStopped: if the model failed, and the fallback is to stop.
        """
        k = min(n, self.batch)
        if len({t.ncode for t in study.trials if t.ncode}) >= study.space.size():
            return Fallback(seed=self.seed).propose(study, k, "every encoder of the space has been tried")
        turn = Turn(self, study)
        try:
            self.design(turn, k)
        except LLMError as e:
            if e.fatal and not self.client.answered:
                raise LacerError(str(e)) from None
            turn.charge(e.spent())
            if not turn.accepted:
                return self.fallback.propose(study, k, str(e), before=turn.rejected, spent=turn.meta(),
                                             unreachable=not e.limit, designer=self.name)
        except NoAnswer as e:
            if not turn.accepted:
                return self.fallback.propose(study, k, str(e), before=turn.rejected,
                                             spent=turn.meta() if turn.owes else None, designer=self.name)
        turn.settle()
        return [*turn.rejected, *turn.accepted]


class NoAnswer(LacerError):
    """The model answered, but with nothing that can be used."""


@dataclass(frozen=True)
class Wrong:
    """What is wrong with an encoder of a reply, for the model to read, and what is kept of it with the trial."""

    error: str
    meta: Mapping[str, Any]


Check = Callable[[Point], Wrong | None]
"""A check of an encoder beyond the space and repetitions."""


class Turn:
    """One call of ``propose``: the requests that it takes, what they cost, and what came of them.

    Attributes:
        study: the search so far.
        accepted, rejected: proposals made in this turn.
        notes: kept with every proposal that follows.
        owes: whether requests were made that no proposal has been charged for.
    """

    def __init__(self, designer: LLMDesigner, study: Study) -> None:
        self.study, self._designer = study, designer
        self.accepted: list[Proposal] = []
        self.rejected: list[Proposal] = []
        self.notes: dict[str, Any] = {}
        self._calls: dict[str, int | None] = {}  # step -> line of the transcript
        self._attempt, self._line = 0, None  # type: int, int | None
        self._clear()

    def _clear(self) -> None:
        self._cost: dict[str, float] = {"tokens_in": 0, "tokens_out": 0, "seconds": 0.0, "requests": 0}
        self.owes = False

    def charge(self, spent: Mapping[str, Any]) -> None:
        """Notes what a request cost (``Reply.spent()``, ``LLMError.spent()``); the next proposal is charged for it."""
        for key in USAGE:
            if key in spent:
                self._cost[key] = self._cost.get(key, 0) + spent[key]
        self.owes, self._line = True, spent["transcript"]

    def meta(self, **more: Any) -> dict[str, Any]:
        """What is kept with the next proposal: cost (counted once), attempt, line of the transcript, notes."""
        calls = {"calls": dict(self._calls)} if len(self._calls) > 1 else {}
        out = {**self._cost, "seconds": round(self._cost["seconds"], 3), "attempt": self._attempt,
               "transcript": self._line, **calls, **self.notes, **more}
        self._clear()
        return out

    def settle(self) -> None:
        """Charges the last accepted proposal for a request after it that came to nothing."""
        if self.owes and self.accepted:
            last = self.accepted[-1]
            spent = {k: round(v + last.meta.get(k, 0), 3) for k, v in self._cost.items()}
            self.accepted[-1] = replace(last, meta={**last.meta, **spent})
            self._clear()

    def ask(self, step: str, prompt: str, schema: Callable[[], dict[str, Any]],
            read: Callable[[Reply], Sequence[str]], wanted: Callable[[], int] = lambda: 0,
            tries: int | None = None) -> bool:
        """Sends a prompt, and every reply that cannot be used back with its errors.

        Args:
            step: what is asked for, in a word; kept with the trial.
            prompt: the user's message.
            schema: JSON schema of the reply, made anew for every try.
            read: uses a reply, and returns what is wrong with it.
            wanted: number of encoders that are still missing.
            tries: how often to ask; default: as the model is configured.

        Returns:
            Whether the last reply had no error.

        Raises:
            LLMError: if the model does not answer.
        """
        d = self._designer
        talk: list[Message] = [*messages(prompt, d.prompts)]  # type: ignore[list-item]
        for attempt in range(1 + d.llm.repairs if tries is None else tries):
            self._attempt = attempt
            reply = d.client.complete(talk, schema(), 0 if d.fallback.gave_up(self.study, d.name) else None)
            self._calls[step] = reply.line
            self.charge(reply.spent())
            errors = read(reply)
            if not errors:
                return True
            said = reply.text if len(reply.text) <= LONGEST_BACK else reply.text[:LONGEST_BACK] + " ..."
            talk = [*talk, {"role": "assistant", "content": said},
                    {"role": "user", "content": fill(
                        "repair", d.prompts, errors=errors, accepted=len(self.accepted), wanted=wanted(),
                        truncated=reply.truncated)}]
        return False

    def accept(self, point: Point, rationale: str = "", parents: Sequence[int] = (), **more: Any) -> None:
        """Takes an encoder."""
        self.accepted.append(Proposal(point, self._designer.name, rationale, tuple(parents), "", self.meta(**more)))

    def reject(self, error: str, reply: Reply, point: Point | None = None, rationale: str = "",
               parents: Sequence[int] = (), **more: Any) -> None:
        """Records what cannot be used."""
        meta = self.meta(**more, reply=clean(reply.text, MAX_TEXT))
        self.rejected.append(Proposal(point, self._designer.name, rationale, tuple(parents), error, meta))

    def fields(self, step: str, prompt: str, schema: dict[str, Any],
               check: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        """Asks for a JSON object that is no encoder.

        Args:
            step, prompt: see :meth:`ask`.
            schema: properties of the object, all required.
            check: what to make of the object; raises LacerError saying what is wrong.

        Raises:
            NoAnswer: if no reply could be used.
            LLMError: if the model does not answer.
        """
        out: dict[str, Any] = {}

        def read(reply: Reply) -> list[str]:
            try:
                out.update(check(find_json(reply.text, tuple(schema))))
            except LacerError as e:
                error = self._cut(clean(e, 500), reply)
                self.reject(f"{step}: {error}", reply)
                return [error]
            return []

        whole = {"type": "object", "properties": schema, "additionalProperties": False, "required": list(schema)}
        if not self.ask(step, prompt, lambda: whole, read):
            raise NoAnswer(f"no usable answer to {step!r}, the last: {self.rejected[-1].rejected}")
        return out

    def encoders(self, prompt: str, k: int = 1, *, ask: Sequence[str] = ("rationale", "based_on", "expected"),
                 step: str = "encoders", check: Check | None = None, parents: Sequence[int] | None = None,
                 tries: int | None = None) -> None:
        """Asks for ``k`` encoders and takes those that are valid, new and pass the check.

        Args:
            prompt, step, tries: see :meth:`ask`.
            k: how many.
            ask: what to ask for with every encoder: rationale, problem, based_on, expected.
            check: a further check.
            parents: trials that they derive from; default: what the model says.

        Raises:
            NoAnswer: if there is not a single one.
            LLMError: if the model does not answer.
        """
        have = len(self.accepted)
        space = self.study.encoders

        def need() -> int:
            return k - len(self.accepted) + have

        def read(reply: Reply) -> list[str]:
            errors: list[str] = []
            answers = parse_reply(reply.text, space, need())
            for i, a in enumerate(answers):
                error, more = self._fault(a, check)
                wrong = {"expected": a.expected, **({"problem": a.problem} if a.problem else {}), **more}
                of = parents if parents is not None else [j for j in a.based_on if 0 <= j < len(self.study.trials)]
                if not error:
                    assert a.point is not None
                    self.accept(a.point, a.rationale, of, **wrong)
                    continue
                error = self._cut(error, reply) if a.point is None else error
                errors.append(error if len(answers) == 1 else f"encoder {i + 1}: {error}")
                self.reject(error, reply, a.point, a.rationale, of, **wrong)
            return errors if need() > 0 else []

        self.ask(step, prompt, lambda: reply_schema(space, need(), ask), read, need, tries)
        if need() == k:
            raise NoAnswer(f"{len(self.rejected)} invalid or repeated encoders, the last: {self.rejected[-1].rejected}")

    def _fault(self, a: Answer, check: Check | None) -> tuple[str, dict[str, Any]]:
        """What is wrong with an encoder, and what is kept of that."""
        if a.point is None:
            return a.error, {"fault": "invalid"}
        wrong = check(a.point) if check is not None else None
        if wrong is not None:
            return wrong.error, dict(wrong.meta)
        repeated = self._repeated(a.point)
        return (repeated, {"fault": "repeated"}) if repeated else ("", {})

    def _cut(self, error: str, reply: Reply) -> str:
        if not reply.truncated:
            return error
        return f"cut off after max_output_tokens={self._designer.llm.max_output_tokens}; {error}"

    def _repeated(self, point: Point) -> str:
        code = self.study.space.to_ncode(point)
        first = self.study.seen(code)
        if first is not None:
            t = self.study[first]
            became = (f"scored {t.objective:.3g}" if t.objective is not None else
                      {"running": "is being evaluated", "failed": "failed", "pruned": "was ended early"}
                      .get(t.status, "was rejected"))
            return f"this encoder is the same as #{t.number}, which {became}; propose a new one"
        if any(p.point is not None and self.study.space.to_ncode(p.point) == code for p in self.accepted):
            return "this encoder is the same as another one of your reply; propose a new one"
        return ""


def text_field(data: Mapping[str, Any], key: str, limit: int = 1000) -> str:
    """A text of a reply. Raises LacerError if there is none."""
    value = data.get(key)
    if not isinstance(value, str) or not value.strip():
        raise LacerError(f'"{key}" must be a text that is not empty')
    return clean(value.strip(), limit)
