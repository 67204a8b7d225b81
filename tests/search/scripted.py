"""Scripted designers: what a model of a certain kind answers to a prompt. They know nothing but the prompt.

They serve ``llm_server.py``, so nothing of lacer is imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

Encoder = dict[str, Any]
GARBAGE = ("I would rather talk about the weather.", "", '{"encoders": [{"rationale": "x", "encoder": {"sour', "null",
           '{"encoders": [{"encoder": {"sources": {"nose": {"block": "lstm"}}, "fusion": {"block": "glue"}}}]}',
           '{"best": 7, "factor": "everything", "directive": "", "reason": [], "suggestions": []}', "<html>" * 50)


def answer(kind: str, messages: list[dict[str, Any]], count: int) -> str:
    """The ``count``-th reply of a designer: "good", "stubborn", "garbage", or "reasoner" over the probes."""
    prompt = next(text_of(m) for m in messages if m["role"] == "user")
    if kind == "garbage":
        return GARBAGE[count % len(GARBAGE)]
    step = step_of(prompt)
    if step == "improver":
        return json.dumps({"reason": "the width is a guess", "suggestions": ["another width", "another depth"]})
    if step == "router":
        names = re.findall(r'^- "([^"]+\.(?:operator|wiring))": ', prompt, re.M)
        return json.dumps({"reason": "least tried", "factor": names[0 if kind == "stubborn" else count % len(names)]})
    if step == "directive":
        return json.dumps({"directive": "try another value"})
    if step == "rank":
        pool = re.split(r"^# ", prompt, flags=re.M)[-2].split("\n")[1:]
        codes = [line for line in pool if re.fullmatch(r"[\w.]+", line)]
        return json.dumps({"best": "0" if kind == "stubborn" else codes[count % len(codes)]})
    encoder = example_of(prompt)
    if kind == "stubborn":
        return reply([encoder])
    if kind == "reasoner":
        return reply([reason(prompt, encoder)])
    factor = re.search(r'(?:Factor:?|It concerns one factor only:) "([^"]+)"', prompt)
    near = list(neighbours(encoder, options_of(prompt), factor.group(1) if factor else ""))
    wanted = int((re.search(r'exactly (\d+) ', prompt) or re.search(r"^- (\d+) ", prompt, re.M) or [0, 1])[1])
    return reply([near[(7 * count + i) % len(near)] for i in range(wanted)])


def text_of(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def step_of(prompt: str) -> str:
    asked = prompt[prompt.rindex("\n# "):]
    for key, step in (('"suggestions"', "improver"), ('"factor"', "router"), ('"directive"', "directive"),
                      ('"best"', "rank")):
        if f"{{{key}" in asked or (f", {key}: " in asked and '"encoders"' not in asked):
            return step
    return "encoders"


def reply(encoders: list[Encoder]) -> str:
    return json.dumps({"encoders": [{"problem": "the width", "rationale": "because", "based_on": [0], "expected": 0.5,
                                     "encoder": e} for e in encoders]})


def example_of(prompt: str) -> Encoder:
    """The encoder in the form that the prompt shows: the best so far."""
    at = prompt.rindex('"encoder": {') + len('"encoder": ')
    return json.JSONDecoder().raw_decode(prompt, at)[0]


def options_of(prompt: str) -> dict[str, dict[str, dict[str, list[Any]]]]:
    """part -> block -> field -> options, as the prompt lists them."""
    out: dict[str, dict[str, dict[str, list[Any]]]] = {}
    part = block = ""
    for line in prompt.split("\n"):
        if m := re.match(r'## (?:source "([^"]+)"|(fusion))', line):
            part = m[1] or m[2]
            out[part] = {}
        elif line.startswith("# "):
            part = ""
        elif part and (m := re.match(r'Blocks: the same as for "([^"]+)"', line)):
            out[part] = out[m[1]]
        elif part and (m := re.match(r'- block "([^"]+)"', line)):
            block = m[1]
            out[part][block] = {}
        elif part and line.startswith('  fields: '):
            out[part][block] |= {f: json.loads(o) for f, o in re.findall(r'"(\w+)" (\[[^\]]*\])', line)}
    return out


def neighbours(encoder: Encoder, options: dict[str, Any], factor: str = "") -> Iterator[Encoder]:
    """Encoders that differ in one field, or in whether a source is used; within a factor if one is given."""
    for part, blocks in options.items():
        if factor and factor.rsplit(".", 1)[0] != part:
            continue
        old = encoder["fusion"] if part == "fusion" else encoder["sources"].get(part)
        if factor.endswith(".wiring") or (part != "fusion" and old is None):
            if part == "fusion":
                yield from (changed(encoder, part, {"block": b, **{f: o[0] for f, o in fields.items()}})
                            for b, fields in blocks.items() if b != old["block"] and b != "film")
            else:
                first = next({"block": b, **{f: o[0] for f, o in x.items()}} for b, x in blocks.items())
                block = None if old else first
                yield changed(encoder, part, block)
            continue
        for field, values in blocks[old["block"]].items():
            yield from (changed(encoder, part, {**old, field: v}) for v in values if v != old[field])


def changed(encoder: Encoder, part: str, block: dict[str, Any] | None) -> Encoder:
    new = json.loads(json.dumps(encoder))
    if part == "fusion":
        new.pop("routing", None)
        new["fusion"] = block
    elif block is None:
        del new["sources"][part]
    else:
        new["sources"][part] = block
    return new


def reason(prompt: str, encoder: Encoder, useless: float = 0.03) -> Encoder:
    """What a perfect reasoner over the probes does: it drops a used source whose features carry none of the state, and
    otherwise widens the fusion. Without probes in the prompt there is no such source to be known."""
    lines = re.findall(r"- linear_probe: ([\w., e-]+)\n", prompt)
    probed = {p.split()[0]: p.split()[1] for line in lines for p in line.split(", ")}
    for source in [s for s in encoder["sources"] if s in probed and float(probed[s]) < useless]:
        return changed(encoder, source, None)
    widths = options_of(prompt)["fusion"][encoder["fusion"]["block"]]["width"]
    tried = len(re.findall(r"^- #\d+ ", prompt, re.M))
    return changed(encoder, "fusion", {**encoder["fusion"], "width": widths[tried % len(widths)]})
