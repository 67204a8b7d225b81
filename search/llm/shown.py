"""``lacer prompt RUN N``: what the language model saw and said for a trial."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lacer.envs import LacerError
from lacer.search.config import SearchConfig, resumed
from lacer.search.llm.reply import clean
from lacer.search.llm.transcript import TRANSCRIPT
from lacer.search.loop import study_place
from lacer.search.storage import trial_attrs
from lacer.search.study import Trial


def conversation(folder: Path, number: int) -> str:
    """The requests behind a trial, as text for a terminal: prompts, replies and errors of all steps.

    Raises:
        LacerError: no such run or trial; no language model was asked for it; its transcript is gone or damaged.
    """
    url, name = study_place(resumed(SearchConfig, folder, {}), folder)
    trials = trial_attrs(url, name)
    if not 0 <= number < len(trials):
        has = f"its trials are #0 to #{len(trials) - 1}" if trials else "it has none yet"
        raise LacerError(f"{folder} has no trial #{number}; {has}")
    attrs = trials[number]
    meta = attrs.get("meta", {})
    lines: dict[str, Any] = dict(meta.get("calls") or ({} if meta.get("transcript") is None else
                                                       {"request": meta["transcript"]}))
    if meta.get("transcript") is not None and meta["transcript"] not in lines.values():  # a request that failed
        lines["last request"] = meta["transcript"]
    if not lines:
        why = meta.get("llm_failed")
        raise LacerError(f"no language model was asked for #{number}, which {attrs.get('designer', '?')} proposed"
                         + (f" ({why})" if why else ""))
    out = [f"#{number}, proposed by {attrs.get('designer', '?')}" + (
        f", rejected: {attrs['rejected']}" if attrs.get("rejected") else "")]
    for step, line in lines.items():
        record = _record(folder / TRANSCRIPT, int(line))
        spent = (f"{record.get('tokens_in', 0):,} tokens in, {record.get('tokens_out', 0):,} out, "
                 f"{record.get('seconds', 0):.1f} s")
        out.append(f"=== {step}: {record.get('model', '?')}, {spent} (line {line} of {TRANSCRIPT})")
        out += [f"--- {m['role']}\n\n{m['content']}" for m in record["messages"]]
        out.append(f"--- error\n\n{record.get('error')}" if record.get("reply") is None else
                   f"--- reply\n\n{record['reply']}")
    return clean("\n\n".join(out), 10_000_000)


def exchanges(folder: Path, trials: Iterable[Trial]) -> dict[int, tuple[tuple[str, str], ...]]:
    """Prompts and replies of all trials that have some, as titles and texts; what is missing is left out."""
    path = folder / TRANSCRIPT
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", errors="replace") as f:
        lines = f.readlines()
    out: dict[int, tuple[tuple[str, str], ...]] = {}
    for t in trials:
        meta = t.proposal.meta
        parts: list[tuple[str, str]] = []
        for step, n in dict(meta.get("calls") or {"request": meta.get("transcript")}).items():
            try:
                record = json.loads(lines[int(n) - 1])
                parts += [(f"{step}: {m['role']}", str(m["content"])) for m in record["messages"]]
            except (ValueError, KeyError, TypeError, IndexError, RecursionError):
                continue
            parts.append((f"{step}: reply", str(record["reply"])) if record.get("reply") is not None else
                         (f"{step}: error", str(record.get("error"))))
        if parts:
            out[t.number] = tuple(parts)
    return out


def _record(path: Path, number: int) -> dict[str, Any]:
    """A line of a transcript, from 1."""
    try:
        with path.open(encoding="utf-8", errors="replace") as f:
            line = next((text for i, text in enumerate(f, 1) if i == number), "")
    except OSError as e:
        raise LacerError(f"cannot read the transcript {path}: {e.strerror}") from None
    try:
        record = json.loads(line)
        if not isinstance(record, dict) or not all({"role", "content"} <= m.keys() for m in record["messages"]):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise LacerError(f"line {number} of {path} is {'damaged' if line else 'missing'}") from None
    return record
