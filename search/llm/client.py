"""Talking to a language model: retries, hard time limits, a transcript, and replay. Only this file knows pydantic-ai.

The API key is read from the environment when a request is made. It is kept in no attribute and is cut out of every
text that leaves this file: replies, errors, transcripts.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field

from lacer.envs import LacerError, did_you_mean

if TYPE_CHECKING:
    from pydantic_ai.messages import ModelMessage, ModelResponse
    from pydantic_ai.models import Model

FORMS = "openai:NAME, anthropic:NAME or replay:FILE"
KEYS = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}
TRANSCRIPT = "llm_transcript.jsonl"
BACKOFF = 1.0
"""Seconds before the first retry; doubled with each."""
MAX_WAIT = 60.0
"""No single wait is longer, whatever Retry-After says."""
MAX_REPLY = 200_000
"""Characters of a reply that are kept."""

Format = Literal["json_schema", "json_object", "plain", "bare"]
"""How much is asked of a server: a reply by JSON schema, any JSON object, text, text without sampling settings."""
_NEXT: dict[Format, Format] = {"json_schema": "json_object", "json_object": "plain", "plain": "bare"}


class LLMConfig(BaseModel):
    """Which language model proposes, and how it is asked. The API key is not part of it: it comes from the environment
    variable OPENAI_API_KEY or ANTHROPIC_API_KEY and is sent to ``base_url`` where that is set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="openai:NAME (any OpenAI-compatible server with base_url), anthropic:NAME, or "
                       "replay:FILE, the llm_transcript.jsonl of an earlier run")
    base_url: str | None = Field(None, description="address of the server, e.g. http://localhost:11434/v1")
    temperature: float | None = Field(1.0, ge=0, le=2, description="sampling temperature; null: the server's default")
    seed: int | None = Field(None, description="sampling seed, where the server knows one")
    timeout: float = Field(180.0, gt=0, description="seconds until a request is given up, whatever it is doing")
    retries: int = Field(4, ge=0, le=20, description="further tries after 429, 5xx, timeouts and broken connections")
    max_output_tokens: int = Field(8192, ge=1, description="longest reply, thinking included")
    repairs: int = Field(2, ge=0, le=10, description="how often an invalid reply goes back with its error")


class Message(TypedDict):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Reply:
    """What the model answered.

    Attributes:
        text: the raw reply.
        tokens_in, tokens_out: as counted by the server; 0 where it does not count.
        seconds: wall time, retries and waits included; that of the recording in a replay.
        requests: HTTP requests that it took.
        line: line of the transcript, from 1; None without a run folder.
        truncated: whether the reply stopped at ``max_output_tokens``.
    """

    text: str
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    requests: int = 1
    line: int | None = None
    truncated: bool = False


class LLMError(LacerError):
    """The model did not answer.

    Attributes:
        fatal: whether key, permission, model name or address are wrong, so that asking again is of no use.
        retriable: whether the same request may work later.
        status: HTTP status, if there was one.
        retry_after: seconds that the server asked to wait.
        seconds, requests, line: as in :class:`Reply`, set by :meth:`LLMClient.complete`.
    """

    def __init__(self, message: str, *, fatal: bool = False, retriable: bool = False, status: int | None = None,
                 retry_after: float | None = None) -> None:
        super().__init__(message)
        self.fatal, self.retriable, self.status, self.retry_after = fatal, retriable, status, retry_after
        self.seconds, self.requests, self.line = 0.0, 0, None  # type: float, int, int | None


def parse_model(text: str) -> tuple[str, str]:
    """(provider, name) of ``openai:NAME``, ``anthropic:NAME`` or ``replay:FILE``.

    Raises:
        LacerError: naming the right forms and the nearest provider.
    """
    provider, colon, name = text.partition(":")
    known = (*KEYS, "replay")
    if provider in known and name.strip():
        return provider, name.strip()
    if provider in known:
        hint = f"; {provider}: needs a {'file' if provider == 'replay' else 'model name'} after the colon."
    elif not colon:
        hint = f"; did you mean 'openai:{text}'?" if text.strip() else "."
    else:
        hint = did_you_mean(provider, known)
    raise LacerError(f"unknown language model {text!r}{hint} Forms: {FORMS}; other OpenAI-compatible servers are "
                     "openai:NAME with --llm-base-url.")


class LLMClient:
    """Asks a language model, or replays a transcript.

    Args:
        config: which model, and how.
        run_dir: folder that gets ``llm_transcript.jsonl``, one JSON object per request, failed ones too; None: none.

    Raises:
        LacerError: for a model string or address of the wrong form.
    """

    def __init__(self, config: LLMConfig, run_dir: Path | None = None) -> None:
        self.config = config
        self.provider, self.name = parse_model(config.model)
        url = config.base_url
        if url is not None:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise LacerError("the address of the language model (--llm-base-url) must look like "
                                 f"http://localhost:11434/v1, not {url.rpartition('@')[2]!r}")
            if "@" in parts.netloc:
                raise LacerError("the address of the language model (--llm-base-url) must not hold a password; set "
                                 f"{KEYS.get(self.provider, 'OPENAI_API_KEY')} instead")
        self.answered = False
        self._format: Format = "json_schema" if self.provider == "openai" else "plain"
        self._lines = 0
        self.transcript = None if run_dir is None else Path(run_dir) / TRANSCRIPT
        self._replay: list[dict[str, Any]] | None = None
        self._next = 0

    def check(self) -> None:
        """Cheap check at start-up, without network: the key is there, or the transcript to replay can be read.

        Raises:
            LacerError: naming what to set.
        """
        if self.provider == "replay":
            self._records()
        else:
            self._key()

    def complete(self, messages: Sequence[Message], schema: dict[str, Any] | None = None,
                 retries: int | None = None) -> Reply:
        """The reply to a conversation.

        Servers that can are asked to keep to the JSON schema; one that refuses (HTTP 400) is asked for any JSON object,
        then for plain text, then without temperature and seed; what worked is remembered. 429, 5xx, timeouts and
        broken connections are retried after 1, 2, 4, ... seconds or what Retry-After says, 60 at most.

        Args:
            messages: the conversation; the last one is the user's.
            schema: JSON schema of the reply.
            retries: instead of ``config.retries``.

        Raises:
            LLMError: if there is no reply in the end.
            LacerError: if there is no key, or no transcript to replay.
        """
        if self.provider == "replay":
            return self._complete_from_record(messages)
        left = self.config.retries if retries is None else retries
        start, tries, requests = time.monotonic(), 0, 0
        form: Format = "plain" if schema is None and self._format != "bare" else self._format
        while True:
            requests += 1
            sent = time.monotonic()
            try:
                reply = self._send(messages, schema, form)
            except LLMError as e:
                lower = e.status in (400, 415, 422, 501) and form in _NEXT
                again = lower or (e.retriable and tries < left)
                e.line = self._record(messages, form, None, time.monotonic() - sent, e, final=not again)
                e.seconds, e.requests = time.monotonic() - start, requests
                if not again:
                    raise
                if lower:
                    form = _NEXT[form]
                    continue
                wait = e.retry_after if e.retry_after is not None else BACKOFF * 2 ** tries
                tries += 1
                time.sleep(min(wait, MAX_WAIT))
                continue
            self.answered = True
            if schema is not None:
                self._format = form
            line = self._record(messages, form, reply, time.monotonic() - sent, None, final=True)
            return replace(reply, seconds=time.monotonic() - start, requests=requests, line=line)

    # -- the transcript ------------------------------------------------------------------------------------------

    def _record(self, messages: Sequence[Message], form: str, reply: Reply | None, seconds: float,
                error: LLMError | None, final: bool) -> int | None:
        """Appends one exchange; its line number."""
        if self.transcript is None:
            return None
        data = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "model": self.config.model, "format": form,
            "messages": list(messages), "reply": reply.text if reply else None,
            "tokens_in": reply.tokens_in if reply else 0, "tokens_out": reply.tokens_out if reply else 0,
            "truncated": reply.truncated if reply else False, "seconds": round(seconds, 3),
            "status": error.status if error else 200, "error": str(error) if error else None,
            "fatal": error.fatal if error else False, "final": final,
        }
        line = self._redact(json.dumps(data)) + "\n"
        self.transcript.parent.mkdir(parents=True, exist_ok=True)
        with self.transcript.open("a+b") as f:
            if not self._lines and f.tell():  # an earlier process wrote here, and may have died in mid-line
                f.seek(0)
                old = f.read()
                self._lines = old.count(b"\n")
                if not old.endswith(b"\n"):
                    self._lines += 1
                    f.write(b"\n")
            f.write(line.encode())
        self._lines += 1
        return self._lines

    def _records(self) -> list[dict[str, Any]]:
        """The finished exchanges of the transcript to replay."""
        if self._replay is None:
            path = Path(self.name)
            if self.transcript is not None and path.resolve() == self.transcript.resolve():
                raise LacerError(f"{path} is the transcript of this very run; copy it elsewhere, or use another run "
                                 "folder, to replay it")
            self._replay = _finished(path)
            if not self._replay:
                raise LacerError(f"{path} holds no replies of a language model (it should be the {TRANSCRIPT} of an "
                                 "earlier run)")
            if self.transcript is not None and self.transcript.exists():  # a resumed run goes on where it was
                self._next = len(_finished(self.transcript))
        return self._replay

    def _complete_from_record(self, messages: Sequence[Message]) -> Reply:
        records = self._records()
        # Where a run died between the reply and its use, it asks the same again.
        if not self.answered and 0 < self._next <= len(records) and records[self._next - 1].get("messages") == list(
                messages):
            self._next -= 1
        self.answered = True
        if self._next >= len(records):
            raise LLMError(f"the transcript {self.name} has no more replies (it had {len(records)})")
        r = records[self._next]
        self._next += 1
        seconds = float(r.get("seconds") or 0)
        if r.get("reply") is None:
            e = LLMError(str(r.get("error")), fatal=bool(r.get("fatal")), status=r.get("status"))
            e.line = self._record(messages, "replay", None, seconds, e, final=True)
            e.seconds, e.requests = seconds, 1
            raise e
        reply = Reply(str(r["reply"]), int(r.get("tokens_in") or 0), int(r.get("tokens_out") or 0), seconds,
                      truncated=bool(r.get("truncated")))
        return replace(reply, line=self._record(messages, "replay", reply, seconds, None, final=True))

    # -- the key ---------------------------------------------------------------------------------------------------

    def _key(self) -> str:
        variable = KEYS[self.provider]
        key = os.environ.get(variable, "").strip()
        if not key:
            if self.provider == "openai" and self._url() is not None:
                return "none"  # local servers ask for no key, the client library does
            raise LacerError(f"{self.config.model} needs an API key: set the environment variable {variable}"
                             + (", or give the address of a server that needs none with --llm-base-url"
                                if self.provider == "openai" else
                                " (for a server that needs no key use openai:NAME with --llm-base-url)"))
        if not key.isascii() or not key.isprintable() or " " in key:
            raise LacerError(f"{variable} holds characters that no API key has; set it anew")
        return key

    def _url(self) -> str | None:
        return self.config.base_url or (os.environ.get("OPENAI_BASE_URL") or None if self.provider == "openai"
                                        else os.environ.get("ANTHROPIC_BASE_URL") or None)

    def _redact(self, text: str) -> str:
        """The text without any API key."""
        for variable in KEYS.values():
            key = os.environ.get(variable, "").strip()
            if len(key) >= 6:
                text = text.replace(key, "[API key]")
        return text

    # -- the request -----------------------------------------------------------------------------------------------

    def _send(self, messages: Sequence[Message], schema: dict[str, Any] | None, form: Format) -> Reply:
        """One HTTP request."""
        from pydantic_ai import exceptions as ai
        from pydantic_ai.messages import TextPart

        self._key()  # its error names what to set
        try:
            response = _run(self._ask(messages, schema, form), self.config.timeout + 5)
        except (ai.ModelRequestTimeout, ai.ModelTimeoutError, TimeoutError):
            raise LLMError(f"no complete reply from {self.config.model} within {self.config.timeout:g} s",
                           retriable=True) from None
        except ai.ModelAPIError as e:
            raise self._error(e) from None
        except ai.AgentRunError as e:
            raise LLMError(f"{self.config.model} sent what is no chat completion: {self._short(e)}",
                           retriable=True) from None
        except Exception as e:  # whatever else the client libraries raise, with texts that may quote the request
            raise LLMError(f"asking {self.config.model} failed: {type(e).__name__}: {self._short(e)}",
                           retriable=True) from None
        text = "".join(p.content for p in response.parts if isinstance(p, TextPart))
        text = text.encode("utf-8", "replace").decode()  # lone surrogates could not be sent back
        return Reply(self._redact(text)[:MAX_REPLY], response.usage.input_tokens, response.usage.output_tokens,
                     truncated=response.finish_reason == "length")

    async def _ask(self, messages: Sequence[Message], schema: dict[str, Any] | None, form: Format) -> ModelResponse:
        from pydantic_ai.direct import model_request
        from pydantic_ai.models import create_async_httpx2_client
        from pydantic_ai.settings import ModelSettings

        c = self.config
        settings = ModelSettings(max_tokens=c.max_output_tokens, timeout=c.timeout, request_timeout=c.timeout,
                                 max_retries=0)
        if c.temperature is not None and form != "bare":
            settings["temperature"] = c.temperature
        if c.seed is not None and form != "bare":
            settings["seed"] = c.seed
        if form == "json_schema":
            settings["extra_body"] = {"response_format": {"type": "json_schema", "json_schema": {
                "name": "reply", "schema": schema, "strict": False}}}
        elif form == "json_object":
            settings["extra_body"] = {"response_format": {"type": "json_object"}}
        async with create_async_httpx2_client() as http:
            http.follow_redirects = False  # a redirect would carry the key to another address
            return await model_request(self._model(http), _to_pydantic_ai(messages), model_settings=settings)

    def _model(self, http: Any) -> Model:
        key, url = self._key(), self._url()
        if self.provider == "anthropic":
            from pydantic_ai.models.anthropic import AnthropicModel
            from pydantic_ai.providers.anthropic import AnthropicProvider

            if url is None:
                return AnthropicModel(self.name, provider=AnthropicProvider(api_key=key, http_client=http))
            url = url.rstrip("/").removesuffix("/v1")  # which this client library adds
            return AnthropicModel(self.name, provider=AnthropicProvider(api_key=key, base_url=url, http_client=http))
        from pydantic_ai.models.openai import OpenAIChatModel
        from pydantic_ai.profiles.openai import OpenAIModelProfile
        from pydantic_ai.providers.openai import OpenAIProvider
        from pydantic_ai.providers.openai_compatible import OpenAICompatibleProvider

        if url is None or urlsplit(url).hostname == "api.openai.com":
            return OpenAIChatModel(self.name, provider=OpenAIProvider(base_url=url, api_key=key, http_client=http))
        # Other servers know the older field max_tokens, and only some the newer one.
        profile = OpenAIModelProfile(openai_chat_supports_max_completion_tokens=False)
        return OpenAIChatModel(self.name, provider=OpenAICompatibleProvider(
            "compatible", base_url=url, api_key=key, http_client=http, profile=profile))

    def _error(self, e: Any) -> LLMError:
        from pydantic_ai import exceptions as ai

        status = getattr(e, "status_code", None)
        said = self._short(_message(e.body) if status is not None else e)
        if isinstance(e, ai.ModelAuthenticationError):
            return LLMError(f"{self._where()} refused the API key in {KEYS[self.provider]} (HTTP {status}: {said}); "
                            f"set {KEYS[self.provider]} to a valid one", fatal=True, status=status)
        if isinstance(e, ai.ModelNotFoundError):
            return LLMError(f"{self._where()} has no model {self.name!r} (HTTP {status}: {said}); check the name after "
                            f"{self.provider}: and the address (--llm-base-url, usually ending in /v1)", fatal=True,
                            status=status)
        if status is None:
            return LLMError(f"cannot reach {self._where()}: {said}", retriable=True)
        retriable = (status in (408, 409, 425, 429) or status >= 500) and not isinstance(e, ai.ModelQuotaExceededError)
        return LLMError(f"{self._where()} answered HTTP {status}: {said}", retriable=retriable, status=status,
                        retry_after=e.retry_after)

    def _where(self) -> str:
        url = self._url()
        return self.config.model + (f" at {urlsplit(url).scheme}://{urlsplit(url).netloc}" if url else "")

    def _short(self, e: object) -> str:
        """Text of an error in one short line, without keys, also half-hidden ones."""
        text = re.sub(r"\bsk-[\w*.-]+", "[API key]", self._redact(str(e)))
        return " ".join(text.split())[:300]


def _message(body: Any) -> Any:
    """What the server says, out of ``{"error": {"message": ...}}`` and its kin."""
    while isinstance(body, dict):
        inner = body.get("error", body.get("message", body.get("detail")))
        if inner is None:
            break
        body = inner
    return body or "no explanation"


def _finished(path: Path) -> list[dict[str, Any]]:
    """The records of a transcript that ended a conversation. A line cut by a crash is left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as e:
        raise LacerError(f"cannot read the transcript {path}: {e.strerror}") from None
    out = []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and record.get("final") and ("reply" in record or "error" in record):
            out.append(record)
    return out


def _to_pydantic_ai(messages: Sequence[Message]) -> list[ModelMessage]:
    from pydantic_ai.messages import ModelRequest, ModelResponse, SystemPromptPart, TextPart, UserPromptPart

    out: list[ModelMessage] = []
    for m in messages:
        if m["role"] == "assistant":
            out.append(ModelResponse(parts=[TextPart(m["content"] or "(empty)")]))
            continue
        part = SystemPromptPart(m["content"]) if m["role"] == "system" else UserPromptPart(m["content"])
        if out and isinstance(out[-1], ModelRequest):
            out[-1] = ModelRequest(parts=[*out[-1].parts, part])
        else:
            out.append(ModelRequest(parts=[part]))
    return out


def _run(coroutine: Any, limit: float) -> Any:
    """Runs a coroutine in a thread with an event loop of its own: works inside a running loop (notebooks), and comes
    back at the limit even where something blocks (name servers do).

    Raises:
        TimeoutError: after ``limit`` seconds.
    """
    result: list[Any] = []

    def work() -> None:
        try:
            result[:] = [True, asyncio.run(coroutine)]
        except BaseException as e:
            result[:] = [False, e]

    thread = threading.Thread(target=work, daemon=True, name="lacer-llm")
    thread.start()
    thread.join(limit)
    if not result:
        raise TimeoutError
    if not result[0]:
        raise result[1]
    return result[1]
