"""Language models as designers: the client, the prompts, and reading the replies."""

from lacer.search.llm.client import LLMClient, LLMConfig, LLMError, Message, Reply
from lacer.search.llm.reply import Answer, parse_reply, reply_schema

__all__ = ["Answer", "LLMClient", "LLMConfig", "LLMError", "Message", "Reply", "parse_reply", "reply_schema"]
