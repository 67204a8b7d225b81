"""How long encoders take to build, and what the composite adds to the work of its blocks.

    python benchmarks/encoders.py [specs=30] [batch=64] [repeats=20] [seed=0]

For random encoders of every registered environment, on one thread: the median time to build a spec (goal: at most
50 ms), the time to predict its cost without building it, and the forward pass of the composite against the sum of its
blocks run alone on the same inputs (goal: at most 1.1). The blocks alone get inputs that are scaled already and, for
text, looked up already; what the composite does beside them is that, the check for NaN and the routing. Composite and
blocks take turns, so that other work on the machine disturbs both; each time is the thread's own, the median of the
repeats. The text model is a stand-in, since the real one embeds each string once. Ends with one line of JSON.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lacer.encoders import CompositeEncoder, EncoderSpec, build, cost, predict
from lacer.envs import TaskCard, list_envs, task_card
from lacer.search.space import EncoderSpace

WIDTH = 384
"""Of the text embeddings."""


def milliseconds(work: Callable[[], Any]) -> float:
    """CPU time of this thread."""
    start = time.thread_time()
    work()
    return 1000 * (time.thread_time() - start)


def blocks_alone(encoder: CompositeEncoder, obs: dict[str, torch.Tensor]) -> list[Callable[[], Any]]:
    """One call per block, and one of the fusion, on inputs made beforehand."""
    inputs: dict[torch.nn.Module, tuple[Any, ...]] = {}
    modules = [*encoder.blocks.values(), encoder.fusion]
    hooks = [m.register_forward_pre_hook(lambda m, args: inputs.update({m: args})) for m in modules]
    encoder(obs)
    for h in hooks:
        h.remove()
    return [lambda m=m: m(*inputs[m]) for m in modules]  # type: ignore[misc]


def measure(spec: EncoderSpec, card: TaskCard, batch: int, repeats: int) -> dict[str, float]:
    """Figures of one encoder, in milliseconds."""
    table = cost.StandInTable(WIDTH)
    built = statistics.median(milliseconds(lambda: build(spec, card, table)) for _ in range(3))
    predicted = milliseconds(lambda: predict(spec, card, WIDTH))
    table.sentence = _fixed(table.sentence)  # type: ignore[method-assign]
    table.tokens = _fixed(table.tokens)  # type: ignore[method-assign]
    encoder = build(spec, card, table).eval()
    obs = cost.observation(card, spec.sources, batch)
    with torch.inference_mode():
        parts = blocks_alone(encoder, obs)
        whole, alone = [], []
        for _ in range(repeats + 2):
            whole.append(milliseconds(lambda: encoder(obs)))
            alone.append(sum(milliseconds(part) for part in parts))
    w, a = statistics.median(whole[2:]), statistics.median(alone[2:])
    return {"build": built, "predict": predicted, "composite": w, "blocks": a, "ratio": w / a}


def _fixed(look_up: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
    """A look-up that answers the same, as a table does that has its strings embedded."""
    answers: dict[int, Any] = {}

    def fixed(index: torch.Tensor) -> Any:
        if len(index) not in answers:
            answers[len(index)] = look_up(index)
        return answers[len(index)]

    return fixed


def main(arguments: list[str]) -> None:
    """Command line."""
    given = {"specs": 30, "batch": 64, "repeats": 20, "seed": 0}
    try:
        named = {k: int(v) for k, v in (a.split("=", 1) for a in arguments)}
    except ValueError:
        sys.exit(__doc__)
    if set(named) - set(given):
        sys.exit(__doc__)
    given |= named
    torch.set_num_threads(1)
    columns = ("build", "predict", "composite", "blocks", "ratio")
    print(f"{'environment':26}" + "".join(f"{c:>11}" for c in columns) + "   (medians; ms, but for the ratio)")
    every: list[dict[str, float]] = []
    for env in list_envs():
        card = task_card(env)
        space, rng = EncoderSpace(card), np.random.default_rng(given["seed"])
        predict(space.to_spec(space.sample(rng)), card, WIDTH)  # imports what it needs
        rows = [measure(space.to_spec(space.sample(rng)), card, given["batch"], given["repeats"])
                for _ in range(given["specs"])]
        print(f"{env:26}" + "".join(f"{statistics.median(r[c] for r in rows):11.3f}" for c in columns))
        every += rows
    result = {c: round(statistics.median(r[c] for r in every), 3) for c in columns}
    ratios = sorted(r["ratio"] for r in every)
    most = round(ratios[int(0.9 * len(ratios))], 3)
    print(f"ratio: 90 % of the encoders are below {most:.3f}, the largest is {ratios[-1]:.3f}")
    print(json.dumps({"benchmark": "encoders", **given, "median": result, "ratio_90": most,
                      "build_goal_met": result["build"] <= 50, "forward_goal_met": result["ratio"] <= 1.1,
                      "torch": torch.__version__, "machine": platform.machine()}))


if __name__ == "__main__":
    main(sys.argv[1:])
