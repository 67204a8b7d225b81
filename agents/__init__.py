"""PPO with a composite encoder: running, evaluating, probing, saving and loading agents."""

from lacer.agents.checkpoint import Agent, load
from lacer.agents.evaluation import Cost, Evaluation, PPOConfig, Protocol, RunRequest
from lacer.agents.run import run, versions

__all__ = ["Agent", "Cost", "Evaluation", "PPOConfig", "Protocol", "RunRequest", "load", "run", "versions"]
