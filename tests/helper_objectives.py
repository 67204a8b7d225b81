"""Objectives that worker processes find by name."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import optuna

from lacer.agents import Evaluation


def smooth(point: dict[str, Any]) -> float:
    """Larger for larger options; the same everywhere."""
    return float(sum(v for v in point.values() if isinstance(v, int)))


def jittered(point: dict[str, Any]) -> float:
    """The same after a time that differs each time, so results arrive in any order."""
    time.sleep(os.urandom(1)[0] / 255 * 0.05)
    return smooth(point)


def a_while(point: dict[str, Any]) -> float:
    time.sleep(0.2)
    return smooth(point)


def greedy(point: dict[str, Any]) -> float:
    """Takes half a GB of memory and waits."""
    block = np.ones(64_000_000)
    time.sleep(30)
    return float(block[0])


def moody(point: dict[str, Any]) -> float:
    """Fails, is pruned, gives NaN, or dies, as the point says."""
    mood = point["mood"]
    if mood == "raise":
        raise RuntimeError("boom")
    if mood == "prune":
        raise optuna.TrialPruned("hopeless")
    if mood == "nan":
        return float("nan")
    if mood == "die":
        os._exit(3)
    return 1.0


def where(point: dict[str, Any]) -> Evaluation:
    """Takes a second; says, also in a file, on which Ray node it ran, and which secrets it sees."""
    node = os.environ["LACER_NODE"]
    with open(os.environ["LACER_TRACE"], "a") as f:
        f.write(f"{node}\n")
    time.sleep(1.0)
    leaked = [k for k, v in os.environ.items() if "planted" in v]
    return Evaluation(objective=smooth(point), reason=f"{node} {leaked}")
