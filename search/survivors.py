"""Further training seeds for the encoders that survived a search."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

from lacer.search.designers.base import Designer
from lacer.search.study import Proposal, Study


class Seeds(Designer):
    """Proposes some trials' encoders again until each has so many further trials, failed ones included.

    Args:
        trials: their numbers.
        each: further trials.
    """

    name: ClassVar[str] = "survivors"

    def __init__(self, trials: list[int], each: int) -> None:
        super().__init__()
        self.trials, self.each = trials, each

    def _missing(self, study: Study) -> list[int]:
        have = Counter(t.survivor for t in study.trials)
        return [n for i in range(self.each) for n in self.trials if have[n] <= i]

    def left(self, study: Study) -> int:
        """How many are missing."""
        return len(self._missing(study))

    def propose(self, study: Study, n: int) -> list[Proposal]:
        return [Proposal(study[number].proposal.point, self.name, f"a further training seed of #{number}",
                         meta={"survivor": number}) for number in self._missing(study)[:n]]
