"""What the policy makes of a source: what changes when the source shows another moment's observation."""

from __future__ import annotations

import numpy as np

from lacer.agents.probes.base import Sample, Values, register_probe


def change(before: np.ndarray, after: np.ndarray) -> float:
    """Mean squared change over that between two unrelated rows, which is twice the variance. (N, D) each.

    Returns:
        About 0 to 1: 0: nothing changes; 1: nothing is left of what it was. 0 if ``before`` does not vary.
    """
    unrelated = 2 * before.var(0).sum()
    if unrelated <= 1e-12 * max(1.0, float(np.abs(before).max())) ** 2:
        return 0.0
    return float(((after - before) ** 2).sum(1).mean() / unrelated)


@register_probe("permuted_action", "how much the greedy action changes when this source shows another moment (0: the "
                "policy ignores it, 1: it follows nothing else); 0: leave it out or give it a stronger block",
                needs=("permuted",), told=True)
def _action(sample: Sample) -> Values:
    return {n: {"": a} for n, (a, _) in sample.permuted.items()}


@register_probe("permuted_value", "how much the critic's value changes when this source shows another moment (0: the "
                "critic ignores it, 1: it follows nothing else); read beside permuted_action", needs=("permuted",))
def _value(sample: Sample) -> Values:
    return {n: {"": v} for n, (_, v) in sample.permuted.items()}


@register_probe("permuted_return", "mean return that is lost when this source shows other moments throughout "
                "(protocol.permuted_episodes); 0 or less: the policy does as well without it",
                needs=("permuted_return",))
def _return(sample: Sample) -> Values:
    return {n: {"": v} for n, v in sample.permuted_return.items()}
