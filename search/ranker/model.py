"""The network: a Gaussian process whose kernel is read off the history, and a Transformer that corrects it.

Nothing in it belongs to a particular decision or option: decisions and options enter by what the history tells about
them alone, so renaming or reordering either changes nothing. Of a history and candidates (:class:`Batch`) it makes a
mixture of normal distributions for the score of every candidate, on the scale of the history's normal scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lacer.search.ranker.histories import Batch

NONE = -3.0
"""Stands for the best score among no encoders."""


@dataclass(frozen=True)
class Size:
    """Size of the network.

    Attributes:
        width: of an encoder's token.
        layers, heads: of the Transformer.
        cell: width of what is known of one decision of one encoder.
        parts: normal distributions in a mixture.
    """

    width: int = 96
    layers: int = 5
    heads: int = 4
    cell: int = 32
    parts: int = 4


@dataclass
class Prediction:
    """Scores of the candidates.

    Attributes:
        weight, mean, deviation: (B, q, parts) of the mixtures.
        top: (B, q) logits of being the best of the candidates.
        plain_mean, plain_deviation: (B, q) of the Gaussian process alone.
    """

    weight: Tensor
    mean: Tensor
    deviation: Tensor
    top: Tensor
    plain_mean: Tensor
    plain_deviation: Tensor

    def log_density(self, target: Tensor) -> Tensor:
        """(B, q): log density of a score under the mixture."""
        u = (target[..., None] - self.mean) / self.deviation
        return torch.logsumexp(torch.log(self.weight + 1e-9) - torch.log(self.deviation) - 0.5 * u * u, -1) \
            - 0.5 * math.log(2 * math.pi)

    def expected(self) -> Tensor:
        """(B, q): means of the mixtures."""
        return (self.weight * self.mean).sum(-1)

    def spread(self) -> Tensor:
        """(B, q): standard deviations of the mixtures."""
        m = self.expected()[..., None]
        return (self.weight * (self.deviation ** 2 + (self.mean - m) ** 2)).sum(-1).sqrt()

    def below(self, at: Tensor) -> Tensor:
        """(B, q): probability of a score below ``at``, (B, q) or a scalar."""
        u = (at[..., None] - self.mean) / self.deviation
        return (self.weight * torch.special.ndtr(u)).sum(-1)

    def improvement(self, best: Tensor) -> Tensor:
        """(B, q): expected improvement over ``best``, (B, 1)."""
        u = (self.mean - best[..., None]) / self.deviation
        density = torch.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)
        return (self.weight * self.deviation * (u * torch.special.ndtr(u) + density)).sum(-1)


def _perceptron(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b), nn.GELU(approximate="tanh")]
    return nn.Sequential(*layers[:-1])


class Layer(nn.Module):
    """Every encoder attends to those of the history."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        w = size.width
        self.heads = size.heads
        self.before, self.between = nn.LayerNorm(w), nn.LayerNorm(w)
        self.query, self.pair, self.out = nn.Linear(w, w), nn.Linear(w, 2 * w), nn.Linear(w, w)
        self.mix = nn.Sequential(nn.Linear(w, 3 * w), nn.GELU(approximate="tanh"), nn.Linear(3 * w, w))

    def forward(self, x: Tensor, bias: Tensor, n: int) -> Tensor:
        b, t, w = x.shape
        h = self.before(x)
        q = self.query(h).view(b, t, self.heads, -1).transpose(1, 2)
        k, v = self.pair(h[:, :n]).view(b, n, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, w))
        return x + self.mix(self.between(x))


class Ranker(nn.Module):
    """The whole network.

    Args:
        size: its size.
    """

    def __init__(self, size: Size | None = None) -> None:
        super().__init__()
        self.size = size = size or Size()
        c, w = size.cell, size.width
        self.channel_cell = _perceptron(4, 16, 8)
        self.channel_entry = _perceptron(4, 16, 8)
        self.decision = _perceptron(8, c, c)
        self.decision_again = _perceptron(2 * c, c, c)
        self.summary = _perceptron(c + 6, c, c)
        self.weights = nn.Linear(c, 3)  # of the kernel: product, sum; and of the pool over decisions
        self.kernel = nn.Linear(c, 5)  # three amplitudes, noise, scale of the histogram
        self.cells = _perceptron(8 + 8 + c, c, c)
        self.entry = nn.Linear(c + c + 8 + 6, w)
        self.gates = nn.Linear(c, size.layers * size.heads)
        self.near = nn.Parameter(torch.zeros(size.layers * size.heads, 2))
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.last = nn.LayerNorm(w)
        self.head = _perceptron(w + 3, w, 3 * size.parts + 1)
        with torch.no_grad():
            for layer in (self.weights, self.kernel, self.gates, self.head[-1]):
                layer.weight.mul_(0.1)  # type: ignore[union-attr, operator]
                layer.bias.zero_()  # type: ignore[union-attr, operator]

    def forward(self, batch: Batch) -> Prediction:
        n, z = batch.history, batch.z
        hot = functional.one_hot(batch.codes, batch.width).float()  # B T D O
        b, t, d, o = hot.shape
        past = hot[:, :n]
        flag = torch.zeros(b, t, 1)
        flag[:, :n] = 1.0

        # What the history tells of each option.
        number = past.sum(1)  # B D O
        total = torch.einsum("bndo,bn->bdo", past, z)
        own = torch.zeros(b, t)
        own[:, :n] = z
        count = torch.einsum("btdo,bdo->btd", hot, number) - flag
        mean = (torch.einsum("btdo,bdo->btd", hot, total) - own[..., None]) / (count + 1)
        ranked = torch.where(past > 0, z[:, :, None, None], torch.full((), NONE))
        first, second = ranked.topk(min(2, n), dim=1)[0].unbind(1) if n > 1 else (ranked[:, 0], ranked[:, 0] * 0 + NONE)
        best = torch.einsum("btdo,bdo->btd", hot, first)
        other = torch.einsum("btdo,bdo->btd", hot, second)
        best = torch.where((flag > 0) & (own[..., None] >= best), other, best)

        # How often each option occurs among decisions that share it, and how the score goes with that.
        asked = (torch.arange(o) < batch.sizes[..., None]).float()  # B D O
        histogram = torch.einsum("bgd,btdo,bdo->btgo", batch.member, hot, asked)
        centred = histogram[:, :n] - histogram[:, :n].mean(1, keepdim=True)
        variance = (centred ** 2).sum(1)  # B G O
        slope = torch.einsum("bngo,bn->bgo", centred, z) / torch.sqrt((variance + 0.02) * n)
        shared = (batch.member > 0).float()
        slope_of = torch.einsum("bgd,bgo->bdo", shared, slope)
        share = torch.einsum("btgo,bgd,btdo->btd", histogram, shared, hot)
        trend = torch.einsum("btdo,bdo->btd", hot, slope_of)

        # Decisions.
        log_n = torch.full((b, 1), math.log(n) / 4)
        between = (total ** 2 / (number + 1)).sum(2) / n
        used = (number > 0).float()
        effect = total / (number + 1)
        free = used.sum(2).log()
        features = torch.stack([
            between, free, effect.amax(2), effect.amin(2), (slope_of ** 2).sum(2),
            1 / (1 + torch.einsum("bgd,bge->bd", shared, shared)), past.mean(1).pow(2).sum(2), log_n.expand(b, d)], -1)
        e = self.decision(features)
        e = e + self.decision_again(torch.cat([e, e.mean(1, keepdim=True).expand_as(e)], -1))
        varies = (used.sum(2) > 1).float()
        world = self.summary(torch.cat([e.mean(1), log_n, torch.stack([
            torch.full((b,), math.log(d) / 3), varies.mean(1), between.amax(1), between.mean(1),
            (batch.member.sum((1, 2)) > 0).float()], -1)], -1))

        # The Gaussian process.
        weight = self.weights(e)
        rate = torch.exp(weight[..., 0].clamp(-6, 4)) * 1.5 / math.sqrt(d)
        line = torch.softmax(weight[..., 1], 1)
        a, l, g, noise, scale = (self.kernel(world).clamp(-5, 5)
                                 + torch.tensor([-0.6, -0.9, -0.9, -2.5, 1.4])).exp().unbind(-1)
        flat = hot.reshape(b, t, d * o)
        old = flat[:, :n].transpose(1, 2)

        def match(gate: Tensor) -> Tensor:
            """(B, T, n): sum of a gate (B, D) over the decisions that two encoders have in common."""
            return (flat * gate[..., None].expand(b, d, o).reshape(b, 1, d * o)) @ old

        counts = histogram.reshape(b, t, -1)
        square = (counts ** 2).sum(2)
        far = (square[:, :, None] + square[:, None, :n] - 2 * counts @ counts[:, :n].transpose(1, 2)).clamp(min=0)
        product = torch.exp(match(rate) - rate.sum(1)[:, None, None])
        sums = match(line)
        alike = torch.exp(-scale[:, None, None] * far)
        covariance = a[:, None, None] * product + l[:, None, None] * sums + g[:, None, None] * alike
        prior = (a + l + g)[:, None]
        noise = noise + 5e-3
        among = covariance[:, :n] + noise[:, None, None] * torch.eye(n)
        factor = torch.linalg.cholesky(among)
        inverse = torch.cholesky_inverse(factor)
        alpha = (inverse @ z[..., None])[..., 0]
        left_out = 1 / inverse.diagonal(dim1=1, dim2=2)
        cross = covariance[:, n:]
        plain_mean = (cross @ alpha[..., None])[..., 0]
        solved = cross @ inverse
        plain_deviation = (prior - (solved * cross).sum(2)).clamp(min=2e-3).sqrt()
        guess = torch.cat([z - alpha * left_out, plain_mean], 1)
        doubt = torch.cat([left_out.clamp(min=2e-3).sqrt(), plain_deviation], 1)

        # Other measurements.
        seen, pooled = self._channels(batch, hot, number)

        # Encoders, as tokens.
        cells = torch.stack([mean, count.log1p() / 4, best, share, trend, between[:, None].expand(b, t, d),
                             (count > 0).float(), varies[:, None].expand(b, t, d)], -1)
        c = self.cells(torch.cat([cells, pooled, e[:, None].expand(b, t, d, -1)], -1))
        pool = torch.softmax(weight[..., 2], 1)
        x = self.entry(torch.cat([
            torch.einsum("btdc,bd->btc", c, pool), world[:, None].expand(b, t, -1), seen, flag, own[..., None],
            guess[..., None], doubt.log()[..., None], (own[..., None] - guess[..., None]) * flag,
            z.amax(1)[:, None, None].expand(b, t, 1)], -1))
        gates = self.gates(e) * (2 / math.sqrt(d))  # B D L*H
        bias = (torch.einsum("btx,bxk,bxn->bktn", flat, gates.repeat_interleave(o, 1), old)
                + self.near[:, 0, None, None] * (covariance / prior[..., None])[:, None]
                - self.near[:, 1, None, None] * far[:, None])
        for i, layer in enumerate(self.layers):
            x = layer(x, bias[:, i * self.size.heads:(i + 1) * self.size.heads], n)
        query = self.last(x[:, n:])
        incumbent = z.amax(1)[:, None]
        out = self.head(torch.cat([query, plain_mean[..., None], plain_deviation[..., None],
                                   (plain_mean - incumbent)[..., None]], -1))
        k = self.size.parts
        start = torch.linspace(-0.5, 0.5, k)
        unit = plain_deviation[..., None]
        return Prediction(torch.softmax(out[..., :k], -1), plain_mean[..., None] + unit * (start + out[..., k:2 * k]),
                          (unit * torch.exp(out[..., 2 * k:3 * k].clamp(-5, 3))).clamp(min=0.02),
                          out[..., -1] + (plain_mean - incumbent) + plain_deviation, plain_mean, plain_deviation)

    def _channels(self, batch: Batch, hot: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        """What other measurements say of encoders, (B, T, 8), and of the options that they chose, (B, T, D, 8)."""
        b, t, d, _ = hot.shape
        n, number_of = batch.history, batch.channels.shape[2]
        if number_of == 0:
            return torch.zeros(b, t, 8), torch.zeros(b, t, d, 8)
        v, there = batch.channels * batch.present, batch.present
        amount = there.sum(1) + 1
        with_score = (v * batch.z[..., None]).sum(1) / amount  # B C: about the correlation with the score
        score = batch.z[..., None].expand_as(v)
        entry = self.channel_entry(torch.stack([v, score, with_score[:, None].expand_as(v), (amount.log() / 4)[
            :, None].expand_as(v)], -1)) * there[..., None]
        seen = torch.zeros(b, t, 8)
        seen[:, :n] = entry.mean(2)
        past = hot[:, :n]
        total = torch.einsum("bndo,bnc->bdoc", past, v)
        count = torch.einsum("bndo,bnc->bdoc", past, there)
        mean = torch.einsum("btdo,bdoc->btdc", hot, total)
        many = torch.einsum("btdo,bdoc->btdc", hot, count)
        own, own_there = torch.zeros(b, t, number_of), torch.zeros(b, t, number_of)
        own[:, :n], own_there[:, :n] = v, there
        mean, many = mean - own[:, :, None], many - own_there[:, :, None]
        mean = mean / (many + 1)
        between = (total ** 2 / (count + 1)).sum(2) / amount[:, None]  # B D C
        pooled = self.channel_cell(torch.stack([
            mean, with_score[:, None, None].expand_as(mean), between[:, None].expand_as(mean), many.log1p() / 4], -1))
        return seen, pooled.mean(3)
