"""What a search or a comparison would take: candidates, environment steps, hours from a short measured run, tokens."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lacer.agents import Cost
from lacer.envs import LacerError
from lacer.search.config import SearchConfig, memory_share, own_steps, worker_count
from lacer.search.designers.base import designer_class
from lacer.search.executors import Executor, InProcess, ProcessPool

if TYPE_CHECKING:
    from lacer.search.loop import Plan

MEASURED_STEPS = 1000
"""Environment steps of the run that the time is estimated from."""

MEASURED_EPISODES = 2


@dataclass(frozen=True)
class Speed:
    """What a short run of the expert's encoder took on this machine, with all workers busy.

    Attributes:
        steps_per_second: of training, each worker.
        episode_seconds: of one evaluation episode.
        episode_steps: its environment steps.
        other_seconds: per candidate: making environments and networks, probes.
    """

    steps_per_second: float
    episode_seconds: float
    episode_steps: float
    other_seconds: float


@dataclass(frozen=True)
class Estimate:
    """What one search would take.

    Attributes:
        candidates: encoders to evaluate at most.
        steps: environment steps of their trainings.
        designer_steps: of the designer's own training.
        final_steps: of the final trainings of winner and expert.
        episodes: evaluation episodes, the final ones included.
        episode_steps: environment steps of these; None if not measured.
        seconds: wall time; None if not measured.
        requests, tokens: that a language model is asked, and reads at most; its replies come on top.
        limits: other budgets, which may end it earlier.
    """

    candidates: int
    steps: int
    designer_steps: int
    final_steps: int
    episodes: int
    episode_steps: int | None
    seconds: float | None
    requests: int
    tokens: int
    limits: tuple[str, ...]


def measure(plan: Plan, steps: int = MEASURED_STEPS) -> Speed:
    """Trains and evaluates the expert's encoder for a moment, on as many workers of this machine as a search would use.

    Raises:
        LacerError: it fails.
    """
    from lacer.search.loop import run_request

    c = plan.config
    workers = worker_count(c) if c.executor != "ray" else 1
    protocol = c.protocol.model_copy(update={"steps": steps, "eval_episodes": min(
        MEASURED_EPISODES, c.protocol.eval_episodes)})
    spec = plan.space.to_spec(plan.expert)
    with tempfile.TemporaryDirectory(prefix="lacer-") as folder:
        executor: Executor = InProcess() if c.executor == "inprocess" else ProcessPool(
            workers, Path(folder) / "workers.log", c.timeout, c.memory or memory_share(workers))
        costs: list[Cost] = []
        try:
            for i in range(workers):
                executor.submit(str(i), run_request(c, spec, protocol, c.seed + i))
            while len(costs) < workers:
                for event in executor.poll(0.5):
                    if event.evaluation is None:
                        continue
                    if not event.evaluation.ok:
                        raise LacerError(f"the run to measure the speed failed: {event.evaluation.reason}")
                    costs.append(event.evaluation.cost)
        finally:
            executor.close()

    def mean(values: Iterable[float]) -> float:
        return sum(values) / workers

    episodes = protocol.eval_episodes
    rollout = c.protocol.ppo.n_envs * c.protocol.ppo.n_steps
    trained = math.ceil(steps / rollout) * rollout  # whole rollouts
    return Speed(mean(x.steps_per_second for x in costs), mean(x.eval_seconds for x in costs) / episodes,
                 max(0.0, mean(x.env_steps for x in costs) - trained) / episodes,
                 mean(max(0.0, x.total_seconds - x.train_seconds - x.eval_seconds) for x in costs))


def estimate(plan: Plan, speed: Speed | None) -> Estimate:
    """What a search would take if nothing fails and nothing ends it early, as rungs do."""
    c: SearchConfig = plan.config
    cls: Any = designer_class(plan.designer)
    own = own_steps(c) if cls.trains else 0
    candidates, further = c.candidates, c.fidelity.survivors * c.fidelity.survivor_seeds
    if c.max_env_steps is not None:
        each = c.protocol.steps + (round(speed.episode_steps * c.protocol.eval_episodes) if speed is not None else 0)
        candidates = min(candidates, max(1, max(0, c.max_env_steps - own) // each - further))
    turns = math.ceil(max(0, candidates - int(c.expert_first)) / c.batch) if cls.needs_llm else 0
    requests = turns * getattr(cls, "requests", 0)
    tokens = 0
    if requests:
        from lacer.search.llm.prompt import MAX_TOKENS

        tokens = requests * MAX_TOKENS
    episodes = (candidates + further) * c.protocol.eval_episodes + 3 * c.final_episodes
    seconds = None
    if speed is not None:
        workers = worker_count(c)
        one = c.protocol.steps / speed.steps_per_second + c.protocol.eval_episodes * speed.episode_seconds \
            + speed.other_seconds
        final = c.final_steps / speed.steps_per_second + c.final_episodes * speed.episode_seconds + speed.other_seconds
        seconds = (math.ceil((candidates + further) / workers) * one + own / speed.steps_per_second
                   + math.ceil(2 / workers) * final)
    limits = [f"{name} {value:,}" for name, value in (
        ("max_env_steps", c.max_env_steps), ("max_seconds", c.max_seconds), ("max_tokens", c.max_tokens))
        if value is not None]
    return Estimate(candidates, (candidates + further) * c.protocol.steps, own, 2 * c.final_steps, episodes,
                    None if speed is None else round(episodes * speed.episode_steps), seconds, requests, tokens,
                    tuple(limits))


def figures(plans: Sequence[tuple[str, Plan]], speeds: Sequence[Speed | None]) -> dict[str, Any]:
    """Estimates of some searches by name, and their sum, as plain data."""
    parts = [estimate(p, s) for (_, p), s in zip(plans, speeds, strict=True)]
    measured = all(e.seconds is not None for e in parts)
    total = {k: sum(getattr(e, k) for e in parts)
             for k in ("candidates", "steps", "designer_steps", "final_steps", "episodes", "requests", "tokens")}
    total["env_steps"] = total["steps"] + total["designer_steps"] + total["final_steps"] + sum(
        e.episode_steps or 0 for e in parts)
    return {"searches": [{"name": n, "env": p.config.env, "designer": p.designer, "encoders": p.space.size(),
                          **asdict(e)} for (n, p), e in zip(plans, parts, strict=True)],
            "speeds": [None if s is None else asdict(s) for s in dict.fromkeys(speeds)],
            "total": total | {"hours": sum(e.seconds or 0.0 for e in parts) / 3600 if measured else None}}


def describe(plans: Sequence[tuple[str, Plan]], speeds: Sequence[Speed | None]) -> str:
    """The plan in words and numbers, for a terminal."""
    data = figures(plans, speeds)
    lines = []
    width = max(len(n) for n, _ in plans)
    for part, (_, plan) in zip(data["searches"][:40], plans, strict=False):
        c = plan.config
        lines.append(f"{part['name']:{width}}  {part['env']}, {part['designer']}: {part['candidates']} candidates x "
                     f"{c.protocol.steps:,} steps"
                     + (f", {part['designer_steps']:,} steps of its own" if part["designer_steps"] else "")
                     + (f", {part['requests']:,} LLM requests" if part["requests"] else "")
                     + ("" if part["seconds"] is None else f", about {duration(part['seconds'])}")
                     + "".join(f"; ends at {x}" for x in part["limits"]))
    if len(plans) > 40:
        lines.append(f"and {len(plans) - 40} more searches")
    c, t = plans[0][1].config, data["total"]
    lines += ["", f"{plans[0][1].space.size():.3g} encoders possible; {worker_count(c)} candidates at once "
                  f"({c.executor})",
              f"Candidates:         {t['candidates']:,}",
              f"Environment steps:  {t['env_steps']:,}: {t['steps']:,} of candidates, {t['designer_steps']:,} of "
              f"designers’ own training, {t['final_steps']:,} of final trainings, "
              + (f"{t['env_steps'] - t['steps'] - t['designer_steps'] - t['final_steps']:,} of evaluations"
                 if t["hours"] is not None else f"and {t['episodes']:,} evaluation episodes on top")]
    if t["requests"]:
        lines.append(f"LLM:                {t['requests']:,} requests, at most {t['tokens']:,} tokens in; replies of "
                     f"some hundred tokens each, at most {c.llm_max_output_tokens:,}")
        if c.llm_price_in is not None:
            lines.append(f"                    at most {t['tokens'] * c.llm_price_in / 1e6:,.2f} US dollars for what "
                         "it reads")
    else:
        lines.append("LLM:                none")
    if t["hours"] is not None:
        lines.append(f"Time:               about {t['hours']:.2g} hours ({duration(3600 * t['hours'])}), from "
                     f"{MEASURED_STEPS:,} measured steps: " + "; ".join(
                         f"{s['steps_per_second']:,.0f} steps/s a worker, {s['episode_seconds']:.2g} s an evaluation "
                         "episode" for s in data["speeds"] if s))
        if c.executor == "ray":
            lines.append("                    measured on this machine, not on the cluster")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``7.5 h``, ``12 days``."""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.{1 if unit == 3600 else 0}f} {name}"
    return f"{seconds / 86_400:.0f} days"
