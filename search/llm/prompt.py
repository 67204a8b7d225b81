"""Prompts: a study turned into Markdown by the templates in ``prompts/``.

Text of environments and of earlier replies goes in as JSON strings (filter ``q``), so it can neither close a fence or
a heading nor be taken for template code: Jinja renders its values once and never reads them as templates.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np

from lacer.agents import Evaluation
from lacer.agents.probes import MEANING
from lacer.encoders import FUSION, BlockConfig, EncoderSpec, list_blocks
from lacer.search.llm.reply import clean
from lacer.search.space import CONDITION, UNUSED, EncoderSpace
from lacer.search.study import Study, Trial

FEEDBACK = ("expert", "reward", "probes")
"""What a designer may learn beside the objective: the expert's encoder with its score, the mean return and learning
curve, the probes. Each can be left out (the ablations of 2512.06982)."""

MAX_CHARS = 27_000
"""Length of a prompt that the history is shortened to, about 7,700 tokens."""

_LEVELS = ((8, 60), (6, 40), (4, 25), (2, 12), (1, 5))
"""(trials told in detail, further trials told in a line), tried until the prompt is short enough."""


def render(study: Study, k: int, feedback: Collection[str] = FEEDBACK, max_chars: int = MAX_CHARS) -> str:
    """The prompt that asks for ``k`` new encoders, from the study alone.

    Args:
        study: the search so far.
        k: number of encoders to ask for.
        feedback: what is told beside the objective, out of :data:`FEEDBACK`.
        max_chars: the history is shortened to keep the prompt within this, where it can be.
    """
    fixed = {"card": study.card, "objective": study.card.objective, "k": k, "feedback": set(feedback),
             "sources": describe_space(study.encoders), "probes": MEANING,
             "action": describe_action(study.card.action_space), "optional": _optional(study.encoders),
             "routing": _routing(study.encoders)}
    text = ""
    for detail, digest in _LEVELS:
        text = template("lacer.md").render(**fixed, **_history(study, detail, digest, "expert" in feedback))
        if len(text) <= max_chars:
            break
    return text


@cache
def template(name: str) -> jinja2.Template:
    """A prompt file. It may use the filters ``q`` (JSON string), ``num``, ``short`` (an encoder in a line)."""
    env = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False,
                             keep_trailing_newline=False)
    env.filters.update(q=quoted, num=num, short=short)
    return env.from_string(files("lacer.search.llm.prompts").joinpath(name).read_text(encoding="utf-8"))


def quoted(text: object, limit: int = 1500) -> str:
    """A text as a JSON string on one line."""
    return json.dumps(clean(text, limit).replace("`", "'"), ensure_ascii=False)


def num(x: float | None) -> str:
    """A number in three significant digits."""
    return "?" if x is None else f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}"


def short(spec: EncoderSpec, names: Sequence[str]) -> str:
    """An encoder with its hyper-parameters in one line."""
    parts = [f"{n}={spec.sources[n].short()}" if n in spec.sources else f"{n} left out" for n in names]
    routing = [] if spec.condition is None else [f"{CONDITION}={spec.condition}"]
    return "; ".join([*parts, f"{FUSION}={spec.fusion.short()}", *routing])


def describe_action(space: Any) -> str:
    """An action space in words."""
    shape = getattr(space, "shape", None)
    if hasattr(space, "low") and shape:
        return f"{int(np.prod(shape))} continuous numbers between {np.min(space.low):g} and {np.max(space.high):g}"
    return f"{space.n} discrete actions" if hasattr(space, "n") else clean(space, 200)


def describe_space(space: EncoderSpace) -> list[dict[str, Any]]:
    """The parts of the space in words: every source and the fusion with blocks, fields and options, as narrowed.

    Parts whose blocks are those of an earlier part name it in ``same_as``.
    """
    out: list[dict[str, Any]] = []
    told: dict[tuple[str, str], str] = {}
    for name, modality in [*((n, s.modality) for n, s in space.card.sources.items()), (FUSION, FUSION)]:
        known = {b: cls for (_, b), cls in list_blocks(modality).items()}
        options = space.by_name[f"{name}.block"].options
        described = []
        for block in options:
            if block == UNUSED and name != FUSION:
                continue
            fields = [{"name": f, "options": json.dumps(list(d.options)), "about": _about(known[block], f)}
                      for f, d in space.fields(name, block).items()]
            described.append({"name": block, "about": known[block].summary(), "fields": fields})
        key = (modality, json.dumps(described))
        source = None if name == FUSION else space.card.sources[name]
        out.append({"name": name, "source": source, "blocks": described, "same_as": told.get(key),
                    "optional": name != FUSION and UNUSED in options,
                    "layout": "" if source is None else _layout(modality, source.shape)})
        told.setdefault(key, name)
    return out


def _about(block: type[BlockConfig], field: str) -> str:
    """What a field does, and when it has an effect."""
    text = block.model_fields[field].description or ""
    if field in block.conditions():
        other, values = block.conditions()[field]
        text += f"; only if {other} is {' or '.join(map(str, values))}"
    return text


def _routing(space: EncoderSpace) -> dict[str, str] | None:
    """The routing in words: which fusion blocks need it, and what it may name."""
    d = space.by_name.get(CONDITION)
    return None if d is None else {"blocks": " or ".join(map(json.dumps, d.asked_for)),
                                   "options": json.dumps(list(d.options))}


def _layout(modality: str, shape: tuple[int, ...]) -> str:
    return {
        "vector": lambda: f"vector of {shape[0]} numbers",
        "series": lambda: f"series of {shape[0]} steps, oldest first, with {shape[1]} features",
        "image": lambda: f"image, {shape[0]} x {shape[1]} pixels, {shape[2]} channels",
        "text": lambda: "text, a sentence or a few",
        "set": lambda: f"set of up to {shape[0]} elements with {shape[1]} features, the first 1 if present",
    }[modality]()


def _optional(space: EncoderSpace) -> bool:
    return any(UNUSED in space.by_name[f"{n}.block"].options for n in space.card.sources)


def _example(study: Study, best: Trial | None) -> str:
    """An encoder in the form of a reply: the best one, or the first of the space."""
    if best is not None and best.spec is not None:
        return json.dumps(best.spec.to_dict())
    return json.dumps(study.encoders.to_spec(next(study.space.points(limit=1))).to_dict())


def _history(study: Study, detail: int, digest: int, with_expert: bool) -> dict[str, Any]:
    """The trials for the template: a few in detail (the expert's, the best, the latest), more in one line each."""
    trials, names = study.trials, list(study.card.sources)
    if not with_expert:
        trials = tuple(t for t in trials if t.proposal.designer != "expert")
    expert = next((t for t in trials if t.proposal.designer == "expert"), None)
    sign = study.card.objective.signed
    finished = sorted((t for t in trials if t.objective is not None),
                      key=lambda t: (-sign(t.objective or 0.0), t.number))
    latest = sorted(finished, key=lambda t: -t.number)[:detail - detail // 2]
    chosen = {t.number for t in [*finished[:max(1, detail // 2)], *latest]}
    rest = [t for t in finished if t.number not in chosen and t is not expert]
    told = [*rest[:digest - digest // 3], *rest[digest - digest // 3:][-(digest // 3):]]
    failed = [t for t in trials if t.status == "failed" and t is not expert]
    rejected = [t for t in trials if t.status == "rejected"]
    limit = max(2, detail)
    return {
        "names": names, "expert": expert, "best": finished[0] if finished else None,
        "detailed": [_facts(t, study) for t in finished if t.number in chosen and t is not expert],
        "expert_facts": _facts(expert, study) if expert is not None and expert.objective is not None else None,
        "digests": [_facts(t, study) for t in told], "omitted": len(rest) - len(told), "count": len(finished),
        "running": [t for t in trials if t.status == "running" and t is not expert],
        "example": _example(study, finished[0] if finished else None),
        "failed": failed[-limit:], "failed_count": len(failed),
        "rejected": rejected[-limit:], "rejected_count": len(rejected),
        "averages": _averages(finished, study) if len(finished) >= 6 else [],
    }


def _facts(trial: Trial, study: Study) -> dict[str, Any]:
    """What the template tells about a finished trial."""
    e = trial.evaluation
    assert e is not None
    values = e.metrics.get(study.card.objective.metric, [])
    error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    parts = [*study.card.sources, "fused"]
    probes: dict[str, dict[str, float]] = {}  # probe -> part -> value
    for part in parts:
        for name, value in e.probes.get(part, {}).items():
            if "/" not in name:
                probes.setdefault(name, {})[part] = value
    return {"t": trial, "e": e, "error": error, "episodes": len(values), "probes": probes,
            "single": {part: _largest(e.probes[part], 6 if part == "fused" else 2) for part in parts
                       if any("/" in n for n in e.probes.get(part, {}))},
            "curve": _curve(e), "expected": trial.proposal.meta.get("expected")}


def _largest(values: Mapping[str, float], n: int) -> list[tuple[str, float]]:
    """The largest single values (``probe/VARIABLE``) of one part, by variable."""
    single = {k.split("/", 1)[1]: v for k, v in values.items() if k.startswith("linear_probe/")}
    return sorted(single.items(), key=lambda kv: -kv[1])[:n]


def _curve(e: Evaluation, points: int = 6) -> list[tuple[int, float]]:
    """A learning curve in at most six points, the first and the last included."""
    if len(e.curve) <= points:
        return list(e.curve)
    return [e.curve[i] for i in np.linspace(0, len(e.curve) - 1, points).round().astype(int)]


def _averages(finished: Sequence[Trial], study: Study) -> list[dict[str, Any]]:
    """Mean objective of the trials with each block, by source."""
    out = []
    for part in [*study.card.sources, FUSION]:
        groups: dict[str, list[float]] = {}
        for t in finished:
            groups.setdefault(str((t.proposal.point or {}).get(f"{part}.block")), []).append(t.objective or 0.0)
        if len(groups) > 1:
            out.append({"part": part, "groups": [(b if b != UNUSED else "left out", float(np.mean(v)), len(v))
                                                 for b, v in groups.items()]})
    return out
