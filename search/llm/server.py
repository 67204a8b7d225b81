"""One request to a language model over HTTP, in OpenAI's or Anthropic's format. Only this file knows pydantic-ai."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import threading
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from lacer.envs import LacerError
from lacer.search.llm.base import KEYS, MAX_REPLY, LLMConfig, LLMError, Message, Reply
from lacer.search.llm.keys import api_key, redact, short

if TYPE_CHECKING:
    from pydantic_ai.messages import ModelMessage, ModelResponse
    from pydantic_ai.models import Model

Format = Literal["json_schema", "tool", "json_object", "plain", "bare"]
"""How much is asked of a server: a reply by JSON schema, the call of a tool with that schema, any JSON object, text,
text without sampling settings."""
FORMATS: dict[str, tuple[Format, ...]] = {"openai": ("json_schema", "tool", "json_object", "plain", "bare"),
                                          "anthropic": ("tool", "plain", "bare")}
"""What is tried, in this order, by provider."""
MAX_BODY = 16_000_000
"""Bytes of an HTTP answer after which the connection is closed."""
TOOL = "reply"


class Server:
    """A language model behind HTTP.

    Args:
        config: which model, and how.
        provider, name: the two parts of ``config.model``.

    Raises:
        LacerError: for an address of the wrong form.
    """

    def __init__(self, config: LLMConfig, provider: str, name: str) -> None:
        self.config, self.provider, self.name = config, provider, name
        self._check_address(config.base_url, "--llm-base-url")

    @property
    def url(self) -> str | None:
        """The address as configured, or from OPENAI_BASE_URL or ANTHROPIC_BASE_URL; None: the provider's own."""
        return self.config.base_url or os.environ.get(f"{self.provider.upper()}_BASE_URL") or None

    def check(self) -> None:
        """Checks key and address, without network. Raises LacerError naming what to set."""
        self._check_address(self.url, f"{self.provider.upper()}_BASE_URL")
        self._key()

    def send(self, messages: Sequence[Message], schema: dict[str, Any] | None, form: Format,
             sampling: bool = True) -> Reply:
        """One HTTP request.

        Args:
            messages: the conversation.
            schema: JSON schema of the reply.
            form: how the reply is held to it.
            sampling: whether temperature and seed are sent.

        Raises:
            LLMError: there is no reply.
            LacerError: there is no key.
        """
        from pydantic_ai import exceptions as ai
        from pydantic_ai.messages import TextPart, ToolCallPart

        self.check()  # its error names what to set
        importlib.import_module(f"pydantic_ai.models.{self.provider}")  # seconds that are not the server's
        try:
            response = _run(self._ask(messages, schema, form, sampling and form != "bare"),
                            self.config.timeout + 5)
        except (ai.ModelRequestTimeout, ai.ModelTimeoutError, TimeoutError):
            raise LLMError(f"no complete reply from {self.config.model} within {self.config.timeout:g} s",
                           retriable=True) from None
        except ai.ModelAPIError as e:
            raise self._refused(e) or self._error(e) from None
        except ai.AgentRunError as e:
            raise LLMError(f"{self.config.model} sent what is no chat completion: {short(e)}",
                           retriable=True) from None
        except Exception as e:  # whatever else the client libraries raise, with texts that may quote the request
            raise self._refused(e) or LLMError(f"asking {self.config.model} failed: {type(e).__name__}: {short(e)}",
                                               retriable=True) from None
        calls = [p for p in response.parts if isinstance(p, ToolCallPart)] if form == "tool" else []
        text = "\n".join(p.args if isinstance(p.args, str) else json.dumps(p.args) for p in calls)
        text = text or "".join(p.content for p in response.parts if isinstance(p, TextPart))
        text = text.encode("utf-8", "replace").decode()  # lone surrogates could not be sent back
        return Reply(redact(text)[:MAX_REPLY + 1], response.usage.input_tokens, response.usage.output_tokens,
                     truncated=response.finish_reason == "length", structured=form != "tool" or bool(calls))

    async def _ask(self, messages: Sequence[Message], schema: dict[str, Any] | None, form: Format,
                   sampling: bool) -> ModelResponse:
        from pydantic_ai.direct import model_request
        from pydantic_ai.models import create_async_httpx2_client
        from pydantic_ai.settings import ModelSettings

        c = self.config
        settings = ModelSettings(max_tokens=c.max_output_tokens, timeout=c.timeout, request_timeout=c.timeout,
                                 max_retries=0, extra_body=self._form(schema, form))
        if c.temperature is not None and sampling:
            settings["temperature"] = c.temperature
        if c.seed is not None and sampling:
            settings["seed"] = c.seed
        async with create_async_httpx2_client() as http:
            http.follow_redirects = False  # a redirect would carry the key to another address
            http.headers["accept-encoding"] = "identity"  # a compressed body could unfold to any size
            http.event_hooks = {"response": [_bound]}
            return await model_request(self._model(http), _to_pydantic_ai(messages), model_settings=settings)

    def _form(self, schema: dict[str, Any] | None, form: Format) -> dict[str, Any]:
        """What is added to the request's body to ask for the reply in a form."""
        about = "Send your reply by calling this tool."
        if form == "json_schema":
            return {"response_format": {"type": "json_schema", "json_schema": {
                "name": TOOL, "schema": schema, "strict": False}}}
        if form == "json_object":  # with a schema for llama-cpp-python and others that know it here
            known = {} if self._at_openai else {"schema": schema}
            return {"response_format": {"type": "json_object", **known}}
        if form == "tool" and self.provider == "anthropic":
            return {"tools": [{"name": TOOL, "description": about, "input_schema": schema}],
                    "tool_choice": {"type": "tool", "name": TOOL}}
        if form == "tool":
            return {"tools": [{"type": "function", "function": {"name": TOOL, "description": about,
                                                                "parameters": schema}}],
                    "tool_choice": {"type": "function", "function": {"name": TOOL}}}
        return {}

    def _model(self, http: Any) -> Model:
        key, url = self._key(), self.url
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

        if self._at_openai:
            return OpenAIChatModel(self.name, provider=OpenAIProvider(base_url=url, api_key=key, http_client=http))
        assert url is not None
        # Other servers know the older field max_tokens, and only some the newer one.
        profile = OpenAIModelProfile(openai_chat_supports_max_completion_tokens=False)
        return OpenAIChatModel(self.name, provider=OpenAICompatibleProvider(
            "compatible", base_url=url, api_key=key, http_client=http, profile=profile))

    @property
    def _at_openai(self) -> bool:
        return self.url is None or urlsplit(self.url).hostname == "api.openai.com"

    def _key(self) -> str:
        key, variable = api_key(self.provider), KEYS[self.provider]
        if key:
            return key
        if self.provider == "openai" and self.url is not None:
            return "none"  # local servers ask for no key, the client library does
        raise LacerError(f"{self.config.model} needs an API key: set the environment variable {variable}"
                         + (", or give the address of a server that needs none with --llm-base-url"
                            if self.provider == "openai" else
                            " (for a server that needs no key use openai:NAME with --llm-base-url)"))

    def _check_address(self, url: str | None, origin: str) -> None:
        if url is None:
            return
        what = f"the address of the language model ({origin})"
        try:
            parts = urlsplit(url)
            well = parts.scheme in ("http", "https") and bool(parts.hostname)
        except ValueError:  # no valid IPv6 address, for one
            well = False
        if "@" in url or "?" in url:
            raise LacerError(f"{what} must hold no password and no query; set {KEYS[self.provider]} instead")
        if not well:
            raise LacerError(f"{what} must look like http://localhost:11434/v1, not {url!r}")

    def _error(self, e: Any) -> LLMError:
        from pydantic_ai import exceptions as ai

        status = getattr(e, "status_code", None)
        said = short(_message(e.body) if status is not None else e)
        variable = KEYS[self.provider]
        if isinstance(e, ai.ModelAuthenticationError):
            return LLMError(f"{self._where()} refused the API key in {variable} (HTTP {status}: {said}); "
                            f"set {variable} to a valid one", fatal=True, status=status)
        if isinstance(e, ai.ModelNotFoundError):
            return LLMError(f"{self._where()} has no model {self.name!r} (HTTP {status}: {said}); check the name after "
                            f"{self.provider}: and the address (--llm-base-url, usually ending in /v1)", fatal=True,
                            status=status)
        if status is None:
            return LLMError(f"cannot reach {self._where()}: {said}", retriable=True)
        retriable = (status in (408, 409, 425, 429) or status >= 500) and not isinstance(e, ai.ModelQuotaExceededError)
        return LLMError(f"{self._where()} answered HTTP {status}: {said}", retriable=retriable, status=status,
                        retry_after=e.retry_after)

    def _refused(self, e: BaseException | None) -> LLMError | None:
        """The error of an answer that was not read to its end."""
        while e is not None and not isinstance(e, _UnboundedError):
            e = e.__cause__ or e.__context__
        return None if e is None else LLMError(f"{self._where()} {e}")

    def _where(self) -> str:
        url = self.url
        return self.config.model + (f" at {urlsplit(url).scheme}://{urlsplit(url).netloc}" if url else "")


class _UnboundedError(Exception):
    """An HTTP answer could fill the memory."""


async def _bound(response: Any) -> None:
    """Ends an answer that is too long, before it fills the memory."""
    import httpx2

    class Bounded(httpx2.AsyncByteStream):
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        async def __aiter__(self) -> AsyncIterator[bytes]:
            size = 0
            async for chunk in self.stream:
                size += len(chunk)
                if size > MAX_BODY:
                    raise _UnboundedError(f"sent more than {MAX_BODY:,} bytes")
                yield chunk

        async def aclose(self) -> None:
            await self.stream.aclose()

    if response.headers.get("content-encoding", "identity") != "identity":
        raise _UnboundedError("sent a compressed answer, though none was asked for")
    response.stream = Bounded(response.stream)


def _message(body: Any) -> Any:
    """What the server says, out of ``{"error": {"message": ...}}`` and its kin."""
    while isinstance(body, dict):
        inner = body.get("error", body.get("message", body.get("detail")))
        if inner is None:
            break
        body = inner
    return body or "no explanation"


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
