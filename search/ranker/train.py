"""Training of the ranker on synthetic tasks."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lacer.envs import LacerError, did_you_mean
from lacer.search.files import read_json, write_whole
from lacer.search.ranker.histories import Batch, Episode, candidates, draw_episodes, draw_queries, to_batch
from lacer.search.ranker.model import Prediction, Ranker, Size
from lacer.search.ranker.settings import Training
from lacer.search.ranker.synthetic import FAMILIES

REUSE = 4
"""Updates for which a search is used, since it takes as long to make as an update."""
DECAY = 0.2
"""Share of the updates, the last ones, in which the learning rate falls to nothing."""
HELD_OUT = 1_000_000_007
"""Seed of the tasks on which a training is judged."""


def loss_of(p: Prediction, target: Tensor) -> dict[str, Tensor]:
    """Losses: density of the target under the mixture, under the Gaussian process alone, and of the best candidate."""
    u = (target - p.plain_mean) / p.plain_deviation
    plain = (p.plain_deviation.log() + 0.5 * u * u + 0.5 * math.log(2 * math.pi)).clamp(max=30.0)
    goal = torch.softmax((target - target.amax(1, keepdim=True)) / 0.1, 1)
    return {"density": -p.log_density(target).clamp(min=-30.0).mean(), "plain": plain.mean(),
            "top": -(goal * torch.log_softmax(p.top * 2, 1)).sum(1).mean()}


def lengthen(model: Ranker, episodes: list[Episode], more: int, rng: np.random.Generator) -> None:
    """Goes on with histories by what the model proposes."""
    while more > 0:
        step = min(more, max(1, len(episodes[0].codes) // 6))
        pools = []
        for e in episodes:
            pool = candidates(e.task, e.codes, e.y, rng, 96)
            pools.append(np.concatenate([pool, e.task.sample(rng, 96 - len(pool))]) if len(pool) < 96 else pool)
        with torch.no_grad():
            batch = to_batch(episodes, pools, rng, target=False)
            p = model(batch)
            gain = p.improvement(batch.z.amax(1, keepdim=True)) if rng.random() < 0.5 else p.top
        for e, pool, g in zip(episodes, pools, gain.numpy(), strict=True):
            e.add(pool[np.argsort(-g)[:step]], rng)
        more -= step


def examples(model: Ranker, settings: Training, step: int) -> list[Batch]:
    """The tasks of ``REUSE`` updates from a step on: the same searches, whole and at earlier moments, and each time
    other candidates."""
    rng = np.random.default_rng([settings.seed, step])
    families = tuple(f for f in FAMILIES if f not in settings.without)
    n = int(np.exp(rng.uniform(np.log(4), np.log(settings.longest + 1))))
    number = max(4, round(settings.tokens / (n + settings.queries)))
    if n >= 8 and rng.random() < settings.itself and step > 500:
        first = max(4, int(n * rng.uniform(0.3, 0.9)))
        episodes = draw_episodes(rng, number, first, families, prune=settings.prune)
        lengthen(model, episodes, n - first, rng)
    else:
        episodes = draw_episodes(rng, number, n, families, prune=settings.prune)
    out = []
    for i in range(REUSE):
        m = n if i == 0 else int(rng.integers(3, n + 1))
        before = [Episode(e.task, e.codes[:m], e.y[:m], e.luck[:m]) for e in episodes]
        out.append(to_batch(before, [draw_queries(e, rng, settings.queries) for e in before], rng))
    return out


@cache
def held_out(lengths: tuple[int, ...] = (8, 16, 32, 64), number: int = 36) -> list[Batch]:
    """Tasks that no training sees."""
    out = []
    for n in lengths:
        for i in range(number // 12):
            rng = np.random.default_rng([HELD_OUT, n, i])
            episodes = draw_episodes(rng, 12, n)
            out.append(to_batch(episodes, [draw_queries(e, rng, 64) for e in episodes], rng))
    return out


@torch.no_grad()
def judge(model: Ranker, batches: list[Batch]) -> dict[str, float]:
    """Losses on held-out tasks; rank correlation of the model's and of the Gaussian process's means with the scores;
    and how often a score lies in the predicted 80 % interval."""
    from scipy.stats import spearmanr

    rows: dict[str, list[float]] = {}
    for b in batches:
        p = model(b)
        for k, v in loss_of(p, b.target).items():
            rows.setdefault(k, []).append(float(v))
        inside = p.below(b.target)
        rows.setdefault("covered80", []).append(float(((inside > 0.1) & (inside < 0.9)).float().mean()))
        for name, mean in (("spearman", p.expected()), ("spearman_plain", p.plain_mean)):
            r = [spearmanr(m, t)[0] for m, t in zip(mean.numpy(), b.target.numpy(), strict=True) if t.std() > 0]
            rows.setdefault(name, []).append(float(np.nanmean(r)))
    return {k: float(np.mean(v)) for k, v in rows.items()}


def train(settings: Training, folder: Path, *, resume: bool = False, every: int = 400,
          say: Callable[[str], None] = print) -> Ranker:
    """Trains, and writes ``weights.safetensors`` (a running mean of the weights) into a folder.

    Args:
        settings: what to train.
        folder: checkpoint, TensorBoard events and weights.
        resume: go on with what is there.
        every: updates between two checkpoints.
        say: gets a line with every checkpoint.

    Raises:
        LacerError: an unknown family; or the folder holds a training and ``resume`` is not set, none to resume, or one
            with other settings.
    """
    from torch.utils.tensorboard import SummaryWriter

    from lacer.search.ranker.weights import save

    for name in settings.without:
        if name not in FAMILIES:
            raise LacerError(f"there is no family {name!r}{did_you_mean(name, FAMILIES)}")
    if set(settings.without) == set(FAMILIES):
        raise LacerError("without every family there is nothing to train on")
    every = max(REUSE, every - every % REUSE)  # a checkpoint never lies between updates that share their searches
    there = folder / "checkpoint.pt"
    if there.exists() and not resume:
        raise LacerError(f"{folder} holds a training already; to go on with it: --resume, or choose another --out")
    if resume and not there.exists():
        raise LacerError(f"{folder} holds no training to resume")
    folder.mkdir(parents=True, exist_ok=True)
    plain = asdict(settings) | {"without": list(settings.without)}  # as JSON has it
    torch.manual_seed(settings.seed)
    size = Size(width=settings.width, layers=settings.layers)
    model, steady = Ranker(size), Ranker(size)
    steady.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), settings.rate, betas=(0.9, 0.98), weight_decay=0.01)
    first = 0
    if resume:
        old = read_json(folder / "settings.json")
        if {**old, "steps": 0} != {**plain, "steps": 0}:
            raise LacerError(f"{folder} was trained with other settings: {old}")
        state = torch.load(there, weights_only=True)
        model.load_state_dict(state["model"])
        steady.load_state_dict(state["steady"])
        optimizer.load_state_dict(state["optimizer"])
        first = int(state["step"])
        if settings.steps != old["steps"] and first > (1 - DECAY) * min(settings.steps, old["steps"]):
            raise LacerError(f"{folder} has done {first} of {old['steps']} updates, so the learning rate is falling "
                             f"(or would with {settings.steps}): its number of updates is fixed now")
    write_whole(folder / "settings.json", json.dumps(plain, indent=1) + "\n")
    writer = SummaryWriter(str(folder), purge_step=first)
    waiting: list[Batch] = []
    test, sums, start, skipped = held_out(), dict[str, float](), time.perf_counter(), 0
    for step in range(first, settings.steps):
        warm = min(1.0, (step + 1) / 200)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * warm * min(1.0, (settings.steps - step) / (DECAY * settings.steps))
        if step % REUSE == 0 or not waiting:
            waiting = examples(model, settings, step - step % REUSE)[step % REUSE:]
        batch = waiting.pop(0)
        losses = loss_of(model(batch), batch.target)
        loss = losses["density"] + 0.3 * losses["plain"] + 0.3 * losses["top"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if torch.isfinite(norm):
            optimizer.step()
        else:
            skipped += 1
        with torch.no_grad():
            decay = min(0.999, (step + 1) / (step + 10))
            for a, b in zip(steady.parameters(), model.parameters(), strict=True):
                a.lerp_(b, 1 - decay)
        for k, v in losses.items():
            sums[k] = sums.get(k, 0.0) + float(v.detach())
        if (step + 1) % every == 0 or step + 1 == settings.steps:
            done = step % every + 1
            seconds = time.perf_counter() - start
            found = judge(steady, test)
            for k, value in found.items():
                writer.add_scalar(f"held_out/{k}", value, step + 1)
            for k, s in sums.items():
                writer.add_scalar(f"train/{k}", s / done, step + 1)
            writer.add_scalar("train/seconds_per_step", seconds / done, step + 1)
            writer.flush()
            torch.save({"model": model.state_dict(), "steady": steady.state_dict(), "step": step + 1,
                        "optimizer": optimizer.state_dict()}, there.with_suffix(".tmp"))
            there.with_suffix(".tmp").replace(there)
            save(steady, folder / "weights.safetensors", plain | {"done": step + 1})
            say(f"{step + 1}/{settings.steps}  {seconds / done:.2f} s/step  train " + "  ".join(
                f"{k} {s / done:.3f}" for k, s in sums.items()) + "  held out " + "  ".join(
                f"{k} {v:.3f}" for k, v in found.items()) + (f"  skipped {skipped}" if skipped else ""))
            sums, start, skipped = {}, time.perf_counter(), 0
    writer.close()
    return steady


