"""What a search found, gathered from the study for tables, reports and trackers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lacer.agents import Evaluation
from lacer.envs import TaskCard
from lacer.search.study import Trial, score_of

NOOP, EXPERT, WINNER = "do nothing", "expert", "winner"


@dataclass(frozen=True)
class Outcome:
    """One search, finished or not.

    Attributes:
        card: the task.
        trials: every proposal, by number.
        finals: evaluations on seeds that took no part in the search, by name (``do nothing``, ``expert``, ``winner``),
            the trained ones with the final number of steps.
        winner: number of the best trial, None if none finished.
        config: the search's configuration as plain data (no secrets).
        versions: versions of the packages.
        command: the command line that repeats the search.
        seconds: wall time so far.
        usage: what the LLM took, as :attr:`Trial.usage` names it, summed by :func:`total_usage`, and the rates of
            SPARK's edits; empty without an LLM.
        prompts: what a language model was asked for a trial and what it replied, by the trial's number: pairs of a
            title (step and role) and a text.
    """

    card: TaskCard
    trials: tuple[Trial, ...]
    finals: Mapping[str, Evaluation]
    winner: int | None
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    command: str
    seconds: float
    usage: Mapping[str, float] = field(default_factory=dict)
    prompts: Mapping[int, tuple[tuple[str, str], ...]] = field(default_factory=dict)

    def ranked(self) -> list[Trial]:
        """Trials, the winner first, then the best; those without a result last, by number."""
        sign = self.card.objective.signed
        return sorted(self.trials, key=lambda t: (
            t.number != self.winner, t.objective is None, -sign(t.objective or 0.0), t.number))

    def figures(self) -> dict[str, Any]:
        """The result as plain data, for scripts. Scores of ``winner`` chose it; those of ``finals`` did not."""
        winner = next((t for t in self.trials if t.number == self.winner), None)
        counts = Counter(t.status for t in self.trials)
        return {
            "env": self.card.env_id, "metric": self.card.objective.metric, "unit": self.card.objective.unit,
            "direction": self.card.objective.direction,
            "winner": None if winner is None else {
                "number": winner.number, "designer": winner.proposal.designer,
                "objective": score_of(winner, self.trials),
                "encoder": winner.spec.to_dict() if winner.spec else None},
            "finals": {n: {"status": e.status, "objective": e.objective, "reason": e.reason,
                           "episodes": e.metrics.get(self.card.objective.metric, [])} for n, e in self.finals.items()},
            "candidates": {s: counts[s] for s in ("ok", "failed", "pruned", "rejected", "running")},
            "env_steps": sum(t.env_steps for t in self.trials), "seconds": self.seconds, "usage": dict(self.usage)}


def total_usage(trials: Iterable[Trial]) -> dict[str, float]:
    """What a language model took for some trials, rejected ones included; empty if it was never asked."""
    total: dict[str, float] = {}
    for t in trials:
        for key, value in t.usage.items():
            total[key] = total.get(key, 0.0) + value
    return total if total.get("requests") else {}


def describe_usage(usage: Mapping[str, float]) -> str:
    """``12 requests, 51,200 tokens in, 9,310 out, 41 s, 0.41 US dollars``."""
    n = usage.get("requests", 0)
    cost = usage.get("cost")
    return (f"{n:,.0f} request{'' if n == 1 else 's'}, {usage.get('tokens_in', 0):,.0f} tokens in, "
            f"{usage.get('tokens_out', 0):,.0f} out, {usage.get('seconds', 0):,.0f} s"
            + ("" if cost is None else f", {dollars(cost)}"))


def dollars(cost: float) -> str:
    """``0.41 US dollars``; small sums in two significant digits."""
    return f"{cost:,.2f} US dollars" if cost >= 0.1 or not cost else f"{cost:.2g} US dollars"


def paired_difference(a: Evaluation, b: Evaluation, metric: str, seed: int = 0) -> tuple[float, float, float]:
    """Mean difference a - b of a metric over the same episode seeds, with a 95 % bootstrap interval (10,000 draws).

    Raises:
        ValueError: if the evaluations have different episode seeds.
    """
    if a.episode_seeds != b.episode_seeds:
        raise ValueError("the evaluations were made on different episodes")
    d = np.array(a.metrics[metric]) - np.array(b.metrics[metric])
    draws = d[np.random.default_rng(seed).integers(len(d), size=(10_000, len(d)))].mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(d.mean()), float(low), float(high)
