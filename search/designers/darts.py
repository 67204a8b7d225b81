"""DARTS in the PPO loop."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lacer.agents import Evaluation
from lacer.envs import LacerError
from lacer.search.designers.base import register_designer
from lacer.search.designers.training import RANKED, TrainingDesigner
from lacer.search.space import EncoderSpace
from lacer.search.trainer import Trainer

if TYPE_CHECKING:
    from lacer.agents.training import Session
    from lacer.encoders import EncoderSpec
    from lacer.encoders.supernet import DartsSupernet


@register_designer
class Darts(TrainingDesigner):
    """RL-DARTS: one PPO run with a mixture of all blocks, then the encoders by their probability

    RL-DARTS (Miao et al. 2022, 2106.02229) of DARTS (Liu et al. 2019, 1806.09055): the supernet stands in place of
    the encoder, in rollouts too; alphas start at zero and are trained with the weights on PPO's loss ("joint"); the
    encoder of the largest alphas is then trained from scratch as a candidate.

    Deviations: the alphas belong to whole blocks with their options, one set per source and one for the fusion, instead
    of the edges of a cell, and "unused" is a choice like any other; a part with more configurations than ``choices``
    takes its default ones and some evenly spaced. PPO is configured as for candidates. The search may evaluate more
    than one encoder: the next most probable follow. ``bilevel`` trains the alphas on fresh rollouts, before the weights
    see them, by an Adam of their own (3e-4, betas 0.5 and 0.999, decay 1e-3; first order).

    Args:
        seed: seed of the training.
        trainer: where it trains.
        bilevel: see above.
        alpha_rate: learning rate of the alphas over that of PPO (joint) or over 3e-4 (bilevel).
        choices: blocks with their options that a source, or the fusion, may choose among; its cost grows with it.

    Raises:
        LacerError: for options out of range.
    """

    name: ClassVar[str] = "darts"
    paper: ClassVar[str] = "RL-DARTS, 2106.02229; DARTS, 1806.09055"
    function: ClassVar[str] = "lacer.search.designers.darts:train"

    def __init__(self, seed: int = 0, *, trainer: Trainer | None = None, bilevel: bool = False,
                 alpha_rate: float = 1.0, choices: int = 6) -> None:
        super().__init__(seed, trainer=trainer)
        if alpha_rate <= 0 or choices < 1:
            raise LacerError(f"darts: alpha_rate must be above 0, choices at least 1, not {alpha_rate} and {choices}")
        self.bilevel, self.alpha_rate, self.choices = bilevel, alpha_rate, choices

    def options(self) -> dict[str, Any]:
        """Its options, for the training."""
        return {"bilevel": self.bilevel, "alpha_rate": self.alpha_rate, "choices": self.choices}


def train(session: Session) -> Evaluation:
    """The training: finds ``alphas``, probabilities by part and option, and ``ranked`` encoders."""
    from lacer.agents.training import Alphas, SupernetPolicy, train_supernet
    from lacer.encoders.supernet import DartsSupernet, SupernetOptions

    job, o = session.job, session.job.options
    space = EncoderSpace(session.card, job.decisions)
    held = SupernetOptions.from_decisions(session.card, job.decisions)
    sources, fusions = held.candidates(session.card, session.table, per_part=o["choices"])
    p = job.protocol.ppo
    part = Alphas(3e-4 * o["alpha_rate"], p) if o["bilevel"] else None
    model = train_supernet(session, lambda: DartsSupernet(session.card, sources, fusions, session.table), part,
                           alpha_rate=0.0 if o["bilevel"] else o["alpha_rate"])
    assert isinstance(model.policy, SupernetPolicy)
    net = model.policy.supernet
    assert isinstance(net, DartsSupernet)
    ranked: dict[str, str] = {}
    for spec, probability in itertools.chain([(net.argmax_spec(), None)], by_probability(net, 10 * RANKED)):
        ranked.setdefault(space.to_ncode(space.from_spec(spec)), "the largest alphas" if probability is None else
                          f"probability {probability:.2g} by the alphas")
        if len(ranked) == RANKED:
            break
    alphas = {part: {name: round(q, 5) for name, q in options.items()} for part, options in net.probabilities().items()}
    curve = session.curve
    return session.result(curve[-1][1] if curve else None, {"alphas": alphas, "ranked": list(ranked.items())})


def by_probability(net: DartsSupernet, limit: int) -> Iterator[tuple[EncoderSpec, float]]:
    """The encoders of a supernet, the most probable first, each with the product of its options' probabilities."""
    from lacer.encoders import FUSION, EncoderSpec

    names = list(net.sources)
    parts: list[list[tuple[float, Any]]] = []
    choices: list[tuple[str, Sequence[Any]]] = [*net.sources.items(), (FUSION, net.fusions)]
    for name, options in choices:
        scored = zip(net.probability(name).log().tolist(), options, strict=True)
        parts.append(sorted(scored, key=lambda x: -x[0]))
    first = (0,) * len(parts)
    heap = [(-sum(p[0][0] for p in parts), first)]
    seen = {first}
    for _ in range(limit):  # the next best differs in one place from one that came before
        if not heap:
            return
        cost, at = heapq.heappop(heap)
        *chosen, (fusion, condition) = (p[i][1] for p, i in zip(parts, at, strict=True))
        used = {n: block for n, block in zip(names, chosen, strict=True) if block is not None}
        if used and (condition is None or condition in used):
            yield EncoderSpec(used, fusion, condition), math.exp(-cost)
        for k, i in enumerate(at):
            if i + 1 < len(parts[k]) and (following := (*at[:k], i + 1, *at[k + 1:])) not in seen:
                seen.add(following)
                heapq.heappush(heap, (cost + parts[k][i][0] - parts[k][i + 1][0], following))
