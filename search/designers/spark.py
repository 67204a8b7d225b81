"""SPARK: edits that are confined to one factor of the encoder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from lacer.encoders import FUSION
from lacer.envs import LacerError, did_you_mean
from lacer.search.designers.base import register_designer
from lacer.search.designers.llm_base import LLMDesigner, NoAnswer, Turn, Wrong, text_field
from lacer.search.llm import LLMConfig
from lacer.search.llm import facts as tell
from lacer.search.llm.prompt import SETS, render
from lacer.search.llm.words import name as word
from lacer.search.llm.words import num
from lacer.search.space import CONDITION, UNUSED, EncoderSpace, Point
from lacer.search.study import Study, Trial

OPERATOR, WIRING = "operator", "wiring"
STAGNATION, FAILURES = 3, 10
"""Evaluations over which stagnation is told, and proposals over which errors are (2605.04057)."""
FALLBACK_DIRECTIVE = "Change one field or block of this factor to what the encoders tried so far leave open."


@register_designer
class Spark(LLMDesigner):
    """a language model picks a factor of the best encoder, writes a directive for it, and edits only that factor

    SPARK (2605.04057): a router chooses the functional factor to change from the history, a second call writes a
    directive for that factor (seeing stagnation over the last 3 evaluations and errors over the last 10 proposals), a
    third one edits. An edit is accepted only if everything that it changes lies within the factor; after 3 further
    tries a fallback factor is edited. :func:`rates` tells the valid rate and the entanglement rate.

    A factor is one module, a source's encoder or the fusion, and either what it is made of (``SOURCE.operator``: block
    and fields; ``fusion.operator``: fields) or how it is wired (``SOURCE.wiring``: used or left out; ``fusion.wiring``:
    how the sources are joined, i.e. the fusion block with its fields, and which source conditions it).

    Deviations: what is edited is the encoder's JSON instead of code, and always the best encoder so far; the fallback
    factor is the one that was edited least, under a general directive.

    Args:
        seed, llm, run_dir, batch, prompts: see :class:`LLMDesigner`.
        retries: further tries of an edit.

    Raises:
        LacerError: for negative retries, and as :class:`LLMDesigner` does.
    """

    name: ClassVar[str] = "spark"
    requests: ClassVar[int] = 3
    paper: ClassVar[str] = "SPARK, 2605.04057"

    def __init__(self, seed: int = 0, *, llm: LLMConfig, run_dir: Path | None = None, batch: int = 1,
                 prompts: str = SETS[0], retries: int = 3) -> None:
        super().__init__(seed, llm=llm, run_dir=run_dir, batch=batch, prompts=prompts)
        if retries < 0:
            raise LacerError(f"retries must be at least 0, not {retries}")
        self.retries = retries

    def design(self, turn: Turn, k: int) -> None:
        study = turn.study
        order = tell.ranked(study)
        base = order[0] if order else next((t for t in study.trials if t.proposal.point is not None), None)
        if base is None or base.proposal.point is None:
            raise NoAnswer("there is no encoder yet that could be edited")
        factors = self._factors(study, base)
        about = {f["name"]: f for f in factors}
        told: dict[str, Any] = {
            "prompts": self.prompts, "feedback": ("expert", "probes", "reward", "noise"),
            "errors": errors(study, self.name), "window": FAILURES, "stagnation": stagnation(study)}
        base_facts = tell.facts(base, study) if base.objective is not None else None

        def route(data: dict[str, Any]) -> dict[str, Any]:
            factor = data["factor"]
            if factor not in about:
                raise LacerError(f'"factor" must be one of the names listed, not {str(factor)[:80]!r}'
                                 f"{did_you_mean(str(factor)[:80], about)}")
            return {"factor": factor, "reason": text_field(data, "reason")}

        routed = turn.fields(
            "router", render("router", study, base=base_facts, trial=base, factors=factors,
                             past=tell.memory(study, FAILURES, (self.name,)), **told),
            {"reason": {"type": "string"}, "factor": {"enum": list(about)}}, route)
        factor = routed["factor"]
        turn.notes |= {"factor": factor, "problem": routed["reason"], "edits": base.number}
        directive = turn.fields(
            "directive", render("directive", study, base=base_facts, trial=base, factor=about[factor],
                                space=tell.space(study, (factor.rsplit(".", 1)[0],)), reason=routed["reason"],
                                past=[m for m in tell.memory(study, len(study), (self.name,))
                                      if m["t"].proposal.meta.get("factor") == factor][-FAILURES:], **told),
            {"directive": {"type": "string"}}, lambda data: {"directive": text_field(data, "directive")})["directive"]
        try:
            self._edit(turn, base, about[factor], directive, told)
        except NoAnswer:
            others = sorted((f for f in factors if f["name"] != factor), key=lambda f: f["tried"])
            if not others:
                raise
            turn.notes |= {"factor": others[0]["name"], "fallback_from": factor}
            self._edit(turn, base, others[0], FALLBACK_DIRECTIVE, told)

    def _edit(self, turn: Turn, base: Trial, factor: dict[str, Any], directive: str, told: dict[str, Any]) -> None:
        study, before = turn.study, base.proposal.point
        assert before is not None
        turn.notes |= {"suggestions": [directive]}

        def scope(point: Point) -> Wrong | None:
            outside = sorted(factors_changed(study.encoders, before, point) - {factor["name"]})
            if not outside:
                return None
            return Wrong(f"the edit changes {', '.join(outside)}, outside the factor {factor['name']}; leave that as "
                         f"it is in #{base.number}", {"fault": "entangled", "outside": outside})

        ask = ("rationale",)  # the editor does not see scores
        prompt = render("edit", study, factor=factor, directive=directive, ask=ask, base=base,
                        tried=self._tried(study, base, factor["name"]), example=tell.example(study, base),
                        space=tell.space(study, (factor["name"].rsplit(".", 1)[0],)), **told)
        turn.encoders(prompt, ask=ask, step="edit", check=scope, parents=[base.number], tries=1 + self.retries)

    def _factors(self, study: Study, base: Trial) -> list[dict[str, Any]]:
        """The factors of an encoder that can be changed, with how often each was edited."""
        space, point = study.encoders, base.proposal.point
        assert point is not None
        assert base.spec is not None
        tried = Counter(t.proposal.meta.get("factor") for t in study.trials if t.status != "rejected")
        out = []
        for name, about in factors_of(space, point).items():
            part, kind = name.rsplit(".", 1)
            block = base.spec.fusion if part == FUSION else base.spec.sources.get(part)
            now = "left out" if block is None else "used" if kind == WIRING and part != FUSION else block.short()
            if part == FUSION and kind == WIRING and base.spec.condition is not None:
                now += f" by {word(base.spec.condition)}"
            out.append({"name": name, "about": about, "now": now, "tried": tried[name]})
        return out

    def _tried(self, study: Study, base: Trial, factor: str) -> list[dict[str, Any]]:
        """Encoders that differ from the base in this factor alone, so the edit must not give them again."""
        space, before, sources = study.encoders, base.proposal.point, list(study.card.sources)
        assert before is not None
        assert base.spec is not None
        return [{"t": t, "text": tell.difference(base.spec, t.spec, sources), "outcome": tell.outcome(t, study)}
                for t in study.trials if t.proposal.point is not None and t.spec is not None
                and factors_changed(space, before, t.proposal.point) == {factor}][-40:]


def factors_of(space: EncoderSpace, point: Mapping[str, Any]) -> dict[str, str]:
    """The factors of an encoder that have more than one option, with what they are, in words."""
    out: dict[str, str] = {}
    for source in space.card.sources:
        d = space.by_name[f"{source}.block"]
        used = point[d.name] != UNUSED
        fields = [x for x in space.decisions if x.name.startswith(f"{source}.") and x is not d and x.name in point]
        blocks = [o for o in d.options if o != UNUSED]
        if used and (len(blocks) > 1 or any(len(x.options) > 1 for x in fields)):
            out[f"{source}.{OPERATOR}"] = f"block and fields of the source {word(source)}"
        alone = used and sum(point[f"{s}.block"] != UNUSED for s in space.card.sources) == 1
        if UNUSED in d.options and blocks and not alone:
            out[f"{source}.{WIRING}"] = f"whether the source {word(source)} is used" + (
                "" if used else " (an edit that uses it chooses its block and fields)")
    fusion = space.by_name[f"{FUSION}.block"]
    if any(len(d.options) > 1 for d in space.fields(FUSION, str(point[fusion.name])).values() if d.name in point):
        out[f"{FUSION}.{OPERATOR}"] = "fields of the fusion block, which itself stays"
    used_sources = sum(point[f"{s}.block"] != UNUSED for s in space.card.sources)
    if len(fusion.options) > 1 or (CONDITION in point and used_sources > 1):
        out[f"{FUSION}.{WIRING}"] = "how the sources are joined: the fusion block with its fields" + (
            ", and the source that conditions it" if CONDITION in space.by_name else "")
    return out


def factors_changed(space: EncoderSpace, before: Mapping[str, Any], after: Mapping[str, Any]) -> frozenset[str]:
    """The factors in which two encoders differ.

    A source that is newly used brings its block and fields along, and so does a new fusion block: that is a change of
    the wiring alone. Where the conditioning source is left out, the fusion has to be conditioned on another one; that
    is no change of the fusion.
    """
    out = set()
    for part in [*space.card.sources, FUSION]:
        key = f"{part}.block"
        rewired = before[key] != after[key] if part == FUSION else (before[key] == UNUSED) != (after[key] == UNUSED)
        if rewired:
            out.add(f"{part}.{WIRING}")
        elif any(before.get(d.name) != after.get(d.name) for d in space.decisions if d.name.startswith(f"{part}.")):
            out.add(f"{part}.{OPERATOR}")
    old, new = before.get(CONDITION), after.get(CONDITION)
    if old is not None and new is not None and old != new and after[f"{old}.block"] != UNUSED:
        out.add(f"{FUSION}.{WIRING}")
    return frozenset(out)


def stagnation(study: Study) -> str:
    """In words, how the last evaluations compare with the best before them."""
    finished = study.finished
    sign = study.objective.signed
    recent, before = finished[-STAGNATION:], finished[:-STAGNATION]
    if not before:
        return f"fewer than {STAGNATION + 1} evaluations, too few to tell."
    old = max(sign(t.objective or 0.0) for t in before)
    gain = max(sign(t.objective or 0.0) for t in recent) - old
    return (f"the last {STAGNATION} evaluations improved the best by {num(gain)}." if gain > 0 else
            f"none of the last {STAGNATION} evaluations beat the best before them (short of it by {num(-gain)}).")


def errors(study: Study, designer: str) -> list[tuple[str, int]]:
    """Kinds of failure among the last proposals of a designer, with their numbers."""
    last = [t for t in study.trials if t.proposal.designer == designer][-FAILURES:]
    kinds = Counter(str(t.proposal.meta.get("fault") or "limits") if t.status == "rejected" else "training"
                    for t in last if t.status in ("rejected", "failed", "pruned"))
    return kinds.most_common()


def rates(study: Study) -> dict[str, float]:
    """SPARK's two rates, over all proposals of encoders by its edits (2605.04057).

    Returns:
        ``valid_rate``: share of proposals that pass all checks; ``entanglement_rate``: share of edits, i.e. proposals
        that are encoders at all, that change something outside the chosen factor; ``edits``: number of proposals.
        Empty without any.
    """
    own = [t for t in study.trials if t.proposal.designer == Spark.name and "suggestions" in t.proposal.meta]
    if not own:
        return {}
    faults = [t.proposal.meta.get("fault") or ("limits" if t.status == "rejected" else "") for t in own]
    encoders = [f for f in faults if f != "invalid"]
    return {"valid_rate": faults.count("") / len(own),
            "entanglement_rate": encoders.count("entangled") / len(encoders) if encoders else 0.0, "edits": len(own)}
