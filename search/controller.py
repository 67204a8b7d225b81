"""A recurrent controller that draws points of a search space and learns from rewards (ENAS)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lacer.search.space import Point, SearchSpace

WIDTH = 64
DECAY = 0.99
ENTROPY = 1e-4
LEARNING_RATE = 0.0035
START = 0.1
"""Weights start uniformly between -0.1 and 0.1, as in ENAS, so that all options are about equally likely."""


@dataclass(frozen=True)
class Sample:
    """A point that was drawn, with the logarithm of its probability and the entropy of the decisions on the way."""

    point: Point
    log_probability: Tensor
    entropy: Tensor


class Controller(nn.Module):
    """ENAS's controller (Pham et al. 2018, 1802.03268, section 2 and 3): an LSTM of one layer and 64 units that makes
    one decision after the other, each from the options chosen before; learns by REINFORCE with a moving average of the
    rewards (decay 0.99) as the baseline, an entropy bonus of 1e-4, and Adam at 0.0035.

    Works for any space: decisions that are not asked are passed over, options that the decisions before rule out have
    no probability, and points that break a constraint are drawn again.

    Here rewards are divided by the moving average of their distance from the baseline, so that their scale does not
    matter.

    Args:
        space: the space.
    """

    baseline: Tensor
    spread: Tensor

    def __init__(self, space: SearchSpace) -> None:
        super().__init__()
        self.space = space
        self.lstm = nn.LSTMCell(WIDTH, WIDTH)
        self.start = nn.Parameter(torch.zeros(1, WIDTH))
        self.embed = nn.ModuleList(nn.Embedding(len(d.options), WIDTH) for d in space.decisions)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, len(d.options)) for d in space.decisions)
        for p in self.parameters():
            nn.init.uniform_(p, -START, START)
        self.register_buffer("baseline", torch.tensor(float("nan")))
        self.register_buffer("spread", torch.tensor(0.0))
        self.optimizer = torch.optim.Adam(self.parameters(), lr=LEARNING_RATE)

    def sample(self, tries: int = 1000) -> Sample:
        """A point, drawn with torch's random numbers."""
        for _ in range(tries):
            sample = self._walk(None)
            if self.space.allowed(sample.point):
                return sample
        raise ValueError(f"none of {tries} points drawn is allowed in this search space")

    def log_probability(self, point: Mapping[str, object]) -> float:
        """The logarithm of a point's probability (before points that break a constraint are drawn again)."""
        with torch.no_grad():
            return float(self._walk(dict(point)).log_probability)

    def _walk(self, given: Point | None) -> Sample:
        point: Point = {}
        x: Tensor = self.start
        state = None
        log_p = entropy = torch.zeros(())
        for d, embed, head in zip(self.space.decisions, self.embed, self.heads, strict=True):
            if not self.space.is_active(d, point):
                continue
            state = self.lstm(x, state)
            logits = head(state[0]).squeeze(0)
            allowed = self.space.options(d, point)
            if len(allowed) < len(d.options):
                ruled_out = torch.tensor([o not in allowed for o in d.options])
                logits = logits.masked_fill(ruled_out, -1e9)
            log_ps = logits.log_softmax(0)
            i = int(torch.multinomial(log_ps.detach().exp(), 1)) if given is None else d.index(given[d.name])
            point[d.name] = d.options[i]
            log_p = log_p + log_ps[i]
            entropy = entropy - (log_ps.exp() * log_ps).sum()
            x = embed.weight[i:i + 1]  # type: ignore[index]
        return Sample(point, log_p, entropy)

    def learn(self, sample: Sample, reward: float) -> None:
        """One step of REINFORCE. A reward that is not finite is passed over."""
        if not torch.isfinite(torch.tensor(reward)):
            return
        if self.baseline.isnan():
            self.baseline.fill_(reward)
        error = reward - float(self.baseline)
        self.baseline.mul_(DECAY).add_((1 - DECAY) * reward)
        if error == 0.0:
            return
        self.spread.copy_(torch.tensor(abs(error)) if not self.spread else DECAY * self.spread
                          + (1 - DECAY) * abs(error))
        loss = -error / float(self.spread) * sample.log_probability - ENTROPY * sample.entropy
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
