"""Taking the probes of a run: which rows, what the agent makes of them, and when training is hopeless."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn import functional as F

from lacer.agents.evaluation import Protocol
from lacer.agents.parts import Kept
from lacer.agents.probes import FUSED, Sample, chosen, measure
from lacer.agents.probes.permuted import change
from lacer.agents.probes.units import Watch
from lacer.encoders import CompositeEncoder, Features

BATCH = 256
"""Rows of a forward pass."""
PERMUTED_ROWS = 256
GRADIENT_ROWS = 128
"""A minibatch's worth: more rows cost more and say the same of the parts' shares."""

Probes = dict[str, dict[str, float]]


class Hopeless(Exception):
    """A run that a rule of the protocol ends."""


@dataclass
class Rows:
    """Rows of experience: observations in the encoder's layout and the other fields as in a Sample."""

    obs: dict[str, np.ndarray]
    state: dict[str, np.ndarray]
    reward: np.ndarray
    returns: np.ndarray
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.reward)

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """One after the other."""
        def join(xs: list[np.ndarray]) -> np.ndarray:
            return np.concatenate(xs)

        return cls({k: join([p.obs[k] for p in parts]) for k in parts[0].obs},
                   {k: join([p.state[k] for p in parts]) for k in parts[0].state if all(k in p.state for p in parts)},
                   join([p.reward for p in parts]), join([p.returns for p in parts]), join([p.groups for p in parts]))

    def some(self, n: int) -> Rows:
        """At most ``n`` of them, drawn once and for all so that no period of the task is met, in their order."""
        return self if len(self) <= n else self.at(_drawn(len(self), n))

    def at(self, keep: np.ndarray) -> Rows:
        """Those of the numbers ``keep``."""
        return Rows({k: v[keep] for k, v in self.obs.items()}, {k: v[keep] for k, v in self.state.items()},
                    self.reward[keep], self.returns[keep], self.groups[keep])


def _drawn(total: int, n: int) -> np.ndarray:
    """Numbers of the rows that :meth:`Rows.some` keeps."""
    return np.sort(np.random.default_rng(0).choice(total, min(n, total), replace=False))


def rows_of_episodes(rows: Mapping[str, Sequence[Any]], gamma: float, n: int) -> Rows:
    """At most ``n`` rows of evaluation episodes (``Episodes.rows``); their returns are discounted sums of rewards to
    the episode's end."""
    groups, reward = np.array(rows["episode"]), np.array(rows["reward"], np.float64)
    returns = np.zeros_like(reward)
    for episode in np.unique(groups):
        total = 0.0
        for i in np.flatnonzero(groups == episode)[::-1]:
            returns[i] = total = reward[i] + gamma * total
    index = np.arange(len(reward))
    keep = Rows({"row": index}, {}, reward, returns, groups).some(n)
    kept = [int(i) for i in keep.obs["row"]]
    return replace(keep, obs={k: np.stack([rows["obs"][i][k] for i in kept]) for k in rows["obs"][0]},
                   state=_states([rows["state"][i] for i in kept]))


def _states(states: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Variables that every row tells, (N,) each."""
    names = [k for k in states[0] if all(k in s for s in states)] if states else []
    return {k: np.array([float(s[k]) for s in states]) for k in names}


def wanted(protocol: Protocol) -> frozenset[str]:
    """What the probes of a protocol need beside features (:attr:`Probe.needs`).

    Raises:
        UnknownNameError: there is no such probe.
    """
    return frozenset(n for p in chosen(protocol.probes) for n in p.needs)


def take(policy: Any, rows: Rows, needs: frozenset[str], gradient: Mapping[str, float] | None = None) -> Sample:
    """What the probes look at.

    Args:
        policy: a :class:`CompositePolicy`.
        rows: the experience.
        needs: see :func:`wanted`.
        gradient: norms by part (:func:`gradients`).
    """
    encoder: CompositeEncoder = policy.features_extractor.encoder
    training = policy.training
    policy.set_training_mode(False)
    try:
        with torch.no_grad():
            layers, features = {}, {}
            if "layers" in needs:
                with Watch({**dict(encoder.blocks.items()), FUSED: encoder.fusion}) as watch:
                    for obs in _batches(policy, rows):
                        watch.run(encoder, obs, len(next(iter(obs.values()))))
                layers, features = watch.layers(), {k: torch.cat(v) for k, v in watch.features.items()}
            else:
                parts: dict[str, list[Tensor]] = {}
                for obs in _batches(policy, rows):
                    encoded = encoder.encode(obs)
                    for name, f in encoded.items():
                        parts.setdefault(name, []).append(f.vector.float())
                    parts.setdefault(FUSED, []).append(encoder.fusion(encoded).float())
                features = {k: torch.cat(v) for k, v in parts.items()}
            action, _ = _decide(policy, features[FUSED])
            permuted = _permuted(policy, encoder, rows) if "permuted" in needs else {}
    finally:
        policy.set_training_mode(training)
    return Sample({k: v.cpu().numpy() for k, v in features.items()}, rows.state, rows.reward, rows.returns,
                  _greedy(policy.action_space, action), rows.groups, layers, permuted, dict(gradient or {}))


def _batches(policy: Any, rows: Rows) -> Iterator[dict[str, Tensor]]:
    for i in range(0, len(rows), BATCH):
        yield {k: torch.as_tensor(v[i:i + BATCH], device=policy.device) for k, v in rows.obs.items()}


def _decide(policy: Any, state: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What the policy says in fused states, as numbers whose change means a change of behaviour, (N, A): the clipped
    mean of continuous actions, the probabilities of discrete ones. And the critic's values (N, 1)."""
    pi, vf = policy.mlp_extractor(state)
    out, values = policy.action_net(pi).float(), policy.value_net(vf).float()
    space = policy.action_space
    if isinstance(space, spaces.Box):
        low, high = (torch.as_tensor(x, device=out.device).flatten() for x in (space.low, space.high))
        out = out.clamp(low, high)
    elif isinstance(space, spaces.MultiBinary):
        out = out.sigmoid()
    else:
        out = torch.cat([x.softmax(1) for x in out.split(_options(space), 1)], 1)
    return out.double().cpu().numpy(), values.double().cpu().numpy()


def _options(space: spaces.Space) -> list[int]:
    return [int(space.n)] if isinstance(space, spaces.Discrete) else [int(n) for n in space.nvec]  # type: ignore[attr-defined]


def _greedy(space: spaces.Space, out: np.ndarray) -> np.ndarray:
    """The greedy actions of what :func:`_decide` gives; integers if discrete."""
    if isinstance(space, spaces.Box):
        return out
    if isinstance(space, spaces.MultiBinary):
        return (out > 0.5).astype(np.int64)
    cuts = np.cumsum(_options(space))[:-1]
    return np.stack([x.argmax(1) for x in np.split(out, cuts, 1)], 1)


def _permuted(policy: Any, encoder: CompositeEncoder, rows: Rows) -> dict[str, tuple[float, float]]:
    """How much actions and values change when a source's features are those of other rows."""
    rows = rows.some(PERMUTED_ROWS)
    features = encoder.encode({k: torch.as_tensor(v, device=policy.device) for k, v in rows.obs.items()})
    before = _decide(policy, encoder.fusion(features))
    order = torch.as_tensor(np.random.default_rng(1).permutation(len(rows)), device=policy.device)
    out = {}
    for name, f in features.items():
        other = Features(f.vector[order], f.tokens[order], None if f.mask is None else f.mask[order])
        after = _decide(policy, encoder.fusion({**features, name: other}))
        out[name] = (change(before[0], after[0]), change(before[1], after[1]))
    return out


def gradients(model: Any) -> dict[str, float]:
    """Norm of the PPO loss's gradient by part, on rows of the rollout that was just collected, before its update.

    Nothing of the model changes: no gradients are stored, no random numbers of torch are drawn.
    """
    buffer, policy = model.rollout_buffer, model.policy
    encoder: CompositeEncoder = policy.features_extractor.encoder
    n = buffer.buffer_size * buffer.n_envs
    keep = np.random.default_rng(2).choice(n, min(n, GRADIENT_ROWS), replace=False)

    def part(x: np.ndarray, rows: np.ndarray) -> Tensor:
        return torch.as_tensor(x[rows // buffer.n_envs, rows % buffer.n_envs], device=policy.device)  # no whole copy

    training = policy.training
    policy.set_training_mode(False)
    clip = model.clip_range(1.0) if callable(model.clip_range) else model.clip_range
    modules: dict[str, nn.Module] = {**dict(encoder.blocks.items()), FUSED: encoder.fusion}
    of = {name: [p for p in m.parameters() if p.requires_grad] for name, m in modules.items()}
    every = [p for ps in of.values() for p in ps]
    normal = part(buffer.advantages, keep)
    normal = (normal - normal.mean()) / (normal.std() + 1e-8) if len(keep) > 1 else normal
    total: list[Tensor | None] = [None] * len(every)
    size = getattr(model, "microbatch", None) or len(keep)  # no more memory than the updates take
    for start in range(0, len(keep), size):
        rows, advantages = keep[start:start + size], normal[start:start + size]
        obs = {k: part(v, rows) for k, v in buffer.observations.items()}
        actions, old, returns = (part(x, rows) for x in (buffer.actions, buffer.log_probs, buffer.returns))
        # As in the updates; those of MultiBinary are bytes.
        actions = actions.long().flatten() if isinstance(model.action_space, spaces.Discrete) else actions.float()
        # cuDNN refuses the backward pass of recurrent networks in evaluation mode.
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
            values, log_prob, entropy = policy.evaluate_actions(obs, actions)
            ratio = (log_prob - old).exp()
            gain = torch.min(advantages * ratio, advantages * ratio.clamp(1 - clip, 1 + clip)).mean()
            bonus = (-log_prob if entropy is None else entropy).mean()
            loss = model.vf_coef * F.mse_loss(returns, values.flatten()) - gain - model.ent_coef * bonus
            new = torch.autograd.grad(len(rows) / len(keep) * loss, every, allow_unused=True)
        total = [a if b is None else b if a is None else a + b for a, b in zip(total, new, strict=True)]
    found = iter(total)
    policy.set_training_mode(training)
    out = {}
    for name, ps in of.items():
        norms = [g.double().norm() for g in (next(found) for _ in ps) if g is not None]
        out[name] = float(torch.stack(norms).norm()) if norms else 0.0
    return out


class Probing(Kept):
    """Takes the probes in mid-training, the gradient's shares at the end, and ends hopeless runs.

    It reads the rollouts that PPO collects anyway and changes nothing: the same training without it is the same.

    Args:
        protocol: says which probes, when, and which runs are hopeless.

    Attributes:
        curve: (environment steps, probes) of each point in mid-training.
        gradient: norms by part in the last rollout; empty before that.
        seconds: spent in mid-training.
        steps: environment steps taken for the probes' sake.

    Raises:
        UnknownNameError: there is no such probe.
    """

    def __init__(self, protocol: Protocol) -> None:
        super().__init__()
        self.protocol, self.needs = protocol, wanted(protocol)
        self.curve: list[tuple[int, Probes]] = []
        self.gradient: dict[str, float] = {}
        self.seconds, self.steps = 0.0, 0
        self._points = sorted({round(share * protocol.steps) for share in protocol.probe_at})
        self._states: list[list[dict[str, Any]]] = []
        self._rewards: list[np.ndarray] = []  # those of the buffer hold the value of the rest of a truncated episode
        self._last: list[dict[str, Any]] = []
        self._kept: list[Rows] = []
        self._episodes: Any = 0

    def data(self) -> dict[str, Any]:
        return {"curve": self.curve, "seconds": self.seconds, "gradient": self.gradient}

    def load(self, data: Mapping[str, Any]) -> None:
        self.curve = [(int(n), dict(probes)) for n, probes in data["curve"]]
        self.seconds = float(data["seconds"])
        self.gradient = {str(k): float(v) for k, v in data["gradient"].items()}
        self._points = [p for p in self._points if not self.curve or p > self.curve[-1][0]]

    def _on_training_start(self) -> None:
        self._kept, self._episodes = [], 0  # a part of a training in parts begins with new episodes
        if self._points:
            self._last = [dict(i.get("state", {})) for i in self._reset_infos()]

    def _reset_infos(self) -> list[dict[str, Any]]:
        return list(getattr(self.training_env, "venv", self.training_env).reset_infos)

    def _on_rollout_start(self) -> None:
        self._states, self._rewards = [], []

    def _on_step(self) -> bool:
        if self._points:
            self._states.append(self._last)
            self._rewards.append(np.array(self.locals["rewards"], np.float32))
            # After an automatic reset the next observation belongs to the new episode, and so must the state.
            new, begun = self.locals["infos"], self._reset_infos()
            self._last = [dict((begun[i] if done else new[i]).get("state", {}))
                          for i, done in enumerate(self.locals["dones"])]
        return True

    def _on_rollout_end(self) -> None:
        steps = self.num_timesteps
        last, due = steps >= self.protocol.steps, bool(self._points) and steps >= self._points[0]
        start = time.monotonic()
        if not due and self._points and steps + self.protocol.probe_rows > self._points[0]:
            self._kept.append(self._rows(np.arange(self._rollout)))
        if not last and not due:
            return
        gradient = gradients(self.model) if "gradient" in self.needs else {}
        if last:
            self.gradient = gradient
        if due:
            self._points = [p for p in self._points if p > steps]
            needs = self.needs if self.protocol.stop_dead is None else self.needs | {"layers"}
            before = sum(map(len, self._kept))
            keep = _drawn(before + self._rollout, self.protocol.probe_rows)  # before anything is copied
            new = self._rows(keep[keep >= before] - before)
            rows = Rows.joined([Rows.joined(self._kept).at(keep[keep < before]), new]) if self._kept else new
            self._kept = []
            sample = take(self.model.policy, rows, needs, gradient)
            self.curve.append((steps, measure(sample, self.protocol.probes)))
            self.seconds += time.monotonic() - start
            self._stop(sample, steps)
        else:
            self.seconds += time.monotonic() - start

    def at_the_end(self, policy: Any, episodes: Any, play: Callable[[Any, int], Any]) -> Probes:
        """The probes of the trained policy.

        Args:
            policy: a :class:`CompositePolicy`.
            episodes: what the evaluation saw (:class:`lacer.agents.ppo.Episodes`).
            play: plays, with any policy, the first so many evaluation episodes.
        """
        p = self.protocol
        rows = rows_of_episodes(episodes.rows, p.ppo.gamma, p.probe_rows)
        sample = take(policy, rows, self.needs, self.gradient)
        if "permuted_return" in self.needs and p.permuted_episodes:
            intact = float(np.mean(episodes.returns[:p.permuted_episodes]))
            for name in sample.sources:
                played = play(Permuted(policy, name, rows.obs[name], 0), p.permuted_episodes)
                sample.permuted_return[name] = intact - float(np.mean(played.returns))
                self.steps += len(played.rows["reward"])
        return measure(sample, p.probes)

    @property
    def _rollout(self) -> int:
        buffer = self.model.rollout_buffer  # type: ignore[attr-defined]
        return int(buffer.buffer_size * buffer.n_envs)

    def _rows(self, keep: np.ndarray) -> Rows:
        """Those rows, counted step by step, of the rollout just collected, copied."""
        buffer: Any = self.model.rollout_buffer  # type: ignore[attr-defined]
        step, env = keep // buffer.n_envs, keep % buffer.n_envs
        episodes = self._episodes + np.cumsum(buffer.episode_starts, 0)
        self._episodes = episodes[-1]
        groups = episodes + 1e9 * np.arange(buffer.n_envs)
        return Rows({k: v[step, env] for k, v in buffer.observations.items()},
                    {k: v[keep] for k, v in _states([s for row in self._states for s in row]).items()},
                    np.stack(self._rewards)[step, env], buffer.returns[step, env], groups[step, env])

    def _stop(self, sample: Sample, steps: int) -> None:
        p = self.protocol
        fused = measure(Sample({FUSED: sample.features[FUSED]}, layers={FUSED: sample.layers.get(FUSED, [])}),
                        ("effective_rank", "dead_units"))[FUSED]
        if p.stop_rank is not None and fused["effective_rank"] < p.stop_rank:
            raise Hopeless(f"collapsed rank: the fused state's effective rank is {fused['effective_rank']:.3g} of its "
                           f"width after {steps:,} steps, below {p.stop_rank:g}")
        if p.stop_dead is not None and fused["dead_units"] > p.stop_dead:
            raise Hopeless(f"dead units: {fused['dead_units']:.1%} of the fusion's units are zero in every row after "
                           f"{steps:,} steps, more than {p.stop_dead:.1%}")


class Permuted:
    """A policy that is shown, of one source, what it showed at other moments. As SB3's policies, it has ``predict``.

    Args:
        policy: SB3 policy.
        source: the source.
        seen: observations of it, (N, ...).
        seed: of the draws.
    """

    def __init__(self, policy: Any, source: str, seen: np.ndarray, seed: int) -> None:
        self.policy, self.source, self.seen = policy, source, seen
        self.rng = np.random.default_rng(seed)

    def predict(self, obs: Mapping[str, np.ndarray], deterministic: bool = True) -> Any:
        """Actions for a batch of observations, and None."""
        drawn = self.seen[self.rng.integers(len(self.seen), size=len(obs[self.source]))]
        return self.policy.predict({**obs, self.source: drawn}, deterministic=deterministic)
