"""Reading replies: JSON out of text, encoders out of JSON. Replies are data; nothing in them is ever executed."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lacer.encoders import FUSION, EncoderSpec, list_blocks
from lacer.envs import LacerError
from lacer.search.space import CONDITION, UNUSED, EncoderSpace, Point

MAX_TEXT = 2000
"""Characters of a rationale or raw reply that are kept in the study."""


@dataclass(frozen=True)
class Answer:
    """One encoder of a reply: a point of the space, or why it is none.

    Attributes:
        point: the encoder; None if it is not valid.
        error: why it is not valid, in words that help to mend it.
        rationale: the model's reason.
        expected: the objective that the model expects, None if it named none.
        based_on: numbers of the trials that it says it started from.
        problem: what it says holds the score back.
    """

    point: Point | None = None
    error: str = ""
    rationale: str = ""
    expected: float | None = None
    based_on: tuple[int, ...] = ()
    problem: str = ""


def clean(text: object, limit: int = MAX_TEXT) -> str:
    """Text of a model, fit for terminals, files and databases: no control characters, no lone surrogates."""
    kept = "".join(c for c in str(text) if c in "\n\t" or unicodedata.category(c)[0] != "C")
    return kept if len(kept) <= limit else kept[:limit - 4] + " ..."


def find_json(text: str, wanted: Sequence[str] = ()) -> dict[str, Any]:
    """The JSON object in a text that may have prose, code fences or several objects around it; the last one that
    looks like a reply.

    Args:
        text: the reply.
        wanted: keys of the object that is looked for; default: those of encoders.

    Raises:
        LacerError: if there is none, with the place of the first mistake.
    """
    decoder = json.JSONDecoder()
    found: list[dict[str, Any]] = []
    problem, at = "", text.find("{")
    for _ in range(200):
        if at < 0:
            break
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            problem = problem or (f"{e.msg} at line {e.lineno}, column {e.colno}" if isinstance(e, json.JSONDecodeError)
                                  else "it is nested too deeply or holds too long a number")
            at = text.find("{", at + 1)
            continue
        found.append(value)
        at = text.find("{", end)
    if wanted:
        whole = [v for v in found if all(key in v for key in wanted)]
        if whole:
            return whole[-1]
        form = json.dumps(dict.fromkeys(wanted, "..."))
        raise LacerError(f"the reply is not valid JSON: {problem}" if problem else
                         f"the reply holds no JSON object with {', '.join(map(json.dumps, wanted))}; send {form}")
    fitting = [v for v in found if "encoders" in v or "encoder" in v or "sources" in v]
    # A part of a broken object must not pass for the whole: only a real reply may follow a mistake.
    if fitting and (not problem or any("encoders" in v for v in fitting)):
        return next((v for v in reversed(fitting) if "encoders" in v), fitting[-1])
    if problem:
        raise LacerError(f"the reply is not valid JSON: {problem}")
    if found:
        raise LacerError('the JSON object has no "encoders"; send {"encoders": [...]}')
    raise LacerError('the reply holds no JSON object; send {"encoders": [...]} and nothing else')


def parse_reply(text: str, space: EncoderSpace, k: int) -> list[Answer]:
    """The encoders of a reply, at most ``k`` valid ones and as many invalid ones; never empty."""
    try:
        data = find_json(text)
    except LacerError as e:
        return [Answer(error=str(e))]
    items = data.get("encoders", data)
    if isinstance(items, dict):
        items = [items]
    if not isinstance(items, list) or not items:
        return [Answer(error='"encoders" must be a list with at least one encoder')]
    return [_answer(item, space) for item in items[:k]]


def _answer(item: Any, space: EncoderSpace) -> Answer:
    if not isinstance(item, dict):
        return Answer(error='each of "encoders" must be an object with "rationale", "expected" and "encoder"')
    expected = item.get("expected")
    if isinstance(expected, bool) or not isinstance(expected, int | float) or not abs(expected) < 1e300:
        expected = None  # NaN too
    based_on = item.get("based_on")
    based_on = tuple(i for i in (based_on if isinstance(based_on, list) else [based_on]) if type(i) is int)[:8]
    rationale, problem = clean(item.get("rationale") or ""), clean(item.get("problem") or "", 500)
    try:
        bare = {k: item[k] for k in ("sources", "fusion", "routing") if k in item}
        point = to_point(item.get("encoder", bare), space)
    except LacerError as e:
        return Answer(None, clean(e, 500), rationale, expected, based_on, problem)
    return Answer(point, "", rationale, expected, based_on, problem)


def to_point(encoder: Any, space: EncoderSpace) -> Point:
    """The point of an encoder as a model writes it; null or "unused" leaves a source out.

    Raises:
        LacerError: with the place and the mistake.
    """
    if isinstance(encoder, dict) and isinstance(encoder.get("sources"), dict):
        sources = {name: block for name, block in encoder["sources"].items()
                   if block is not None and block != UNUSED
                   and not (isinstance(block, dict) and block.get("block") == UNUSED)}
        encoder = {**encoder, "sources": sources}
    return space.from_spec(EncoderSpec.parse(encoder, space.card))


ASKED: dict[str, dict[str, Any]] = {
    "problem": {"type": "string"}, "rationale": {"type": "string"},
    "based_on": {"type": "array", "items": {"type": "integer"}}, "expected": {"type": "number"}}
"""What a model can be asked for with every encoder."""


def reply_schema(space: EncoderSpace, k: int,
                 ask: Sequence[str] = ("rationale", "based_on", "expected")) -> dict[str, Any]:
    """JSON schema of a reply with ``k`` encoders out of the space, each with some of :data:`ASKED`."""
    def closed(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
        return {"type": "object", "properties": properties, "additionalProperties": False,
                "required": list(properties) if required is None else required}

    def part(name: str) -> dict[str, Any]:
        options = []
        for block in space.by_name[f"{name}.block"].options:
            if block != UNUSED or name == FUSION:
                fields = {f: {"enum": list(d.options)} for f, d in space.fields(name, block).items()}
                modality = FUSION if name == FUSION else space.card.sources[name].modality
                free = list_blocks(modality)[modality, block].conditions()
                options.append(closed({"block": {"enum": [block]}, **fields},
                                      ["block", *(f for f in fields if f not in free)]))
        return {"anyOf": options}

    names = list(space.card.sources)
    needed = [n for n in names if UNUSED not in space.by_name[f"{n}.block"].options]
    routing = {} if CONDITION not in space.by_name else {
        "routing": closed({"condition": {"enum": list(space.by_name[CONDITION].options)}})}
    encoder = closed({"sources": closed({n: part(n) for n in names}, needed), "fusion": part(FUSION), **routing},
                     ["sources", "fusion"])
    one = closed({**{key: ASKED[key] for key in ask}, "encoder": encoder})
    return closed({"encoders": {"type": "array", "items": one, "minItems": k, "maxItems": k}})
