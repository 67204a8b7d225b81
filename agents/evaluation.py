"""What is asked of a candidate, and what comes back: plain data that travels as JSON."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Status = Literal["ok", "failed", "pruned"]
Shortcut = Literal["fused_adam", "channels_last", "halves", "overlap", "bf16"]
"""Ways to train faster whose numbers differ from the plain ones; see :class:`lacer.agents.learner.CompositePPO`."""


class PPOConfig(BaseModel):
    """PPO's hyper-parameters, the same for all candidates of a search (Schulman et al. 2017; names as in SB3)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_envs: int = Field(2, ge=1, description="environments per candidate")
    n_steps: int = Field(128, ge=2, description="steps of a rollout, per environment")
    batch_size: int = Field(128, ge=2, description="samples of a minibatch")
    n_epochs: int = Field(6, ge=1, description="passes over each rollout")
    learning_rate: float = Field(1e-3, gt=0, description="Adam's step size")
    gamma: float = Field(0.97, gt=0, le=1, description="discount factor")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="lambda of generalised advantage estimation")
    clip_range: float = Field(0.2, gt=0, description="clipping of the policy ratio")
    ent_coef: float = Field(0.0, ge=0, description="weight of the entropy bonus")
    vf_coef: float = Field(0.5, ge=0, description="weight of the value loss")
    max_grad_norm: float = Field(0.5, gt=0, description="gradient clipping")
    head: tuple[int, ...] = Field((64,), description="hidden layers of actor and critic after the encoder")
    use_sde: bool = Field(False, description="state-dependent exploration (gSDE, Raffin et al. 2021) instead of fresh "
                                             "noise in every step; for continuous actions")
    sde_sample_freq: int = Field(-1, ge=-1, description="steps after which gSDE draws new noise; -1: once a rollout")
    log_std_init: float = Field(-0.7, description="initial log standard deviation of a continuous policy")
    shortcuts: tuple[Shortcut, ...] = Field((), description="ways to train faster whose numbers differ from the plain "
                                            "ones: fused_adam, channels_last, halves, overlap, bf16")


class Protocol(BaseModel):
    """How every candidate is trained and evaluated."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(10_000, ge=1, description="environment steps of training per candidate")
    eval_episodes: int = Field(10, ge=1, description="evaluation episodes, on held-out seeds, greedy actions")
    eval_seed: int = Field(1_000_000, ge=0, description="seed of the first evaluation episode; the others follow")
    checkpoint_every: int = Field(0, ge=0, description="steps after which a training is saved, to go on from there if "
                                                       "its process is killed, and begins new episodes; 0: never")
    ppo: PPOConfig = PPOConfig()


class RunRequest(BaseModel):
    """One PPO run: train the encoder, evaluate, probe. ``encoder=None`` evaluates "do nothing" (or random actions
    where the task has no such action) without training.

    Attributes:
        save_to: folder for the trained agent; None: it is not kept.
        checkpoint: file that holds how far the training is, from which it goes on, and which is gone when the run has
            ended; used if the protocol says ``checkpoint_every``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    env: str
    env_kwargs: dict[str, Any] = {}
    eval_env_kwargs: dict[str, Any] = {}
    encoder: dict[str, Any] | None
    protocol: Protocol
    seed: int = 0
    text_model: str = "all-MiniLM-L6-v2"
    save_to: str | None = None
    checkpoint: str | None = None


class Call(BaseModel):
    """One call of a plain Python function, for searches whose objective is not a PPO run.

    Attributes:
        function: ``module:name`` of a function that takes ``point`` and returns a number or an Evaluation.
        point: the architecture, a decision's option by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    function: str
    point: dict[str, Any]
    seed: int = 0


class Training(BaseModel):
    """What a designer trains on the environment by itself, before it proposes.

    Attributes:
        function: ``module:name`` of a function that takes this request and one to report progress with (as that of
            :func:`lacer.agents.run`), and returns an Evaluation with what it ``found``.
        decisions: the search space, options by decision.
        steps: environment steps that it may take.
        options: the designer's own.
        checkpoint: file that holds how far it is, from which it goes on; None: none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    function: str
    env: str
    env_kwargs: dict[str, Any] = {}
    eval_env_kwargs: dict[str, Any] = {}
    decisions: dict[str, list[Any]]
    protocol: Protocol
    steps: int
    options: dict[str, Any] = {}
    seed: int = 0
    text_model: str = "all-MiniLM-L6-v2"
    checkpoint: str | None = None


Job = RunRequest | Call | Training
JOBS: dict[str, type[RunRequest] | type[Call] | type[Training]] = {
    "request": RunRequest, "call": Call, "training": Training}
"""Kinds of jobs, by the name under which one is sent to a worker."""


class Cost(BaseModel):
    """What a run cost."""

    parameters: int = 0
    parameters_by_module: dict[str, int] = {}
    env_steps: int = Field(0, description="environment steps of training and evaluation")
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    probe_seconds: float = 0.0
    total_seconds: float = 0.0
    steps_per_second: float = Field(0.0, description="training steps per second of training")


class Evaluation(BaseModel):
    """The outcome of a run.

    Attributes:
        status: ``ok``, ``failed`` or ``pruned`` (ended early as hopeless); ``reason`` says why.
        objective: mean task metric over the evaluation episodes.
        returns, metrics: per evaluation episode, in the order of ``episode_seeds``.
        curve: (environment steps, mean return of the training episodes that ended since the last point).
        probes: by source, and ``fused``: probe name -> value.
        found: what a designer's own training found, plain data; empty for candidates.
    """

    status: Status = "ok"
    reason: str = ""
    objective: float | None = None
    mean_return: float | None = None
    returns: list[float] = []
    metrics: dict[str, list[float]] = {}
    episode_seeds: list[int] = []
    curve: list[tuple[int, float]] = []
    probes: dict[str, dict[str, float]] = {}
    cost: Cost = Cost()
    found: dict[str, Any] = {}
    seed: int = 0
    versions: dict[str, str] = {}

    @classmethod
    def failure(cls, reason: str, seed: int = 0, **kwargs: Any) -> Evaluation:
        """A run that did not end well."""
        return cls(status="failed", reason=reason[:2000], seed=seed, **kwargs)

    @property
    def ok(self) -> bool:
        """Whether there is a finite result."""
        return self.status == "ok" and self.objective is not None and math.isfinite(self.objective)
