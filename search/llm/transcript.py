"""Transcripts: every request to a language model as a line of JSON, and replies out of such a file."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lacer.envs import LacerError
from lacer.search.llm.base import LLMError, Message, Reply
from lacer.search.llm.keys import redact

log = logging.getLogger("lacer")

TRANSCRIPT = "llm_transcript.jsonl"
"""Name of the file in a run folder."""


class Transcript:
    """A transcript that is written. Earlier sessions of the same run wrote to the same file.

    Args:
        path: the file; made with the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: int | None = None

    def add(self, record: dict[str, Any]) -> int:
        """Appends one exchange, without API keys; its line number, from 1."""
        line = json.dumps(redact(record)) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as f:
            if self._lines is None:  # an earlier process wrote here, and may have died in mid-line
                f.seek(0)
                old = f.read()
                self._lines = old.count(b"\n")
                if old and not old.endswith(b"\n"):
                    self._lines += 1
                    f.write(b"\n")
            f.write(line.encode())
        self._lines += 1
        return self._lines

    def records(self) -> Iterator[dict[str, Any]]:
        """What earlier sessions wrote; nothing if there is no file."""
        return read(self.path) if self.path.exists() else iter(())


class Replay:
    """A transcript as a language model: the replies in their order, each as it was.

    Args:
        path: the transcript to replay.
        written: that of this run, None without a run folder. A resumed run goes on where it was.
        strict: a prompt that differs from the recorded one is an error; else it is only told.

    Raises:
        LacerError: the file cannot be read or holds no replies.
    """

    def __init__(self, path: Path, written: Transcript | None, strict: bool = False) -> None:
        self.path, self.strict = path, strict
        if written is not None and path.resolve() == written.path.resolve():
            raise LacerError(f"{path} is the transcript of this very run; copy it elsewhere, or use another run "
                             "folder, to replay it")
        self._records = [r for r in read(path) if _ends(r)]
        if not self._records:
            raise LacerError(f"{path} holds no replies of a language model (it should be the {TRANSCRIPT} of an "
                             "earlier run)")
        self._next = 0 if written is None else sum(map(_ends, written.records()))
        self._fresh, self._told = True, False

    def reply(self, messages: Sequence[Message]) -> tuple[Reply | LLMError, str]:
        """The next reply or failure of the recording, and how the messages differ from the recorded ones ("" if not).

        Raises:
            LLMError: the recording is at its end.
            LacerError: the messages differ, and ``strict`` is set.
        """
        # Where a run died between the reply and its use, it asks the same again.
        if self._fresh and 0 < self._next <= len(self._records) and not difference(
                self._records[self._next - 1].get("messages"), messages):
            self._next -= 1
        self._fresh = False
        if self._next >= len(self._records):
            raise LLMError(f"the transcript {self.path} has no more replies (it had {len(self._records)})")
        r = self._records[self._next]
        self._next += 1
        differs = difference(r.get("messages"), messages)
        if differs:
            differs = f"request {self._next} differs from that of the recording: {differs}"
            if self.strict:
                raise LacerError(f"{self.path}: {differs}. To replay it all the same, in the order of the recording: "
                                 "--no-llm-replay-strict")
            if not self._told:
                log.warning("%s: %s. The recorded reply counts; further differences are told in the transcript.",
                            self.path, differs)
                self._told = True
        seconds = _number(r.get("seconds"))
        if r.get("reply") is None:
            status = r.get("status")
            error = LLMError(str(r.get("error")), fatal=bool(r.get("fatal")),
                             status=status if isinstance(status, int) else None)
            error.seconds, error.requests = seconds, 1
            return error, differs
        return Reply(str(r["reply"]), int(_number(r.get("tokens_in"))), int(_number(r.get("tokens_out"))), seconds,
                     truncated=bool(r.get("truncated"))), differs


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a transcript; a line cut by a crash is left out. Raises LacerError if it cannot be read."""
    try:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as f:
            for line in f:
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(record, dict):
                    yield record
    except OSError as e:
        raise LacerError(f"cannot read the transcript {path}: {e.strerror}") from None


def difference(recorded: object, messages: Sequence[Message]) -> str:
    """The first place where a conversation differs from the recorded one, in words; "" if it does not."""
    if not isinstance(recorded, list) or len(recorded) != len(messages):
        return f"{len(messages)} messages, not {len(recorded) if isinstance(recorded, list) else 'any'}"
    for i, (old, new) in enumerate(zip(recorded, redact(list(messages)), strict=True), 1):
        if not isinstance(old, dict) or old.get("role") != new["role"]:
            return f"message {i} is of another role"
        if old.get("content") != new["content"]:
            a, b = str(old.get("content")).split("\n"), new["content"].split("\n")
            n = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            was, now = (x[n] if n < len(x) else "" for x in (a, b))
            at = next((k for k, (x, y) in enumerate(zip(was, now, strict=False)) if x != y), min(len(was), len(now)))
            at = max(0, at - 30)
            return f"message {i}, line {n + 1} was {was[at:at + 80]!r}, is {now[at:at + 80]!r}"
    return ""


def _ends(record: dict[str, Any]) -> bool:
    """Whether a record is what came of a request in the end, not a try that was followed by another one."""
    return bool(record.get("final")) and ("reply" in record or "error" in record)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and 0 <= value < 1e15 else 0.0
