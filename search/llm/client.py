"""Talking to a language model: forms of a reply, retries, limits, a transcript.

The API key is read from the environment when a request is made. It is kept in no attribute and is cut out of every
text that leaves this package: replies, errors, transcripts.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lacer.envs import LacerError
from lacer.search.llm.base import FORMS, KEYS, MAX_REPLY, LLMConfig, LLMError, Message, Reply, parse_model
from lacer.search.llm.human import Human
from lacer.search.llm.server import FORMATS, Format, Server
from lacer.search.llm.transcript import TRANSCRIPT, Replay, Transcript

log = logging.getLogger("lacer")

BACKOFF = 1.0
"""Seconds before the first retry; doubled with each."""
MAX_WAIT = 60.0
"""No single wait is longer, whatever Retry-After says."""
REFUSED = (400, 415, 422, 501)
"""HTTP statuses of a server that does not know the form of a reply that it was asked for."""
FORM = re.compile(r"response_format|json_schema|json_object|\btools?\b|tool_choice|\bgrammar\b", re.IGNORECASE)
"""What a server names that breaks (HTTP 500) over the form, as llama-cpp-python does."""
SAMPLING = re.compile(r"\b(temperature|seed)\b", re.IGNORECASE)
"""What a server names that refuses sampling settings, as reasoning models do."""


class LLMClient:
    """Asks a language model: a server, a person, or a transcript.

    Args:
        config: which model, and how.
        run_dir: folder that gets ``llm_transcript.jsonl``, one JSON object per request, failed ones too; None: none.
            What the server can do, and what has been spent, is taken over from earlier sessions in that folder.

    Attributes:
        answered: whether a request has been answered in this session.
        requests, tokens_in, tokens_out: spent so far, earlier sessions included.

    Raises:
        LacerError: for a model string or address of the wrong form, or a limit of money without prices.
    """

    def __init__(self, config: LLMConfig, run_dir: Path | None = None) -> None:
        self.config = config
        self.provider, self.name = parse_model(config.model)
        if config.cost_limit is not None and (config.price_in is None or config.price_out is None):
            raise LacerError("a limit of money (--llm-cost-limit) needs the prices of the model: --llm-price-in and "
                             "--llm-price-out, in US dollars per million tokens")
        self.transcript = None if run_dir is None else Transcript(Path(run_dir) / TRANSCRIPT)
        self._server = Server(config, self.provider, self.name) if self.provider in KEYS else None
        self._human = Human(self.name == "-", run_dir) if self.provider == "human" else None
        self._replay: Replay | None = None
        forms = FORMATS.get(self.provider, ("plain",))
        if config.format != "auto" and config.format not in forms and self._server is not None:
            known = ", ".join(f for f in forms if f != "bare")
            raise LacerError(f"{self.provider} has no replies of the form {config.format!r} (--llm-format); it has: "
                             f"{known}, auto")
        self._format: Format = forms[0] if config.format == "auto" else config.format
        self._proven = config.format != "auto"  # whether the server has replied in that form
        self._sampling = True  # whether temperature and seed are sent
        self.answered = False
        self.requests = self.tokens_in = self.tokens_out = 0
        self.spent = 0.0  # US dollars
        self._loaded = self._uncounted = False

    def check(self) -> None:
        """Cheap check at start-up, without network: the key is there, the transcript to replay can be read, somebody
        sits at the terminal.

        Raises:
            LacerError: naming what to set.
        """
        self._load()
        if self._server is not None:
            self._server.check()
        if self._human is not None:
            self._human.check()

    def complete(self, messages: Sequence[Message], schema: dict[str, Any] | None = None,
                 retries: int | None = None) -> Reply:
        """The reply to a conversation.

        A server is asked to keep to the JSON schema; one that refuses (HTTP 400) is asked to call a tool with that
        schema, then for any JSON object, then for plain text, then without temperature and seed; these are left out
        at once where the refusal names them. What worked is remembered, in the transcript also for later sessions.
        429, 5xx, timeouts and broken connections are retried after 1, 2, 4, ... seconds or what Retry-After says, 60
        at most.

        Args:
            messages: the conversation; the last one is the user's.
            schema: JSON schema of the reply.
            retries: instead of ``config.retries``.

        Raises:
            LLMError: if there is no reply in the end, or a limit is reached.
            LacerError: if there is no key, no transcript to replay or nobody at the terminal; if a strict replay was
                recorded with other prompts.
        """
        self._load()
        self._within_limits()
        if self._replay is not None:
            return self._replayed(self._replay, messages)
        if self._human is not None:
            reply = self._human.ask(messages)
            self.answered = True
            return self._keep(messages, "human", reply, final=True)
        assert self._server is not None
        left = self.config.retries if retries is None else retries
        start, tries, requests = time.monotonic(), 0, 0
        form: Format = self._format if schema is not None or self._format == "bare" else "plain"
        proven, sampling = self._proven or schema is None, self._sampling
        while True:
            requests += 1
            sent = time.monotonic()
            try:
                reply = self._server.send(messages, schema, form, sampling)
            except LLMError as e:
                refused = e.status in REFUSED or (  # some break where others refuse
                    e.status == 500 and not proven and (tries >= left or FORM.search(str(e)) is not None))
                lower = self._below(form, proven) if refused and self.config.format == "auto" else None
                if e.status in REFUSED and sampling and SAMPLING.search(str(e)):
                    lower, sampling = form, False
                again = lower is not None or (e.retriable and tries < left)
                self.requests += 1
                e.line = self._record(messages, form, None, time.monotonic() - sent, e, final=not again)
                e.seconds, e.requests = time.monotonic() - start, requests
                if not again:
                    raise
                self._within_limits(e)
                if lower is not None:
                    form = lower
                    continue
                wait = e.retry_after if e.retry_after is not None else BACKOFF * 2 ** tries
                tries += 1
                time.sleep(min(wait, MAX_WAIT))
                continue
            self.answered, self._sampling = True, sampling
            if not proven:
                # Text in place of the call: the server ignores tools, and does without the tokens of their schema.
                self._format = form if reply.structured else self._below(form) or form
                self._proven = True
            reply = self._keep(messages, form, replace(reply, seconds=time.monotonic() - sent), final=True)
            return replace(reply, seconds=time.monotonic() - start, requests=requests)

    def _below(self, form: Format, proven: bool = False) -> Format | None:
        """What to ask of a server that refused a form, None if nothing is left. One that has replied in that form
        before refuses the prompt or the schema: it is asked for text once."""
        if proven:
            return None if form in ("plain", "bare") else "plain"
        forms = FORMATS[self.provider]
        return next(iter(forms[forms.index(form) + 1:]), None)

    def _replayed(self, replay: Replay, messages: Sequence[Message]) -> Reply:
        got, differs = replay.reply(messages)
        self.answered = True
        if isinstance(got, LLMError):
            self.requests += 1
            got.line = self._record(messages, "replay", None, got.seconds, got, final=True, differs=differs)
            raise got
        return self._keep(messages, "replay", got, final=True, differs=differs)

    # -- what is spent, and kept -----------------------------------------------------------------------------------

    def _load(self) -> None:
        """Reads the transcript to replay, and what earlier sessions of this run spent and found out. Once."""
        if self._loaded:
            return
        known: Any = None
        for r in () if self.transcript is None else self.transcript.records():
            self.requests += 1
            self.tokens_in += _count(r.get("tokens_in"))
            self.tokens_out += _count(r.get("tokens_out"))
            self._spend(r.get("cost"), _count(r.get("tokens_in")), _count(r.get("tokens_out")))
            if r.get("model") == self.config.model and r.get("base_url") == self._address():
                known = r.get("next_format", known)
                self._sampling = r.get("sampling") is not False
        if self.config.format == "auto" and known in FORMATS.get(self.provider, ()):
            self._format, self._proven = known, True
        if self.provider == "replay":
            self._replay = Replay(Path(self.name), self.transcript, self.config.replay_strict)
        self._loaded = True

    def _within_limits(self, after: LLMError | None = None) -> None:
        """Raises LLMError if a limit is reached. ``after`` is the failed request before a further try."""
        c, tokens = self.config, self.tokens_in + self.tokens_out
        if c.request_limit is not None and self.requests >= c.request_limit:
            what = f"{self.requests:,} of {c.request_limit:,} requests (--llm-request-limit)"
        elif c.token_limit is not None and tokens >= c.token_limit:
            what = f"{tokens:,} of {c.token_limit:,} tokens (--llm-token-limit)"
        elif c.cost_limit is not None and self.spent >= c.cost_limit:
            what = f"{self.spent:,.2f} of {c.cost_limit:,.2f} US dollars (--llm-cost-limit)"
        else:
            return
        e = LLMError(f"the language model's limit is reached: {what}" + (f"; before: {after}" if after else ""),
                     limit=True)
        if after is not None:
            e.seconds, e.requests, e.line = after.seconds, after.requests, after.line
        raise e

    def _keep(self, messages: Sequence[Message], form: str, reply: Reply, *, final: bool, differs: str = "") -> Reply:
        """Counts and records a reply."""
        self.requests += 1
        self.tokens_in += reply.tokens_in
        self.tokens_out += reply.tokens_out
        c = self.config
        if self._server is not None and not reply.tokens_in and not self._uncounted and (c.token_limit or c.cost_limit):
            log.warning("%s counts no tokens, so limits of tokens and money have no effect; there is "
                        "--llm-request-limit", c.model)
            self._uncounted = True
        reply = replace(reply, cost=c.cost(reply.tokens_in, reply.tokens_out))
        self._spend(reply.cost, reply.tokens_in, reply.tokens_out)
        return replace(reply, line=self._record(messages, form, reply, reply.seconds, None, final, differs))

    def _spend(self, cost: object, tokens_in: int, tokens_out: int) -> None:
        """Counts the dollars of an exchange: at the prices of its time, or today's where none were known."""
        if not isinstance(cost, int | float):
            cost = self.config.cost(tokens_in, tokens_out) or 0.0
        self.spent += float(cost)

    def _record(self, messages: Sequence[Message], form: str, reply: Reply | None, seconds: float,
                error: LLMError | None, final: bool, differs: str = "") -> int | None:
        """Appends one exchange to the transcript; its line number."""
        if self.transcript is None:
            return None
        return self.transcript.add({
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "model": self.config.model,
            "base_url": self._address(), "format": form, "sampling": self._sampling, "messages": list(messages),
            "reply": reply.text if reply else None, "tokens_in": reply.tokens_in if reply else 0,
            "tokens_out": reply.tokens_out if reply else 0, "cost": reply.cost if reply else None,
            "truncated": reply.truncated if reply else False, "seconds": round(seconds, 3),
            "status": error.status if error else 200, "error": str(error) if error else None,
            "fatal": error.fatal if error else False, "final": final,
            **({"next_format": self._format} if reply and self._proven and self.config.format == "auto" else {}),
            **({"differs": differs} if differs else {}),
        })

    def _address(self) -> str | None:
        return None if self._server is None else self._server.url


def _count(value: object) -> int:
    return int(value) if isinstance(value, int | float) and 0 <= value < 1e15 else 0


__all__ = ["BACKOFF", "FORMS", "KEYS", "MAX_REPLY", "MAX_WAIT", "TRANSCRIPT", "LLMClient", "LLMConfig", "LLMError",
           "Message", "Reply", "parse_model"]
