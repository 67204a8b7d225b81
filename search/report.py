"""One HTML page about a search: result, encoders, progress, probes, cost. Needs no network and no other file."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from markupsafe import Markup, escape

from lacer.agents import Evaluation
from lacer.agents.probes import MEANING, TOLD
from lacer.encoders import EncoderSpec
from lacer.envs import LacerError
from lacer.search.drawing import (
    ENCODER_STYLE,
    MODALITY_COLOURS,
    Column,
    Dot,
    Row,
    bars_plot,
    clean,
    count,
    curves_plot,
    decimals,
    dot_rows,
    draw_encoder,
    encoder_svg,
    heat_map,
    number,
    progress_plot,
    scatter_plot,
)
from lacer.search.insight import ENOUGH, decision_importance, pack_prompts, predictions
from lacer.search.outcome import EXPERT, NOOP, WINNER, Outcome, describe_usage, paired_difference
from lacer.search.study import USAGE, Trial

_CLASSES = {NOOP: "noop", EXPERT: "expert", WINNER: "winner"}
_INTERVAL = re.compile(r"\[[−\d.,e+ ]+\]")


def write_report(outcome: Outcome, path: Path, *, expert: EncoderSpec | None = None) -> Path:
    """Writes the report of a search, finished or not, as one self-contained HTML file.

    Args:
        outcome: the search.
        path: the file; its folder is made if need be.
        expert: the expert's encoder. By default ``outcome.config["expert"]`` if that is an encoder, or else the first
            trial whose designer is ``expert``.

    Returns:
        ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_report(outcome, expert=expert), encoding="utf-8")
    return path


def render_report(outcome: Outcome, *, expert: EncoderSpec | None = None) -> str:
    """The HTML of :func:`write_report`."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"number": number, "count": count, "duration": duration, "amount": _amount,
                    "soften": _soften, "sha256": _sha256, "title_case": lambda text: text[:1].upper() + text[1:]}
    return clean(env.get_template("report.html").render(**_context(outcome, expert or _find_expert(outcome))))


def headline(outcome: Outcome) -> str:
    """The result of a search in one honest sentence."""
    card, objective = outcome.card, outcome.card.objective
    counts = Counter(t.status for t in outcome.trials)
    best = _winner(outcome)
    if best is None:
        if not outcome.trials:
            return "The search has not proposed an encoder yet."
        parts = [f"{n} {status}" for status, n in sorted(counts.items())]
        return f"None of the {_plural(len(outcome.trials), 'proposed encoder')} has a result: {', '.join(parts)}." + (
            " Tracebacks are in workers.log. What failed is not tried again: mend it and resume with more candidates, "
            "or begin anew." if counts["failed"] else "")
    who = f"The best of {_plural(counts['ok'], 'encoder')}" if counts["ok"] > 1 else "The only encoder with a result"
    if best.proposal.designer == EXPERT:
        who += " is the expert’s own; it"
    name = objective.metric.replace("_", " ")
    name = name if name.startswith(("mean ", "average ")) else f"mean {name}"
    unit = f" {objective.unit}" if objective.unit else ""
    end = " Less is better." if objective.direction == "minimize" else ""
    final = outcome.finals.get(WINNER)
    if final is None or not final.ok or final.objective is None:
        assert best.evaluation is not None
        why = "Its final run failed" if final is not None else "It has not been checked on other episodes yet"
        values = best.evaluation.metrics.get(objective.metric, [])
        places = decimals(float(np.std(values))) if len(values) > 1 else 2
        on = _plural(len(values), "episode") if values else "the episodes"
        return (f"{who} reaches {_a(name)} of {number(best.objective, places)}{unit} on {on} that also chose it. "
                f"{why}.{end}")
    clauses, places = [], 2
    for key, of in ((NOOP, "doing nothing" if card.noop is not None else "acting at random"),
                    (EXPERT, "the expert’s")):
        other = outcome.finals.get(key)
        if other is None or (key == EXPERT and best.proposal.designer == EXPERT):
            continue
        d = _difference(final, other, objective.metric)
        if not other.ok:
            clauses.append(f"while {of.replace('’s', '’s encoder')} gave no result")
        elif d is None:
            clauses.append(f"against {number(other.objective, places)}{unit} for {of} on other episodes")
        else:
            mean, low, high = d
            places = decimals(high - low)
            side, sign = ("above", 1) if mean >= 0 else ("below", -1)
            ends = sorted((sign * low, sign * high))
            size = f"{number(abs(mean), places)}{unit} [{number(ends[0], places)}, {number(ends[1], places)}]"
            clauses.append(f"{size} {side} {of}" if low > 0 or high < 0 else
                           f"not distinguishable from {of} ({size} {side})")
    episodes = final.metrics.get(objective.metric) or [final.objective]
    tail = f"on {_plural(len(episodes), 'episode')} that took no part in the search"
    value = number(final.objective, decimals(_interval(episodes)[1] - _interval(episodes)[0]) if len(episodes) > 1
                   else places)
    more = f": {' and '.join(clauses)}" if clauses else ""
    return f"{who} reaches {_a(name)} of {value}{unit} {tail}{more}.{end}"


def duration(seconds: float | None) -> str:
    """Seconds in words: 12.3 s, 4 min 05 s, 2 h 10 min."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min {s:02d} s"


# ------------------------------------------------------------------------------------------------ from data to page

def _context(outcome: Outcome, expert: EncoderSpec | None) -> dict[str, Any]:
    """Everything that the template shows."""
    objective = outcome.card.objective
    best = _winner(outcome)
    runs = [*(t.evaluation for t in outcome.trials if t.evaluation), *outcome.finals.values()]
    evaluations = list({id(e): e for e in runs}.values())  # the expert's final run may be the winner's too
    total = {field: sum(getattr(e.cost, field) for e in evaluations)
             for field in ("env_steps", "train_seconds", "eval_seconds", "probe_seconds")}
    total["own_steps"] = sum(int(t.proposal.meta.get("env_steps") or 0) for t in outcome.trials)
    total["env_steps"] += total["own_steps"]
    seeds = _seeds(outcome)
    prompts, prompted = pack_prompts(outcome.prompts, [t.number for t in outcome.ranked()])
    return {
        "card": outcome.card, "objective": objective, "headline": headline(outcome),
        "metric": objective.metric.replace("_", " ") + (f" ({objective.unit})" if objective.unit else ""),
        "counts": Counter(t.status for t in outcome.trials), "designers": _designers(outcome.trials),
        "best": best, "best_json": best.spec.to_json() if best and best.spec else "", "outcome": outcome,
        "finals": _finals(outcome, best), "encoders": _encoders(outcome, best, expert),
        "progress": _progress(outcome, best), "candidates": _candidates(outcome, best),
        "probes": _probes(outcome, best), "decisions": _decisions(outcome), "foreseen": _foreseen(outcome, best),
        "prompts": prompts, "prompted": prompted, "unprompted": set(outcome.prompts) - prompted,
        "total": total, "tokens": _tokens(outcome), "usage": describe_usage(outcome.usage),
        "config": _yaml(outcome.config), "seeds": seeds,
        "encoder_style": Markup(ENCODER_STYLE), "colours": MODALITY_COLOURS, "meaning": MEANING,
    }


def _winner(outcome: Outcome) -> Trial | None:
    """The winning trial, if it has a result."""
    by_number = {t.number: t for t in outcome.trials}
    trial = by_number.get(outcome.winner) if outcome.winner is not None else None
    return trial if trial is not None and trial.objective is not None else None


def _find_expert(outcome: Outcome) -> EncoderSpec | None:
    given = outcome.config.get("expert")
    if isinstance(given, dict):
        try:
            return EncoderSpec.parse(given, outcome.card)
        except LacerError:
            pass
    return next((t.spec for t in outcome.trials if t.proposal.designer == EXPERT and t.spec), None)


def _difference(a: Evaluation | None, b: Evaluation | None, metric: str) -> tuple[float, float, float] | None:
    """Paired difference, None where there is none."""
    if a is None or b is None or not a.ok or not b.ok:
        return None
    try:
        out = paired_difference(a, b, metric)
    except (ValueError, KeyError):
        return None
    return out if all(map(math.isfinite, out)) else None


def _interval(values: Iterable[float]) -> tuple[float, float]:
    """95 % bootstrap interval of a mean (10,000 draws)."""
    v = np.array(list(values), float)
    draws = v[np.random.default_rng(0).integers(len(v), size=(10_000, len(v)))].mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def _finals(outcome: Outcome, best: Trial | None) -> dict[str, Any]:
    """Plots of the final runs, and notes about those without a result."""
    objective = outcome.card.objective
    metric, unit = objective.metric, f" ({objective.unit})" if objective.unit else ""
    label = metric.replace("_", " ") + unit
    names = sorted(outcome.finals, key=lambda n: {NOOP: 0, EXPERT: 1, WINNER: 3}.get(n, 2))
    rows, differences, notes = [], [], []
    winner = outcome.finals.get(WINNER)
    same = best is not None and best.proposal.designer == EXPERT and WINNER in names
    for name in names:
        if name == EXPERT and same:
            continue
        e = outcome.finals[name]
        title = "random actions" if name == NOOP and outcome.card.noop is None else name
        title = "winner: the expert’s own encoder" if name == WINNER and same else title
        if not e.ok or e.objective is None:
            notes.append(f"{title}: no result. {_cut(e.reason, 600)}")
            continue
        values = [v for v in e.metrics.get(metric, []) if math.isfinite(v)] or [e.objective]
        rows.append(Row(title, _CLASSES.get(name, "other"), values, e.objective, *_interval(values)))
        d = _difference(winner, e, metric) if name != WINNER else None
        if d is not None and winner is not None:
            pairs = zip(winner.metrics[metric], e.metrics[metric], strict=True)
            differences.append(Row(f"{WINNER} − {title}", "winner", [a - b for a, b in pairs], *d))
        elif name != WINNER and winner is not None and winner.ok:
            notes.append(f"{title} was evaluated on other episodes than the winner, so there is no paired difference.")
    curves = {n: outcome.finals[n].curve for n in names
              if outcome.finals[n].curve and not (same and n == EXPERT)}
    return {
        "values": Markup(dot_rows(rows, label)) if rows else "",
        "differences": Markup(dot_rows(differences, "difference in " + label, zero=True)) if differences else "",
        "curves": Markup(curves_plot(curves, {n: _CLASSES.get(n, "other") for n in curves},
                                     "environment steps of the final training", links=False)) if curves else "",
        "curve_names": {n: _CLASSES.get(n, "other") for n in curves},
        "notes": notes,
        "seed": winner.seed if winner is not None else None,
    }


def _encoders(outcome: Outcome, best: Trial | None, expert: EncoderSpec | None) -> list[dict[str, Any]]:
    """Drawings of the winner and of the expert's encoder."""
    out = []
    if best is not None and best.spec is not None and best.evaluation is not None:
        final = outcome.finals.get(WINNER)
        cost = final.cost if final is not None and final.cost.parameters_by_module else best.evaluation.cost
        own = best.spec == expert
        out.append({"title": "Best encoder: the expert’s own" if own else "Best encoder", "cls": "winner",
                    "parameters": cost.parameters, "hash": best.spec.hash,
                    "note": f"candidate {best.number}, proposed by {best.proposal.designer}",
                    "svg": Markup(encoder_svg(best.spec, outcome.card, parameters=cost.parameters_by_module,
                                              compare=None if own else expert))})
    if expert is not None and (best is None or best.spec != expert):
        final = outcome.finals.get(EXPERT)
        same = [t.evaluation.cost for t in outcome.trials if t.spec == expert and t.evaluation]
        costs = [*([final.cost] if final is not None else []), *same]
        modules = next((c for c in costs if c.parameters_by_module), None)
        out.append({"title": "The expert’s encoder", "cls": "expert", "hash": expert.hash, "note": "designed by hand",
                    "parameters": modules.parameters if modules else 0,
                    "svg": Markup(encoder_svg(expert, outcome.card, compare=best.spec if best else None,
                                              parameters=modules.parameters_by_module if modules else None))})
    return out


def _progress(outcome: Outcome, best: Trial | None) -> dict[str, Markup]:
    """Objective by candidate, and the learning curves."""
    places = _places(outcome.trials)
    label = outcome.card.objective.metric.replace("_", " ")
    dots = [Dot(t.number, t.objective, t.status, f"#{t.number} {t.proposal.designer}: "
                + (number(t.objective, places) if t.objective is not None else t.status)
                + (f", {t.spec.short()}" if t.spec else "")) for t in outcome.trials]
    curves = {f"#{t.number}": t.evaluation.curve for t in outcome.trials if t.evaluation and t.evaluation.curve}
    mark = {f"#{best.number}": "winner"} if best else {}
    out = {"objective": Markup(), "curves": Markup()}
    if dots:
        out["objective"] = Markup(progress_plot(dots, best.number if best else None,
                                                outcome.card.objective.direction == "minimize", label,
                                                wide=any(e.curve for e in outcome.finals.values())))
    if curves:
        out["curves"] = Markup(curves_plot(curves, mark, "environment steps"))
    return out


def _candidates(outcome: Outcome, best: Trial | None) -> list[dict[str, Any]]:
    """Rows of the table with what they open to, the best first."""
    card, by_number = outcome.card, {t.number: t for t in outcome.trials}
    room = max(500, min(6000, 300_000 // max(1, len(outcome.trials))))
    values = [t.objective for t in outcome.trials if t.objective is not None]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    out = []
    for rank, t in enumerate(outcome.ranked(), 1):
        e, p = t.evaluation, t.proposal
        fused = e.probes.get("fused", {}) if e else {}
        parent = next((by_number[n] for n in p.parents if n in by_number and by_number[n].spec), None)
        good = (t.objective - low) / ((high - low) or 1.0) if t.objective is not None else 0.0
        out.append({
            "trial": t, "rank": rank if t.objective is not None else None, "winner": t is best, "fused": fused,
            "chips": [(name, s.modality, t.spec.sources[name].block if name in t.spec.sources else "",
                       t.spec.sources[name].short() if name in t.spec.sources else "not used")
                      for name, s in card.sources.items()] if t.spec else [],
            "share": 100 * (1 - good if card.objective.direction == "minimize" else good),
            "reason": _cut(t.reason, room), "rationale": _cut(p.rationale, room), "designer": _cut(p.designer, 40),
            "usage": describe_usage(t.usage) if t.usage.get("requests") else "",
            "meta": [(_cut(k, 40), _cut(number(v, 4) if isinstance(v, float) else v, 200))
                     for k, v in list(p.meta.items())[:40] if k not in USAGE
                     and (isinstance(v, int | float) or (isinstance(v, str) and 0 < len(v) <= 200))][:8],
            "metrics": {_cut(k, 60): float(np.mean(v)) for k, v in list(e.metrics.items())[:12] if v} if e else {},
            "parent": parent.number if parent else None,
            "svg": Markup(draw_encoder(t.spec, card, e.cost.parameters_by_module if e else None,
                                       parent.spec if parent else None, style=False, tooltips=False))
            if t.spec else "",
            "curve": Markup(curves_plot({f"#{t.number}": e.curve}, {f"#{t.number}": "winner"}, "environment steps",
                                        height=230, links=False)) if e and e.curve else "",
            "probe_names": _probe_names(e) if e else [],
            "json": json.dumps(t.spec.to_dict()) if t.spec else "",
        })
    return out


def _decisions(outcome: Outcome) -> dict[str, Any]:
    """How much each decision mattered, with what that rests on."""
    done = sum(t.objective is not None for t in outcome.trials)
    found = decision_importance(outcome.trials)
    if found is None:
        return {"svg": "", "note": (f"{_plural(done, 'result')} are too few to tell which decisions mattered; "
                                    f"{ENOUGH} are needed." if done < ENOUGH else
                                    "The candidates do not differ enough to tell which decisions mattered.")}
    options = ", ".join(f"{_name_of(d)} {n}" for d, n in found.options.items())
    rest = max(0.0, 1 - sum(found.shares.values()))
    return {"svg": Markup(bars_plot({_name_of(d): v for d, v in found.shares.items()}, "importance of each decision")),
            "note": f"The rest, {rest:.0%}, lies in combinations of decisions. From {found.trials} results; options "
                    f"that were tried: {options}."
                    + (" With so few results the order may change." if found.trials < 50 else "")}


def _name_of(decision: str) -> str:
    return decision.removesuffix(".block")


def _foreseen(outcome: Outcome, best: Trial | None) -> dict[str, Any] | None:
    """What the designer expected beside what came out; None if it expected nothing."""
    found = predictions(outcome.trials)
    if found is None:
        return None
    places = _places(outcome.trials)
    n = len(found.points)
    text = (f"{_plural(n, 'prediction')}: off by {number(found.error, places)} on average; outcomes were "
            f"{number(abs(found.bias), places)} {'above' if found.bias >= 0 else 'below'} what was expected")
    if found.baseline is not None:
        text += f"; expecting the mean of the earlier outcomes would have been off by {number(found.baseline, places)}"
    if found.rank is not None:
        text += f". Rank correlation (Spearman) {number(found.rank, 2)}"
    metric = outcome.card.objective.metric.replace("_", " ")
    return {"text": text + ".", "svg": Markup(scatter_plot(found.points, f"expected {metric}", metric,
                                                           best.number if best else None))}


def _probe_names(e: Evaluation) -> list[str]:
    """Probes of an evaluation: the summary ones first, at most 24."""
    names = dict.fromkeys([*MEANING, *(n for values in e.probes.values() for n in values)])
    return [n for n in names if any(n in values for values in e.probes.values())][:24]


def _probes(outcome: Outcome, best: Trial | None) -> list[dict[str, Any]]:
    """A heat map of each probe that was made."""
    ranked = [t for t in outcome.ranked() if t.evaluation is not None and t.evaluation.probes]
    rows = {n: s.modality for n, s in outcome.card.sources.items()} | {"fused": "fused"}
    meaning = dict(MEANING)
    targets = len(outcome.card.state_names)
    if targets > 1:
        meaning["linear_probe"] += (f". Mean over the {targets} state variables: a block that reads one of them "
                                    f"perfectly and no other has {1 / targets:.2g}")
        meaning["linear_probe, best variable"] = "linear probe of the one state variable that the features tell best"
    out = []
    for probe, text in meaning.items():
        columns = [Column(t.number, f"#{t.number}", _probe_values(t.evaluation, probe), t is best)
                   for t in ranked if t.evaluation is not None]
        values = [v for c in columns for v in c.values.values() if math.isfinite(v)]
        if values:
            top = max(1.0, *values)
            out.append({"name": _probe_title(probe), "meaning": text, "top": number(top, 0 if top == 1 else 1),
                        "first": probe in TOLD or probe not in MEANING,
                        "svg": Markup(heat_map(columns, rows, f"{probe} by source and candidate", top))})
    return out


def _probe_title(probe: str) -> str:
    """``mi_return`` -> ``MI return``."""
    words = probe.replace("_", " ").split(" ")
    text = " ".join({"mi": "MI", "r2": "R²"}.get(w, w) for w in words)
    return text[:1].upper() + text[1:]


def _probe_values(e: Evaluation, probe: str) -> dict[str, float]:
    """A probe by source; ``linear_probe, best variable``: the highest of the single linear probes."""
    if probe in MEANING:
        return {n: v[probe] for n, v in e.probes.items() if probe in v}
    single = {n: [x for k, x in v.items() if k.startswith("linear_probe/")] for n, v in e.probes.items()}
    return {n: max(v) for n, v in single.items() if v}


def _designers(trials: Iterable[Trial]) -> list[tuple[str, int]]:
    return Counter(_cut(t.proposal.designer, 40) for t in trials).most_common(8)


def _tokens(outcome: Outcome) -> float | None:
    """All LLM tokens, None without an LLM."""
    return outcome.usage.get("tokens_in", 0) + outcome.usage.get("tokens_out", 0) if outcome.usage else None


def _seeds(outcome: Outcome) -> list[tuple[str, str]]:
    """Seeds of training and of the evaluation episodes, in words."""
    out = []
    searched = [t.evaluation for t in outcome.trials if t.evaluation]
    for name, group in (("search", searched), ("final runs", list(outcome.finals.values()))):
        training = sorted({e.seed for e in group})
        episodes = sorted({s for e in group for s in e.episode_seeds})
        if training:
            out.append((f"training, {name}", _ranges(training)))
        if episodes:
            out.append((f"episodes, {name}", _ranges(episodes)))
    return out


def _ranges(numbers: list[int]) -> str:
    """Sorted integers with runs joined: 1, 4–9; at most 12 runs."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    parts = [str(a) if a == b else f"{a}–{b}" for a, b in runs]
    return ", ".join(parts[:12]) + (f" and {len(parts) - 12} more" if len(parts) > 12 else "")


def _places(trials: Iterable[Trial]) -> int:
    """Decimals for the objective, by how much it spreads over the candidates."""
    values = [t.objective for t in trials if t.objective is not None]
    if len(values) < 2:
        return 3
    q1, q3 = np.percentile(values, [25, 75])
    return min(4, decimals(float(q3 - q1)) + 1)


def _yaml(data: Any) -> str:
    """Plain data as YAML, at most 60,000 characters."""
    plain = json.loads(json.dumps(data, default=str))
    return _cut(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100), 60_000) if plain else ""


def _cut(text: Any, room: int) -> str:
    """Text of at most about ``room`` characters, saying how much is left out."""
    text = clean(text)
    return text if len(text) <= room else f"{text[:room]} … [{len(text) - room:,} more characters in the study]"


def _a(noun: str) -> str:
    """The noun with its article."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def _plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _amount(value: Any) -> str:
    """A number of tokens, requests or dollars."""
    if not isinstance(value, int | float):
        return str(value)
    return number(value, 0 if value == int(value) else 4) if math.isfinite(value) else str(value)


def _soften(text: str) -> Markup:
    """Escapes a sentence and sets its intervals apart."""
    return Markup(_INTERVAL.sub(lambda m: f'<span class="ci">{m[0]}</span>', str(escape(text))))


def _sha256(script: str) -> str:
    """Hash of the page's script for its content security policy: no other script can run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(str(script).encode()).digest()).decode()
