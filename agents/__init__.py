"""PPO with a composite encoder: running, evaluating, probing, saving and loading agents."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lacer.agents.checkpoint import Agent, load
    from lacer.agents.evaluation import (
        Call,
        Cost,
        Evaluation,
        PPOConfig,
        Protocol,
        Rung,
        RunRequest,
        Training,
        WarmStart,
    )
    from lacer.agents.ppo import run, versions

_HOME = {"Agent": "checkpoint", "load": "checkpoint", "Call": "evaluation", "Cost": "evaluation",
         "Evaluation": "evaluation", "PPOConfig": "evaluation", "Protocol": "evaluation", "RunRequest": "evaluation",
         "Rung": "evaluation", "Training": "evaluation", "WarmStart": "evaluation", "run": "ppo", "versions": "ppo"}

__all__ = ["Agent", "Call", "Cost", "Evaluation", "PPOConfig", "Protocol", "RunRequest", "Rung", "Training",
           "WarmStart", "load", "run", "versions"]


def __getattr__(name: str) -> Any:
    # On demand: torch and SB3 take seconds to import, and a configuration needs neither.
    if name in _HOME:
        return getattr(importlib.import_module(f"lacer.agents.{_HOME[name]}"), name)
    raise AttributeError(f"module 'lacer.agents' has no attribute {name!r}")
