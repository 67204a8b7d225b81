"""The network: a Gaussian process whose kernel is read off the history, and a Transformer that corrects it.

Nothing in it belongs to a particular decision or option: decisions and options enter by what the history tells about
them alone, so renaming or reordering either changes nothing. Of a history and candidates (:class:`Batch`) it makes a
mixture of normal distributions for the score of every candidate, on the scale of the history's normal scores.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from lacer.search.ranker.histories import Batch

NONE = -3.0
"""Stands for the best score among no encoders."""
NOISE = 5e-3
"""Variance of the scores' noise that every kernel has at least."""
ROUNDS = 2
"""Of fitting the kernel to the history."""
TRUST = 0.7
"""Standard deviation of a kernel's parameters, as logarithms, about what the network reads off the history."""


@dataclass(frozen=True)
class Size:
    """Size of the network.

    Attributes:
        width: of an encoder's token.
        layers, heads: of the Transformer.
        cell: width of what is known of one decision of one encoder.
        parts: normal distributions in a mixture.
    """

    width: int = 64
    layers: int = 4
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

    def wider(self, factor: float) -> Prediction:
        """The same means with distributions that are wider by a factor about them."""
        m = self.expected()[..., None]
        return replace(self, mean=m + factor * (self.mean - m), deviation=factor * self.deviation)

    def below(self, at: Tensor) -> Tensor:
        """(B, q): probability of a score below ``at``, (B, q) or a scalar."""
        u = (at[..., None] - self.mean) / self.deviation
        return (self.weight * torch.special.ndtr(u)).sum(-1)

    def improvement(self, best: Tensor) -> Tensor:
        """(B, q): expected improvement over ``best``, (B, 1)."""
        u = (self.mean - best[..., None]) / self.deviation
        density = torch.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)
        return (self.weight * self.deviation * (u * torch.special.ndtr(u) + density)).sum(-1)


def _inverse(covariance: Tensor, amplitude: Tensor) -> Tensor:
    """Inverse of covariances (B, n, n); those that single precision cannot invert get more noise."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed.any():
        more = (failed > 0) * 0.01 * amplitude
        factor = torch.linalg.cholesky(covariance + more[:, None, None] * torch.eye(covariance.shape[1]))
    return torch.cholesky_inverse(factor)


def fit(log: Tensor, codes: Tensor, line: Tensor, counts: Tensor, z: Tensor) -> Tensor:
    """(B, 5 + D): logarithms of a kernel's parameters, fitted to a history: those with the highest posterior density
    where the network's are the centre of the prior, by Fisher scoring (a Gaussian process whose prior is learned from
    other tasks, as HyperBO has it: Wang et al. 2021, 2109.08215). Differentiable in ``log``, as a posterior mode is.

    Args:
        log: amplitudes (product, sum, histogram), noise, scale of the histogram, rate of each decision.
        codes: (B, n, D).
        line: (B, D).
        counts: (B, n, H).
        z: (B, n) scores.
    """
    with torch.no_grad():
        differ = (codes[:, :, None] != codes[:, None]).permute(0, 3, 1, 2).to(log.dtype)  # B D n n
        alike = torch.einsum("bd,bdij->bij", line, 1 - differ)
        far = torch.cdist(counts, counts).square()
        eye, inner = (torch.eye(k, dtype=log.dtype) for k in (codes.shape[1], log.shape[1]))
        centre = at = log.detach()
        share = inner
        for _ in range(ROUNDS):
            p = at.exp()[..., None, None]
            near = p[:, 0] * torch.exp(-(p[:, 5:] * differ).sum(1))
            sums, bags = p[:, 1] * alike, p[:, 2] * torch.exp(-p[:, 4] * far)
            inverse = _inverse(near + sums + bags + (p[:, 3] + NOISE) * eye, at[:, :3].exp().sum(1))
            alpha = (inverse @ z[..., None])[..., 0]
            slopes = torch.cat([torch.stack([near, sums, bags, p[:, 3] * eye, -p[:, 4] * far * bags], 1),
                                -p[:, 5:] * differ * near[:, None]], 1)  # B P n n: of the covariance
            turned = inverse[:, None] @ slopes
            gradient = 0.5 * (torch.einsum("bi,bpij,bj->bp", alpha, slopes, alpha)
                              - turned.diagonal(dim1=2, dim2=3).sum(2))
            fisher = 0.5 * turned.flatten(2) @ turned.transpose(2, 3).flatten(2).transpose(1, 2)
            within = torch.linalg.inv(fisher + inner / TRUST ** 2)
            step = (within @ (gradient - (at - centre) / TRUST ** 2)[..., None])[..., 0]
            at = (at + step.clamp(-1, 1)).clamp(-9, 5)
            share = within / TRUST ** 2
    return at + (share @ (log - log.detach())[..., None])[..., 0]


def _perceptron(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
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

    def remember(self, normal: Tensor) -> tuple[Tensor, Tensor]:
        """(B, heads, n, width / heads): keys and values of the history."""
        b, n, _ = normal.shape
        k, v = self.pair(normal).view(b, n, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        return k, v

    def forward(self, x: Tensor, normal: Tensor, memory: tuple[Tensor, Tensor], bias: Tensor) -> Tensor:
        b, t, w = x.shape
        q = self.query(normal).view(b, t, self.heads, -1).transpose(1, 2)
        y = functional.scaled_dot_product_attention(q, *memory, attn_mask=bias)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, w))
        return x + self.mix(self.between(x))


@dataclass
class Reading:
    """What the network keeps of a history. B tasks, n encoders, D decisions, O options, G groups.

    Attributes:
        batch: the history.
        number, total, first, second: (B, D, O), by option: encoders, sum of scores, best and second best score.
        spread, shared: (B, G, D, O), (B, G, D): groups of decisions that share options.
        slope: (B, D, O), how the score goes with the number of times that an option occurs.
        between, varies, decisions, world, log_n: of decisions and of all.
        rate, line, pool: (B, D), weights of decisions.
        amplitude, scale: (B, 3), (B,), of the kernel.
        gates: (B, D, layers * heads), of the attention.
        flat, counts: (B, n, D * O), (B, n, G * O), the encoders.
        channels: of other measurements.
        inverse, alpha: of the Gaussian process.
        memory: keys and values by layer.
    """

    batch: Batch
    number: Tensor
    total: Tensor
    first: Tensor
    second: Tensor
    spread: Tensor
    shared: Tensor
    slope: Tensor
    between: Tensor
    varies: Tensor
    decisions: Tensor
    world: Tensor
    log_n: Tensor
    rate: Tensor
    line: Tensor
    pool: Tensor
    amplitude: Tensor
    scale: Tensor
    gates: Tensor
    flat: Tensor
    counts: Tensor
    channels: tuple[Tensor, ...]
    inverse: Tensor = field(init=False)
    alpha: Tensor = field(init=False)
    memory: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def covariance(self, flat: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """(B, t, n) each: covariance of encoders with those of the history, and squared distance of their counts."""
        width = self.batch.width
        old = self.flat.transpose(1, 2)
        a, b, c = (x[:, None, None] for x in self.amplitude.unbind(-1))
        differ = self.rate.sum(1)[:, None, None] - (flat * self.rate.repeat_interleave(width, 1)[:, None]) @ old
        sums = (flat * self.line.repeat_interleave(width, 1)[:, None]) @ old
        far = ((counts ** 2).sum(2)[:, :, None] + (self.counts ** 2).sum(2)[:, None]
               - 2 * counts @ self.counts.transpose(1, 2)).clamp(min=0)
        return a * torch.exp(-differ) + b * sums + c * torch.exp(-self.scale[:, None, None] * far), far


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
                layer.weight.mul_(0.1)  # type: ignore[operator]
                layer.bias.zero_()  # type: ignore[operator]

    def forward(self, batch: Batch) -> Prediction:
        return self.predict(self.read(batch), batch.queries)

    def read(self, batch: Batch) -> Reading:
        """What is needed of a history to predict any number of candidates."""
        z, width = batch.z, batch.width
        hot = functional.one_hot(batch.codes, width).float()  # B n D O
        b, n, d, o = hot.shape
        number = hot.sum(1)  # B D O
        total = torch.einsum("bndo,bn->bdo", hot, z)
        ranked = torch.where(hot > 0, z[:, :, None, None], torch.full((), NONE))
        first, second = ranked.topk(2, dim=1)[0].unbind(1) if n > 1 else (ranked[:, 0], torch.full_like(total, NONE))

        # How often each option occurs among decisions that share it, and how the score goes with that.
        asked = (torch.arange(o) < batch.sizes[..., None]).float()
        spread = batch.member[..., None] * asked[:, None]  # B G D O
        histogram = torch.einsum("bgdo,bndo->bngo", spread, hot)
        centred = histogram - histogram.mean(1, keepdim=True)
        slope = torch.einsum("bngo,bn->bgo", centred, z) / torch.sqrt(((centred ** 2).sum(1) + 0.02) * n)
        shared = (batch.member > 0).float()
        slope_of = torch.einsum("bgd,bgo->bdo", shared, slope)

        # Decisions.
        log_n = torch.full((b, 1), math.log(n) / 4)
        between = (total ** 2 / (number + 1)).sum(2) / n
        used = (number > 0).float()
        effect = total / (number + 1)
        varies = (used.sum(2) > 1).float()
        e = self.decision(torch.stack([
            between, used.sum(2).log(), effect.amax(2), effect.amin(2), (slope_of ** 2).sum(2),
            1 / (1 + torch.einsum("bgd,bge->bd", shared, shared)), (number / n).pow(2).sum(2), log_n.expand(b, d)], -1))
        e = e + self.decision_again(torch.cat([e, e.mean(1, keepdim=True).expand_as(e)], -1))
        world = self.summary(torch.cat([e.mean(1), log_n, torch.stack([
            torch.full((b,), math.log(d) / 3), varies.mean(1), between.amax(1), between.mean(1),
            (batch.member.sum((1, 2)) > 0).float()], -1)], -1))

        # The Gaussian process.
        weight = self.weights(e)
        counts, line = histogram.reshape(b, n, -1), torch.softmax(weight[..., 1], 1)
        log = torch.cat([self.kernel(world).clamp(-5, 5) + torch.tensor([-0.6, -0.9, -0.9, -2.5, 1.4]),
                         weight[..., 0].clamp(-6, 4) + math.log(1.5 / math.sqrt(d))], 1)
        log = fit(log, batch.codes, line, counts, z)
        kernel = log[:, :5].exp()
        r = Reading(
            batch=batch, number=number, total=total, first=first, second=second, spread=spread, shared=shared,
            slope=slope_of, between=between, varies=varies, decisions=e, world=world, log_n=log_n,
            rate=log[:, 5:].exp(), line=line,
            pool=torch.softmax(weight[..., 2], 1), amplitude=kernel[:, :3], scale=kernel[:, 4],
            gates=self.gates(e) * (2 / math.sqrt(d)), flat=hot.reshape(b, n, d * o),
            counts=counts, channels=self._option_channels(batch, hot))
        covariance, far = r.covariance(r.flat, r.counts)
        among = covariance + (kernel[:, 3] + NOISE)[:, None, None] * torch.eye(n)
        r.inverse = _inverse(among, r.amplitude.sum(1))
        r.alpha = (r.inverse @ z[..., None])[..., 0]
        left_out = 1 / r.inverse.diagonal(dim1=1, dim2=2)
        guess, doubt = z - r.alpha * left_out, left_out.clamp(min=2e-3).sqrt()

        # The history, as tokens.
        x = self._tokens(r, hot, histogram, guess, doubt, z)
        bias = self._bias(r, r.flat, covariance, far)
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            normal = layer.before(x)
            r.memory.append(layer.remember(normal))
            x = layer(x, normal, r.memory[-1], bias[:, i * self.size.heads:(i + 1) * self.size.heads])
        return r

    def predict(self, r: Reading, queries: Tensor) -> Prediction:
        """The scores of candidates, (B, q, D) codes."""
        hot = functional.one_hot(queries, r.batch.width).float()
        covariance, far, mean, deviation, histogram = self._plain(r, hot)
        x = self._tokens(r, hot, histogram, mean, deviation, None)
        bias = self._bias(r, hot.flatten(2), covariance, far)
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            x = layer(x, layer.before(x), r.memory[i], bias[:, i * self.size.heads:(i + 1) * self.size.heads])
        ahead = mean - r.batch.z.amax(1)[:, None]
        out = self.head(torch.cat([self.last(x), mean[..., None], deviation[..., None], ahead[..., None]], -1))
        k, unit = self.size.parts, deviation[..., None]
        return Prediction(
            torch.softmax(out[..., :k], -1),
            mean[..., None] + unit * (torch.linspace(-0.5, 0.5, k) + out[..., k:2 * k]),
            (unit * torch.exp(out[..., 2 * k:3 * k].clamp(-5, 3))).clamp(min=0.02),
            out[..., -1] + ahead + deviation, mean, deviation)

    def plain(self, r: Reading, queries: Tensor) -> tuple[Tensor, Tensor]:
        """(B, q) each: mean and standard deviation by the Gaussian process alone, which takes far less time."""
        _, _, mean, deviation, _ = self._plain(r, functional.one_hot(queries, r.batch.width).float())
        return mean, deviation

    def _plain(self, r: Reading, hot: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        histogram = torch.einsum("bgdo,btdo->btgo", r.spread, hot)
        covariance, far = r.covariance(hot.flatten(2), histogram.flatten(2))
        mean = (covariance @ r.alpha[..., None])[..., 0]
        variance = r.amplitude.sum(1)[:, None] - ((covariance @ r.inverse) * covariance).sum(2)
        return covariance, far, mean, variance.clamp(min=2e-3).sqrt(), histogram

    def _bias(self, r: Reading, flat: Tensor, covariance: Tensor, far: Tensor) -> Tensor:
        """(B, layers * heads, t, n): what makes encoders attend to those of the history that are like them."""
        width = r.batch.width
        gates = r.gates.repeat_interleave(width, 1).transpose(1, 2)  # B K D*O
        bias = (flat[:, None] * gates[:, :, None]) @ r.flat.transpose(1, 2)[:, None]
        correlation = covariance / r.amplitude.sum(1)[:, None, None]
        bias = torch.addcmul(bias, self.near[:, 0, None, None], correlation[:, None])
        return torch.addcmul(bias, self.near[:, 1, None, None], far[:, None], value=-1.0)

    def _tokens(self, r: Reading, hot: Tensor, histogram: Tensor, guess: Tensor, doubt: Tensor,
                own: Tensor | None) -> Tensor:
        """(B, t, width): encoders of the history (``own``: their scores) or candidates. What the history tells of an
        encoder of its own is told without that one."""
        b, t, d, _ = hot.shape
        flag = torch.full((b, t, 1), 0.0 if own is None else 1.0)
        z = torch.zeros(b, t) if own is None else own
        count = torch.einsum("btdo,bdo->btd", hot, r.number) - flag
        mean = (torch.einsum("btdo,bdo->btd", hot, r.total) - z[..., None]) / (count + 1)
        best = torch.einsum("btdo,bdo->btd", hot, r.first)
        if own is not None:
            best = torch.where(own[..., None] >= best, torch.einsum("btdo,bdo->btd", hot, r.second), best)
        share = torch.einsum("btgo,bgd,btdo->btd", histogram, r.shared, hot)
        trend = torch.einsum("btdo,bdo->btd", hot, r.slope)
        cells = torch.stack([mean, count.log1p() / 4, best, share, trend, r.between[:, None].expand(b, t, d),
                             (count > 0).float(), r.varies[:, None].expand(b, t, d)], -1)
        seen, pooled = self._channels(r, hot, own is not None)
        c = self.cells(torch.cat([cells, pooled, r.decisions[:, None].expand(b, t, d, -1)], -1))
        out: Tensor = self.entry(torch.cat([
            torch.einsum("btdc,bd->btc", c, r.pool), r.world[:, None].expand(b, t, -1), seen, flag, z[..., None],
            guess[..., None], doubt.log()[..., None], (z - guess)[..., None] * flag,
            r.batch.z.amax(1)[:, None, None].expand(b, t, 1)], -1))
        return out

    @staticmethod
    def _option_channels(batch: Batch, hot: Tensor) -> tuple[Tensor, ...]:
        """Of every other measurement: sum and number by option (B, D, O, C), how it goes with the score (B, C), how
        much of it goes with each decision (B, D, C), and its number (B, C)."""
        v, there = batch.channels * batch.present, batch.present
        amount = there.sum(1) + 1
        total = torch.einsum("bndo,bnc->bdoc", hot, v)
        count = torch.einsum("bndo,bnc->bdoc", hot, there)
        return (total, count, (v * batch.z[..., None]).sum(1) / amount,
                (total ** 2 / (count + 1)).sum(2) / amount[:, None], amount.log() / 4)

    def _channels(self, r: Reading, hot: Tensor, own: bool) -> tuple[Tensor, Tensor]:
        """What other measurements say of encoders, (B, t, 8), and of the options that they chose, (B, t, D, 8)."""
        b, t, d, _ = hot.shape
        batch = r.batch
        if batch.channels.shape[2] == 0:
            return torch.zeros(b, t, 8), torch.zeros(b, t, d, 8)
        total, count, with_score, between, amount = r.channels
        v, there = batch.channels * batch.present, batch.present
        seen = torch.zeros(b, t, 8)
        mean = torch.einsum("btdo,bdoc->btdc", hot, total)
        many = torch.einsum("btdo,bdoc->btdc", hot, count)
        if own:
            mean, many = mean - v[:, :, None], many - there[:, :, None]
            seen = (self.channel_entry(torch.stack([
                v, batch.z[..., None].expand_as(v), with_score[:, None].expand_as(v),
                amount[:, None].expand_as(v)], -1)) * there[..., None]).mean(2)
        mean = mean / (many + 1)
        pooled = self.channel_cell(torch.stack([
            mean, with_score[:, None, None].expand_as(mean), between[:, None].expand_as(mean), many.log1p() / 4], -1))
        return seen, pooled.mean(3)
