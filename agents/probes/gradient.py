"""Where the PPO loss pulls: the share of its gradient by part."""

from __future__ import annotations

from lacer.agents.probes.base import Sample, Values, register_probe


@register_probe("gradient_share", "share of the norm of the PPO loss's gradient in this source's parameters (fused: in "
                "the fusion's); all shares add up to 1; near 0: the source learns nothing, from the start or any more",
                needs=("gradient",))
def _share(sample: Sample) -> Values:
    total = sum(sample.gradient.values())
    return {p: {"": g / total} for p, g in sample.gradient.items()} if total > 0 else {}
