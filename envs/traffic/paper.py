"""The motorway with the three sources and the objective of LACER (arXiv 2512.06982, main experiment)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from gymnasium import spaces

from lacer.envs.traffic.mixed import MixedTrafficEnv

SOURCES = {"time": "history", "traffic": "traffic", "sequence": "sequence"}
"""The paper's names and :class:`MixedTrafficEnv`'s."""


class MixedTrafficPaperEnv(MixedTrafficEnv):
    """:class:`MixedTrafficEnv` reduced to what the paper names: sources ``time`` (how speed, density and flow evolved),
    ``traffic`` (density, speed, its spread and CAV share by lane now) and ``sequence`` (the vehicles in order); the
    reward is average speed alone, the objective too; 90 % of the vehicles are CAVs.

    What the paper does not say is ours: the road, the demand, incidents, the action. All three sources tell lanes in
    every episode, and no orders are given, since nothing would show them.

    Args:
        **kwargs: of :class:`MixedTrafficEnv`; ``news``, ``order_weights``, ``order_weight`` and ``safety_weight`` are
            fixed.

    Raises:
        LacerError: as :class:`MixedTrafficEnv`.
    """

    def __init__(self, scene: Any = "full", **kwargs: Any) -> None:
        super().__init__(scene, news={"+".join(SOURCES.values()): 1.0}, order_weights=(1, 0, 0, 0), order_weight=0.0,
                         safety_weight=0.0, **kwargs)
        card = self.task_card
        sources = {new: dataclasses.replace(card.sources[old], name=new) for new, old in SOURCES.items()}
        self.task_card = dataclasses.replace(
            card, env_id="lacer/MixedTrafficPaper-v0", sources=sources,
            description=card.description + " Here traffic detectors, their history and the list of vehicles show the "
                                           "lane in every episode, and there is neither text nor camera.")
        self.observation_space: spaces.Dict = self.task_card.observation_space

    def _observe(self) -> dict[str, np.ndarray]:
        seen = super()._observe()
        return {new: seen[old] for new, old in SOURCES.items()}
