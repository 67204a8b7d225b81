"""What a study can tell a language model: plain data for the templates in ``prompts/``, which find the words."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from lacer.agents import Evaluation
from lacer.agents.probes import MEANING, TOLD
from lacer.encoders import FUSION, BlockConfig, EncoderSpec, list_blocks
from lacer.search.llm.words import as_json, name, num, short
from lacer.search.space import CONDITION, UNUSED
from lacer.search.study import Study, Trial

PAPER = ("expert", "reward", "probes", "redundancy", "rationale")
"""What the prompt of 2512.06982 tells beside the space and every encoder's task metric. Its dialogue repeats the
model's own words, so its rationales are part of it."""

FEEDBACK = {
    "expert": "the expert's encoder with its score",
    "reward": "mean return of every encoder",
    "curve": "its learning curve",
    "probes": "probes of every source's features and of the fused state",
    "redundancy": "how much the sources' features tell the same",
    "meaning": "what each probe means, in words",
    "cost": "parameters and training time",
    "noise": "standard error of the score",
    "rationale": "why an encoder was proposed",
    "expected": "what was expected of it, beside what came out",
    "memory": "problem, change and outcome of the last proposals",
    "failures": "failed trainings and rejected proposals with their reasons",
    "averages": "mean score by block",
}
"""What a prompt of the designer ``lacer`` may tell, each part by itself; of the probes, those marked ``told``."""

REDUNDANCY = "redundancy"


def task(study: Study) -> dict[str, Any]:
    """The task card."""
    card, o = study.card, study.objective
    return {"env": card.env_id, "description": card.description, "action": describe_action(card.action_space),
            "metric": o.metric, "unit": o.unit, "better": "higher" if o.direction == "maximize" else "lower"}


def describe_action(space: Any) -> str:
    """An action space in words."""
    shape = getattr(space, "shape", None)
    if hasattr(space, "low") and shape:
        return f"{int(np.prod(shape))} continuous numbers between {np.min(space.low):g} and {np.max(space.high):g}"
    if hasattr(space, "nvec"):
        return f"{len(space.nvec)} discrete actions with {', '.join(map(str, space.nvec))} options"
    return f"{space.n} discrete actions" if hasattr(space, "n") else type(space).__name__


def space(study: Study, only: Collection[str] = ()) -> dict[str, Any]:
    """The search space: parts with blocks, fields and options, as narrowed.

    A part whose blocks are those of an earlier part names it in ``same_as``; what a field does is told once.

    Args:
        study: the search.
        only: names of the parts to describe; all if empty.
    """
    s = study.encoders
    out: list[dict[str, Any]] = []
    parts: dict[tuple[str, str], str] = {}
    told: set[tuple[str, str]] = set()
    for part, modality in [*((n, x.modality) for n, x in s.card.sources.items()), (FUSION, FUSION)]:
        if only and part not in only:
            continue
        known = {b: cls for (_, b), cls in list_blocks(modality).items()}
        options = s.by_name[f"{part}.block"].options
        listing = json.dumps([[b, {f: list(d.options) for f, d in s.fields(part, b).items()}] for b in options])
        same_as = parts.get((modality, listing))
        parts.setdefault((modality, listing), part)
        blocks = []
        for block in options if same_as is None else ():
            if block == UNUSED and part != FUSION:
                continue
            fields = []
            for f, d in s.fields(part, block).items():
                about = _about(known[block], f)
                fields.append({"name": f, "options": list(d.options), "about": "" if (f, about) in told else about})
                told.add((f, about))
            blocks.append({"name": block, "about": known[block].summary(), "fields": fields})
        source = None if part == FUSION else s.card.sources[part]
        out.append({"name": part, "is_source": source is not None, "blocks": blocks, "same_as": same_as,
                    "carries": "" if source is None else source.description,
                    "optional": part != FUSION and UNUSED in options,
                    "layout": "" if source is None else _layout(modality, source.shape)})
    condition = s.by_name.get(CONDITION)
    routing = None
    if condition is not None and (not only or FUSION in only):
        routing = {"blocks": list(condition.asked_for), "options": list(condition.options)}
    return {"parts": out, "routing": routing,
            "optional": any(UNUSED in s.by_name[f"{n}.block"].options for n in s.card.sources)}


def _about(block: type[BlockConfig], field: str) -> str:
    """What a field does, and when it has an effect."""
    text = block.model_fields[field].description or ""
    if field in block.conditions():
        other, values = block.conditions()[field]
        text += f"; only if {other} is {' or '.join(map(str, values))}"
    return text


def _layout(modality: str, shape: tuple[int, ...]) -> str:
    return {
        "vector": lambda: f"vector of {shape[0]} numbers",
        "series": lambda: f"series of {shape[0]} steps, oldest first, with {shape[1]} features",
        "image": lambda: f"image, {shape[0]} x {shape[1]} pixels, {shape[2]} channels",
        "text": lambda: "text, a sentence or a few",
        "set": lambda: f"set of up to {shape[0]} elements with {shape[1]} features, the first 1 if present",
    }[modality]()


# -- trials ------------------------------------------------------------------------------------------------------------


def expert_of(study: Study) -> Trial | None:
    """The expert's trial."""
    return next((t for t in study.trials[:1] if t.proposal.designer == "expert"), None)


def ranked(study: Study, without: Collection[int] = ()) -> list[Trial]:
    """Trials with a score, the best first."""
    sign = study.objective.signed
    return sorted((t for t in study.finished if t.number not in without),
                  key=lambda t: (-sign(t.objective or 0.0), t.number))


def example(study: Study, best: Trial | None) -> str:
    """An encoder in the form of a reply: the best one, or the first of the space."""
    if best is not None and best.spec is not None:
        return as_json(best.spec.to_dict())
    return as_json(study.encoders.to_spec(next(study.space.points(limit=1))).to_dict())


def history(study: Study, feedback: Collection[str], detail: int, lines: int, names: int) -> dict[str, Any]:
    """The trials, digested: the expert's, the best, the latest and the most telling in detail; more in a line each,
    told by what sets them apart from the best; more by the names of their blocks; the rest as a number.

    A trial is the more telling, the further its score was from what was expected, or else from the score of the trial
    that it was derived from.
    """
    expert = expert_of(study) if "expert" in feedback else None
    hidden = {t.number for t in [expert_of(study)] if t is not None and expert is None}
    trials = [t for t in study.trials if t.number not in hidden]
    order = ranked(study, hidden)
    best = order[0] if order else None
    others = [t for t in order if t is not expert]
    telling, latest = detail // 3, max(1, detail // 3)
    chosen = {t.number for t in others[:detail - telling - latest]}
    for n, more in ((latest, sorted(others, key=lambda t: -t.number)),
                    (telling, sorted(others, key=lambda t: -_surprise(t, study)))):
        chosen |= {t.number for t in [t for t in more if t.number not in chosen][:n]}
    rest = [t for t in others if t.number not in chosen]
    lines, names = min(lines, len(rest)), min(names, max(0, len(rest) - lines))
    failed = [t for t in trials if t.status in ("failed", "pruned") and t is not expert]
    rejected = [t for t in trials if t.status == "rejected"]
    limit = detail if detail > 2 else 1
    sources = list(study.card.sources)
    return {
        "sources": sources, "best": best, "count": len(order), "expert": expert,
        "expert_facts": facts(expert, study) if expert is not None and expert.objective is not None else None,
        "detailed": [facts(t, study, best) for t in others if t.number in chosen],
        "lines": [_line(t, best, sources) for t in rest[:lines]],
        "names": [_line(t, None, sources) for t in rest[lines:lines + names]],
        "omitted": len(rest) - lines - names,
        "running": [t for t in trials if t.status == "running" and t is not expert],
        "failed": failed[-limit:] if "failures" in feedback else [], "failed_count": len(failed),
        "rejected": rejected[-limit:] if "failures" in feedback else [], "rejected_count": len(rejected),
        "averages": averages(study, order) if "averages" in feedback and len(order) >= 6 else [],
        "meaning": _meaning(order),
        "example": example(study, best),
    }


def _meaning(trials: Sequence[Trial]) -> dict[str, str]:
    """What those probes mean that some trial has and that prompts tell of."""
    taken = {p for t in trials if t.evaluation is not None for values in t.evaluation.probes.values() for p in values}
    return {p: MEANING[p] for p in TOLD if p in taken}


def _line(t: Trial, best: Trial | None, sources: Sequence[str]) -> dict[str, Any]:
    assert t.spec is not None
    if best is None or best.spec is None:
        return {"t": t, "text": blocks_of(t.spec, sources)}
    return {"t": t, "text": shortest(t, best, sources)}


def _surprise(t: Trial, study: Study) -> float:
    expected = t.proposal.meta.get("expected")
    if expected is None:
        reference = reference_of(t, study)
        expected = None if reference is None else reference.objective
    return 0.0 if expected is None or t.objective is None else abs(t.objective - float(expected))


def facts(trial: Trial, study: Study, best: Trial | None = None) -> dict[str, Any]:
    """What there is to tell about a finished trial; its encoder by what sets it apart from the best, if given."""
    e = trial.evaluation
    assert e is not None
    values = e.metrics.get(study.objective.metric, [])
    error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    parts = [*study.card.sources, "fused"]
    probes: dict[str, dict[str, float]] = {}  # probe -> part -> value
    for part in parts:
        for probe, value in e.probes.get(part, {}).items():
            if probe in TOLD and probe != REDUNDANCY:
                probes.setdefault(probe, {})[part] = value
    redundancy = [(part, *max(pairs, key=lambda p: p[1])) for part in parts if (pairs := _single(e, part, REDUNDANCY))]
    return {"t": trial, "e": e, "error": error, "text": shortest(trial, best, list(study.card.sources)),
            "probes": probes, "redundancy": redundancy, "curve": curve(e),
            "variables": _variables(e, list(study.card.sources)), "expected": trial.proposal.meta.get("expected")}


def _single(e: Evaluation, part: str, probe: str) -> list[tuple[str, float]]:
    """The values ``PROBE/NAME`` of a part, by name."""
    return [(k.split("/", 1)[1], v) for k, v in e.probes.get(part, {}).items() if k.startswith(f"{probe}/")]


def _variables(e: Evaluation, sources: Sequence[str], n: int = 6) -> list[tuple[str, str, float, float]]:
    """State variables with the source that tells most of them, how much that is, and how much the fused state tells;
    those first that lose most on the way, the others by what is known of them."""
    best: dict[str, tuple[str, float]] = {}
    for part in sources:
        for variable, value in _single(e, part, "linear_probe"):
            if variable not in best or value > best[variable][1]:
                best[variable] = (part, value)
    fused = dict(_single(e, "fused", "linear_probe"))
    rows = [(v, *best[v], fused.get(v, 0.0)) for v in best]
    lost = sorted(rows, key=lambda r: r[3] - r[2])[:n - n // 3]
    known = sorted((r for r in rows if r not in lost), key=lambda r: -max(r[2], r[3]))
    return [*lost, *known[:n - len(lost)]]


def curve(e: Evaluation, points: int = 5) -> list[tuple[int, float]]:
    """A learning curve in at most five points, the first and the last included."""
    if len(e.curve) <= points:
        return list(e.curve)
    return [e.curve[i] for i in np.linspace(0, len(e.curve) - 1, points).round().astype(int)]


def averages(study: Study, finished: Sequence[Trial]) -> list[dict[str, Any]]:
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


# -- what was changed, and what came of it -----------------------------------------------------------------------------


def blocks_of(spec: EncoderSpec, sources: Sequence[str]) -> str:
    """The blocks of an encoder without their hyper-parameters; what is left out is not named."""
    by = "" if spec.condition is None else f" by {name(spec.condition)}"
    return ", ".join(f"{name(n)}={name(spec.sources[n].block)}" for n in sources if n in spec.sources) + (
        f"; fusion={name(spec.fusion.block)}{by}")


def difference(old: EncoderSpec, new: EncoderSpec, sources: Sequence[str]) -> str:
    """What turns one encoder into another, in a line."""
    out = []
    for part in [*sources, FUSION]:
        a, b = (s.fusion if part == FUSION else s.sources.get(part) for s in (old, new))
        if a == b:
            continue
        if b is None:
            out.append(f"{name(part)} left out")
        elif a is None or a.block != b.block:
            out.append(f"{name(part)}={b.short()}")
        else:
            before, after = a.model_dump(), b.model_dump()
            out += [f"{name(part)}.{k}={v}" for k, v in after.items() if before[k] != v]
    if new.condition is not None and new.condition != old.condition:
        out.append(f"{CONDITION}={name(new.condition)}")
    return ", ".join(out) or "nothing differs"


def shortest(t: Trial, best: Trial | None, sources: Sequence[str]) -> str:
    """An encoder in a line: whole, or by what sets it apart from the best."""
    assert t.spec is not None
    whole = short(t.spec, sources)
    if best is None or best.spec is None or best is t:
        return whole
    apart = f"as #{best.number}, but {difference(best.spec, t.spec, sources)}"
    return apart if len(apart) < len(whole) else whole


def reference_of(trial: Trial, study: Study) -> Trial | None:
    """What a trial is measured by: the best of those that it was derived from, or else the best before it."""
    sign = study.objective.signed
    parents = [study[p] for p in trial.proposal.parents if p < len(study) and p != trial.number]
    known = [t for t in parents if t.objective is not None]
    known = known or [t for t in study.finished if t.number < trial.number]
    return max(known, key=lambda t: (sign(t.objective or 0.0), -t.number), default=None)


def outcome(trial: Trial, study: Study) -> str:
    """What came of a proposal: the change of the metric, or the error."""
    if trial.status == "running":
        return "still being evaluated"
    if trial.objective is None:
        return f"{'failed in training' if trial.status == 'failed' else trial.status}: {trial.reason}"
    text = f"scored {num(trial.objective)}"
    reference = reference_of(trial, study)
    if reference is not None and reference.objective is not None:
        d = trial.objective - reference.objective
        word = "better" if study.objective.signed(d) > 0 else "worse" if d else "no different"
        text += f", {num(abs(d))} {word} than #{reference.number}" if d else f", no different from #{reference.number}"
    return text


def memory(study: Study, k: int, by: Collection[str]) -> list[dict[str, Any]]:
    """The last ``k`` proposals of some designers, oldest first: problem, suggestion, outcome (2603.12091).

    Rejected proposals and failed trainings are remembered like the others. The suggestion is what the model said that
    it would change; beside it stands what it did change.
    """
    out: list[dict[str, Any]] = []
    sources = list(study.card.sources)
    last = [t for t in study.trials if t.proposal.designer in by][-k:] if k else []
    for t in last:
        reference = reference_of(t, study)
        change = ""
        if t.spec is not None and reference is not None and reference.spec is not None:
            change = f"#{reference.number} with {difference(reference.spec, t.spec, sources)}"
        meta: Mapping[str, Any] = t.proposal.meta
        suggestions = meta.get("suggestions") or ([t.proposal.rationale] if t.proposal.rationale else [])
        out.append({"t": t, "problem": str(meta.get("problem") or ""), "suggestion": " ".join(map(str, suggestions)),
                    "change": change, "outcome": outcome(t, study), "expected": meta.get("expected")})
    return out
