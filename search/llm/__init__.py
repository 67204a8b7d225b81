"""Language models as designers: the client, the prompts, and reading the replies."""

from lacer.search.llm.base import LLMConfig, LLMError, Message, Reply
from lacer.search.llm.client import LLMClient
from lacer.search.llm.fallback import Fallback
from lacer.search.llm.reply import Answer, parse_reply, reply_schema

__all__ = ["Answer", "Fallback", "LLMClient", "LLMConfig", "LLMError", "Message", "Reply", "parse_reply",
           "reply_schema"]
