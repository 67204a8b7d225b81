"""Probes of an encoder's representation: of every source's features and of the fused state.

Each probe is a function of a :class:`Sample`, registered with :func:`register_probe` in a file of this package; what
they mean, and what to be careful about, is in docs/probes.md.
"""

from __future__ import annotations

from lacer.agents.probes.base import (
    FUSED,
    Layer,
    Probe,
    Sample,
    chosen,
    list_probes,
    measure,
    register_probe,
)

__all__ = ["FUSED", "MEANING", "TOLD", "Layer", "Probe", "Sample", "chosen", "list_probes", "measure",
           "register_probe"]

MEANING = {p.name: p.meaning for p in list_probes().values()}
"""Each probe in one line; reports and prompts share it."""
TOLD = tuple(p.name for p in list_probes().values() if p.told)
"""Probes that language models are told of."""
