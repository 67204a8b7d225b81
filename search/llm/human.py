"""A person as the language model: the prompt is printed, the answer typed, or pasted from any chat."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lacer.envs import LacerError
from lacer.search.llm.base import MAX_REPLY, LLMError, Message, Reply
from lacer.search.llm.keys import redact

END = "."
"""A line with nothing else ends an answer."""
LONGEST_LINE = 4095
"""Bytes of a line, its end included, after which Linux's terminals drop the rest."""
PROMPT = "llm_prompt.md"
"""File in the run folder with the prompt that waits for an answer, to copy it from."""


class Human:
    """Asks on the terminal. The prompt goes to standard error, the answer comes from standard input.

    Args:
        piped: whether answers may come from a pipe or a file (``human:-``).
        folder: run folder, None: none.
    """

    def __init__(self, piped: bool, folder: Path | None) -> None:
        self.piped, self.folder = piped, folder

    def check(self) -> None:
        """Raises LacerError if nobody sits at the terminal, and answers from a pipe were not asked for."""
        if not self.piped and (sys.stdin is None or not sys.stdin.isatty()):
            raise LacerError("the language model `human` reads answers from the terminal, and standard input is none; "
                             "with --llm human:- they are read from a pipe or file")

    def ask(self, messages: Sequence[Message]) -> Reply:
        """The answer: all lines up to one with a lone ``.``, or to the end of the input.

        Raises:
            LLMError: the input is at its end.
            LacerError: see :meth:`check`.
        """
        self.check()
        begin = time.monotonic()
        first = not any(m["role"] == "assistant" for m in messages)
        prompt = "\n\n".join(m["content"] for m in (messages if first else messages[-1:]))
        where = ""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / PROMPT).write_text(prompt + "\n", encoding="utf-8")
            where = f" (also in {self.folder / PROMPT})"
        print(f"\n{'=' * 30} prompt{where} {'=' * 30}\n{prompt}\n{'=' * 80}\n"
              f"{'The prompt stands above' if first else 'To be said in the same chat stands above'}. Type or paste "
              f"the answer, then a line with a lone {END}", file=sys.stderr, flush=True)
        text = self._read().encode("utf-8", "replace").decode()  # lone surrogates could not be stored
        return Reply(redact(text)[:MAX_REPLY + 1], seconds=time.monotonic() - begin)

    def _read(self) -> str:
        lines: list[str] = []
        size = 0
        if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors != "replace":
            with contextlib.suppress(io.UnsupportedOperation):  # somebody has read from it before
                sys.stdin.reconfigure(errors="replace")
        while True:
            try:
                line = sys.stdin.readline()
            except UnicodeDecodeError as e:
                raise LLMError(f"standard input holds what is no text: {e}") from None
            if not line and not lines:
                raise LLMError("there are no more answers on standard input")
            if not line or line.rstrip("\r\n") == END:
                return "".join(lines)
            if len(line.encode("utf-8", "replace")) >= LONGEST_LINE and sys.stdin.isatty():
                print(f"lacer: the terminal cuts lines of more than {LONGEST_LINE:,} bytes, so this one is not whole. "
                      "Break it into lines (JSON may have them anywhere between two values) and paste the answer "
                      f"again; end it with a lone {END}", file=sys.stderr, flush=True)
                lines, size = [], 0
            elif size <= MAX_REPLY:  # more is read, but not kept
                lines.append(line)
                size += len(line)
