"""What a language model is asked, and what comes of it: configuration, messages, replies, errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from pydantic import BaseModel, ConfigDict, Field

from lacer.envs import LacerError, did_you_mean
from lacer.search.config import FallbackName, ReplyFormat, SearchConfig

FORMS = "openai:NAME, anthropic:NAME, replay:FILE or human"
KEYS = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}
"""Environment variable of the API key, by provider."""
MAX_REPLY = 200_000
"""Characters of a reply that are read; a longer one is no answer."""


class LLMConfig(BaseModel):
    """Which language model proposes, and how it is asked. The API key is not part of it: it comes from the environment
    variable OPENAI_API_KEY or ANTHROPIC_API_KEY and is sent to ``base_url`` where that is set.

    In a search these are the fields ``llm_*`` of the configuration, see there for what they mean.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description=FORMS)
    base_url: str | None = None
    temperature: float | None = Field(1.0, ge=0, le=2)
    seed: int | None = None
    format: ReplyFormat = "auto"
    timeout: float = Field(180.0, gt=0)
    retries: int = Field(4, ge=0, le=20)
    repairs: int = Field(2, ge=0, le=10)
    max_output_tokens: int = Field(8192, ge=1)
    token_limit: int | None = Field(None, ge=1)
    request_limit: int | None = Field(None, ge=1)
    cost_limit: float | None = Field(None, gt=0)
    price_in: float | None = Field(None, ge=0)
    price_out: float | None = Field(None, ge=0)
    fallback: FallbackName = "evolution"
    replay_strict: bool = False

    def cost(self, tokens_in: int, tokens_out: int) -> float | None:
        """What tokens cost in US dollars; None where the prices are not known."""
        if self.price_in is None or self.price_out is None:
            return None
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6


def llm_config(config: SearchConfig) -> LLMConfig:
    """The language model of a configuration, which must have one."""
    assert config.llm is not None
    fields = {f: getattr(config, f"llm_{f}") for f in LLMConfig.model_fields if f != "model"}
    if fields["seed"] is None:
        fields["seed"] = config.seed
    return LLMConfig(model=config.llm, **fields)


class Message(TypedDict):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Reply:
    """What the model answered.

    Attributes:
        text: the raw reply; the arguments as JSON where it came as a tool call.
        tokens_in, tokens_out: as counted by the server; 0 where it does not count.
        seconds: wall time, retries and waits included; that of the recording in a replay.
        requests: HTTP requests that it took.
        line: line of the transcript, from 1; None without a run folder.
        truncated: whether the reply stopped at ``max_output_tokens``.
        cost: US dollars, None where the prices are not known.
        structured: whether the reply came in the form that was asked for; False for text in place of a tool call.
    """

    text: str
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    requests: int = 1
    line: int | None = None
    truncated: bool = False
    cost: float | None = None
    structured: bool = True

    def spent(self, counted: bool = True) -> dict[str, Any]:
        """What the reply cost, for ``Proposal.meta``.

        Args:
            counted: False for further proposals out of the same reply, so that sums over trials are right.
        """
        n = int(counted)
        out = {"tokens_in": n * self.tokens_in, "tokens_out": n * self.tokens_out,
               "seconds": round(n * self.seconds, 3), "requests": n * self.requests, "transcript": self.line}
        return out if self.cost is None else {**out, "cost": n * self.cost}


class LLMError(LacerError):
    """The model did not answer.

    Attributes:
        fatal: whether key, permission, model name or address are wrong, so that asking again is of no use.
        retriable: whether the same request may work later.
        limit: whether it was not asked, because a limit of tokens, requests or money is reached.
        status: HTTP status, if there was one.
        retry_after: seconds that the server asked to wait.
        seconds, requests, line: as in :class:`Reply`, set by :meth:`LLMClient.complete`.
    """

    def __init__(self, message: str, *, fatal: bool = False, retriable: bool = False, limit: bool = False,
                 status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.fatal, self.retriable, self.limit = fatal, retriable, limit
        self.status, self.retry_after = status, retry_after
        self.seconds, self.requests, self.line = 0.0, 0, None  # type: float, int, int | None

    def spent(self) -> dict[str, Any]:
        """What the failed requests cost, for ``Proposal.meta``."""
        return {"tokens_in": 0, "tokens_out": 0, "seconds": round(self.seconds, 3), "requests": self.requests,
                "transcript": self.line}


def parse_model(text: str) -> tuple[str, str]:
    """(provider, name) of ``openai:NAME``, ``anthropic:NAME``, ``replay:FILE``, ``human`` or ``human:-``.

    Raises:
        LacerError: naming the right forms and the nearest provider.
    """
    provider, colon, name = text.partition(":")
    known = (*KEYS, "replay", "human")
    if text in ("human", "human:-"):
        return provider, name
    if provider == "human":
        hint = "; human takes nothing after it, or :- to read the answers from a pipe."
    elif provider in known and name.strip():
        return provider, name.strip()
    elif provider in known:
        hint = f"; {provider}: needs a {'file' if provider == 'replay' else 'model name'} after the colon."
    elif not colon:
        near = did_you_mean(text, ("human",))
        hint = near if near != "." else f"; did you mean 'openai:{text}'?" if text.strip() else "."
    else:
        hint = did_you_mean(provider, known)
    raise LacerError(f"unknown language model {text!r}{hint} Forms: {FORMS}; other OpenAI-compatible servers are "
                     "openai:NAME with --llm-base-url.")
