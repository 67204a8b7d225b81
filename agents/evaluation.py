"""What is asked of a candidate, and what comes back: plain data that travels as JSON."""

from __future__ import annotations

import math
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lacer.envs.errors import LacerError

Status = Literal["ok", "failed", "pruned"]
Shortcut = Literal["fused_adam", "channels_last", "batched_ends", "halves", "microbatches", "overlap", "bf16"]
"""Ways to train faster, or in less memory, whose numbers differ from the plain ones; see
:class:`lacer.agents.learner.CompositePPO`."""


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
                                            "ones, or in less memory: fused_adam, channels_last, batched_ends, "
                                            "halves, microbatches, overlap, bf16")
    microbatch_size: int = Field(128, ge=1, description="samples whose activations are in memory at a time, with the "
                                                        "shortcut microbatches")


class Protocol(BaseModel):
    """How every candidate is trained and evaluated."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(10_000, ge=1, description="environment steps of training per candidate")
    eval_episodes: int = Field(10, ge=1, description="evaluation episodes, on held-out seeds, greedy actions")
    eval_seed: int = Field(1_000_000, ge=0, description="seed of the first evaluation episode; the others follow")
    probes: tuple[str, ...] | None = Field(None, description="probes to take; all unless set, none if empty")
    probe_at: tuple[float, ...] = Field((), description="shares of the training after which probes are taken too, on "
                                                        "the training's own rollouts")
    probe_rows: int = Field(512, ge=8, description="observations that the probes look at")
    permuted_episodes: int = Field(0, ge=0, description="evaluation episodes for each used source in which it shows "
                                                        "other moments, for the probe permuted_return")
    stop_rank: float | None = Field(None, ge=0, le=1, description="end a run if the fused state's effective rank is "
                                                                  "below this at a point of probe_at")
    stop_dead: float | None = Field(None, ge=0, le=1, description="end a run if more than this share of the fusion's "
                                                                  "units is dead at a point of probe_at")
    checkpoint_every: int = Field(0, ge=0, description="steps after which a training is saved, to go on from there if "
                                                       "its process is killed, and begins new episodes; 0: never")
    ppo: PPOConfig = PPOConfig()

    @field_validator("probe_at")
    @classmethod
    def _within(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < x < 1 for x in value):
            raise ValueError(f"must be shares of the training between 0 and 1, not {list(value)}")
        return value

    @field_validator("probes")
    @classmethod
    def _known(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value:
            from lacer.agents.probes import chosen  # imports torch

            try:
                chosen(value)
            except LacerError as e:
                raise ValueError(str(e)) from None
        return value

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if not self.probe_at and (self.stop_rank is not None or self.stop_dead is not None):
            raise ValueError("stop_rank and stop_dead look at the probes of mid-training: set probe_at, e.g. to [0.3]")
        if self.probe_at and "overlap" in self.ppo.shortcuts:
            raise ValueError("probe_at needs the environments' states, which the shortcut overlap does not wait for: "
                             "choose one of them")
        if self.permuted_episodes > self.eval_episodes:
            raise ValueError(f"permuted_episodes ({self.permuted_episodes}) are the first of the evaluation's, "
                             f"of which there are {self.eval_episodes}")
        return self


def check_seeds(seed: int, protocol: Protocol) -> None:
    """Raises LacerError if a training that begins with a seed would play episodes of its evaluation: environment ``i``
    begins with ``seed + i``."""
    first, last = protocol.eval_seed, protocol.eval_seed + protocol.eval_episodes - 1
    if seed <= last and seed + protocol.ppo.n_envs > first:
        raise LacerError(f"seed {seed} is among the evaluation's, {first} to {last} (protocol.eval_seed and "
                         "eval_episodes), which a training must not play: choose another one")


class WarmStart(BaseModel):
    """Weights that a run begins with.

    Attributes:
        path: checkpoint of another run.
        trial: number of the trial that it is of.
        modules: sources whose blocks are taken from it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    trial: int
    modules: tuple[str, ...]


class RunRequest(BaseModel):
    """One PPO run: train the encoder, evaluate, probe. ``encoder=None`` evaluates "do nothing" (or random actions
    where the task has no such action) without training.

    Attributes:
        save_to: folder for the trained agent; None: it is not kept.
        checkpoint: file that holds how far the training is, from which it goes on, and which is gone when the run has
            ended; used if the training is cut into parts, by the protocol's ``checkpoint_every`` or by ``pauses``.
        pauses: environment steps after which a part of the training ends; see :mod:`lacer.agents.parts`.
        until: the pause at which the run ends for now. Its checkpoint stays, and the same request with a later pause,
            or none, goes on from there.
        pause_episodes: evaluation episodes at a pause.
        keep_checkpoint: it stays when the run has ended, too.
        warm_start: weights to begin with; None: none.
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
    pauses: tuple[int, ...] = ()
    until: int | None = None
    pause_episodes: int = 0
    keep_checkpoint: bool = False
    warm_start: WarmStart | None = None

    @property
    def in_parts(self) -> bool:
        """Whether the training is cut into parts."""
        return bool(self.protocol.checkpoint_every or self.pauses)


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


class Rung(BaseModel):
    """What a candidate showed at a rung of successive halving, part of the way through its training.

    Attributes:
        steps: environment steps of training until there.
        scores: by signal, higher is better; empty if there was none.
        promoted: whether it went on.
        eval_steps, eval_seconds: what its evaluation there took.
        total_seconds: wall time of its run since the rung before.
    """

    steps: int
    scores: dict[str, float]
    promoted: bool
    eval_steps: int = 0
    eval_seconds: float = 0.0
    total_seconds: float = 0.0


class Evaluation(BaseModel):
    """The outcome of a run.

    Attributes:
        status: ``ok``, ``failed`` or ``pruned`` (ended early as hopeless); ``reason`` says why.
        objective: mean task metric over the evaluation episodes.
        returns, metrics: per evaluation episode, in the order of ``episode_seeds``.
        curve: (environment steps, mean return of the training episodes that ended since the last point).
        probes: by source, and ``fused``: probe name -> value, from the evaluation episodes.
        probe_curve: (environment steps, probes) in mid-training, as the protocol's ``probe_at`` asks, from the
            training's rollouts.
        found: what a designer's own training found, plain data; empty for candidates.
        paused_at: environment steps after which the run was paused, as its request asked; None: it has ended.
        rungs: those of successive halving that the candidate has reached.
        warm_start: the weights that it began with; None: with random ones only.
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
    probe_curve: list[tuple[int, dict[str, dict[str, float]]]] = []
    cost: Cost = Cost()
    found: dict[str, Any] = {}
    paused_at: int | None = None
    rungs: list[Rung] = []
    warm_start: WarmStart | None = None
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
