"""Designers that train on the environment by themselves before they propose."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

from lacer.envs import LacerError
from lacer.search.designers.base import Designer, fresh_sample, unseen
from lacer.search.designers.random_search import RandomSearch
from lacer.search.study import Proposal, Study
from lacer.search.trainer import Trainer

RANKED = 50
"""Encoders that a training names, best first."""


class TrainingDesigner(Designer):
    """Trains once, then proposes the encoders that the training found, best first, each trained from scratch.

    When these are used up it proposes random ones, under its own name. What it found (``meta["found"]``) and what it
    spent (``meta["env_steps"]``) stand in its first proposal, so a search resumes from the study; while it trains,
    ``designer.safetensors`` in the run folder is its checkpoint, from which a killed search goes on (the steps since
    then are done again, and count once). If the training fails, that is a rejected proposal with the reason, and
    ``random`` proposes from then on, also after a resume.

    Args:
        seed: seed of the training.
        trainer: where it trains; without one it cannot propose.
    """

    trains: ClassVar[bool] = True
    function: ClassVar[str]
    """``module:name`` of the training, see :class:`lacer.agents.Training`. It finds ``ranked``: pairs of NCode and a
    plain reason."""

    def __init__(self, seed: int = 0, *, trainer: Trainer | None = None) -> None:
        super().__init__(seed)
        self.trainer = trainer

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Its options, for the training."""

    def propose(self, study: Study, n: int) -> list[Proposal]:
        """Up to ``n`` proposals; the first call trains.

        Raises:
            LacerError: the space is not one of encoders, or there is no trainer.
        """
        space = study.encoders
        own = [t.proposal.meta for t in study.trials if t.proposal.designer == self.name]
        failed = next((m["failed"] for m in own if "failed" in m), None)
        found = next((m["found"] for m in own if "found" in m), None)
        first: dict[str, Any] = {}
        if failed is None and found is None:
            if self.trainer is None:
                raise LacerError(f"the designer {self.name!r} trains on an environment by itself and has none here; "
                                 "choose another one, e.g. evolution")
            e = self.trainer.train(self.function, {d.name: list(d.options) for d in space.decisions}, self.seed,
                                   self.options())
            spent = {"env_steps": e.cost.env_steps, "seconds": round(e.cost.total_seconds, 1)}
            if e.status != "ok":
                reason = f"its own training failed: {e.reason}"
                return [Proposal(None, self.name, rejected=reason, meta={**spent, "failed": e.reason}),
                        *self._instead(study, n, e.reason)]
            found, first = e.found, {**spent, "found": e.found, "curve": e.curve}
        if failed is not None:
            return self._instead(study, n, failed)
        assert found is not None
        out: list[Proposal] = []
        for code, why in found["ranked"]:
            if len(out) == n:
                break
            point = space.from_ncode(code)
            if unseen(study, out, point):
                out.append(Proposal(point, self.name, why))
        rng = self.rng(study)
        while len(out) < n:
            out.append(Proposal(fresh_sample(study, out, rng), self.name,
                                "random, as all encoders that the training named have been proposed"))
        return [replace(out[0], meta=first), *out[1:]] if first else out

    def _instead(self, study: Study, n: int, reason: str) -> list[Proposal]:
        return [replace(p, rationale=f"in place of {self.name}, whose own training failed: {reason[:300]}")
                for p in RandomSearch(self.seed).propose(study, n)]

    def close(self) -> None:
        """Ends its training."""
        if self.trainer is not None:
            self.trainer.close()
