"""LM-Searcher's prompt with a stock language model: the best of a pool."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lacer.envs import LacerError
from lacer.search.designers.base import fresh_sample, register_designer, unseen
from lacer.search.designers.evolution import Evolution
from lacer.search.designers.llm_base import LLMDesigner, Turn
from lacer.search.llm import LLMConfig
from lacer.search.llm.prompt import MAX_TOKENS, SETS, fill, tokens
from lacer.search.space import Point, SearchSpace
from lacer.search.study import Proposal, Study

ALPHABET = string.digits + string.ascii_letters


@register_designer
class LMSearcher(LLMDesigner):
    """a stock language model with LM-Searcher's prompt picks the best of ten candidates, for any search space

    LM-Searcher (2509.05657): architectures are NCodes; after ``start`` random trials every trial draws a pool, half at
    random, half by evolution (appendix C), and the model, shown the best ``history`` trials with min-max normalised
    scores, names the best candidate. The paper fine-tunes its model for that task: with a stock model this is a
    variant, not LM-Searcher.

    Deviations: a code has one character per decision out of 62 instead of ten digits (dotted numbers for spaces with
    more options), and "_" where a decision is not asked; the worst of the history is left out where the prompt would
    become too long.

    Args:
        seed, llm, run_dir, batch, prompts: see :class:`LLMDesigner`.
        start: random trials first.
        pool: candidates to choose from.
        history: trials to show at most, the best ones.

    Raises:
        LacerError: for numbers out of range, and as :class:`LLMDesigner` does.
    """

    name: ClassVar[str] = "lm-searcher"
    paper: ClassVar[str] = "prompt of LM-Searcher, 2509.05657"
    any_space: ClassVar[bool] = True

    def __init__(self, seed: int = 0, *, llm: LLMConfig, run_dir: Path | None = None, batch: int = 1,
                 prompts: str = SETS[0], start: int = 5, pool: int = 10, history: int = 200) -> None:
        super().__init__(seed, llm=llm, run_dir=run_dir, batch=batch, prompts=prompts)
        if start < 1 or pool < 2 or history < 1:
            raise LacerError(f"start={start} and history={history} must be at least 1, pool={pool} at least 2")
        self.start, self.pool, self.history = start, pool, history

    def design(self, turn: Turn, k: int) -> None:
        study = turn.study
        own = sum(t.status != "rejected" and t.proposal.designer != "expert" for t in study.trials)
        rng = np.random.default_rng([self.seed, 1, len(study)])
        if own < self.start or not study.finished:
            turn.accept(fresh_sample(study, [], rng), "random start", source="random")
            return
        drawn = self.candidates(study, rng)
        codes = {compact(study.space, p.point or {}): p for p in drawn}

        def member(data: dict[str, Any]) -> dict[str, Any]:
            code = data["best"].strip() if isinstance(data["best"], str) else data["best"]
            if not isinstance(code, str) or code not in codes:
                raise LacerError(f'"best" must be one of the {len(codes)} candidates as it stands there, not '
                                 f"{str(code)[:100]!r}")
            return {"best": code}

        prompt = self.prompt(study, list(codes))
        chosen = turn.fields("rank", prompt, {"best": {"enum": list(codes)}}, member)["best"]
        p = codes[chosen]
        assert p.point is not None
        turn.accept(p.point, f"the model's choice among {len(codes)} candidates; {p.rationale}", p.parents,
                    source=p.designer, pool=list(codes))

    def candidates(self, study: Study, rng: np.random.Generator) -> list[Proposal]:
        """The pool: half by evolution, the rest at random; all new and different, where the space has as many."""
        out: list[Proposal] = []
        for p in Evolution(self.seed).propose(study, self.pool // 2):
            if p.point is not None and unseen(study, out, p.point):
                out.append(p)
        while len(out) < self.pool:
            point = fresh_sample(study, out, rng)
            if not unseen(study, out, point):  # there are no more
                break
            out.append(Proposal(point, "random", "drawn at random"))
        order = rng.permutation(len(out))  # a place in the list tells nothing
        return [out[i] for i in order]

    def prompt(self, study: Study, pool: list[str]) -> str:
        """The prompt, with as much of the history as fits."""
        shown = scores(study)[:self.history]
        while True:
            text = fill("lm_searcher", self.prompts, pool=pool,
                        history=[(compact(study.space, p), s) for p, s in shown])
            used = tokens(text)
            if used <= MAX_TOKENS or len(shown) <= 1:
                return text
            shown = shown[:max(1, min(len(shown) - 1, len(shown) * MAX_TOKENS // used))]


def scores(study: Study) -> list[tuple[Point, float]]:
    """Points with min-max normalised scores (1 is best), the best first; a repeated one by its best score."""
    sign = study.objective.signed
    best: dict[str, tuple[Point, float]] = {}
    for t in study.finished:
        value = sign(t.objective or 0.0)
        if t.proposal.point is not None and (t.ncode not in best or value > best[t.ncode][1]):
            best[t.ncode] = (t.proposal.point, value)
    order = sorted(best.values(), key=lambda x: -x[1])
    low, high = (order[-1][1], order[0][1]) if order else (0.0, 0.0)
    return [(p, (v - low) / (high - low) if high > low else 1.0) for p, v in order]


def compact(space: SearchSpace, point: Point) -> str:
    """NCode with one character per decision, where no decision has more than 62 options."""
    code = space.to_ncode(point)
    if max(len(d.options) for d in space.decisions) > len(ALPHABET):
        return code
    return "".join(c if c == "_" else ALPHABET[int(c)] for c in code.split("."))
