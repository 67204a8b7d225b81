"""Random search."""

from __future__ import annotations

from typing import ClassVar

from lacer.search.designers.base import Designer, fresh_sample, register_designer
from lacer.search.study import Proposal, Study


@register_designer
class RandomSearch(Designer):
    """random encoders without repeats; the baseline that every other designer must beat"""

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "Li & Talwalkar 2019"

    def propose(self, study: Study, n: int) -> list[Proposal]:
        rng = self.rng(study)
        out: list[Proposal] = []
        for _ in range(n):
            out.append(Proposal(fresh_sample(study, out, rng), self.name))
        return out
