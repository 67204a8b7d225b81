"""The configuration of a search: one pydantic model behind the command line, YAML files and ``search()``."""

from __future__ import annotations

import contextlib
import os
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lacer.agents.evaluation import Protocol
from lacer.encoders.limits import Limits
from lacer.envs import LacerError, TaskCard, did_you_mean

if TYPE_CHECKING:
    from lacer.encoders import EncoderSpec


class SearchConfig(BaseModel):
    """Everything that a search depends on. API keys are not part of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    env: str = Field("lacer/MixedTraffic-v0", description="registered environment id, or module:id")
    env_kwargs: dict[str, Any] = Field({}, description="constructor arguments of the environment")
    eval_env_kwargs: dict[str, Any] = Field({}, description="arguments that differ in evaluation, e.g. other wordings")
    designer: str = Field("auto", description="who proposes encoders; see `lacer designers`. auto: lacer if an LLM is "
                                              "given, else the best designer that needs none")
    designer_kwargs: dict[str, Any] = Field({}, description="options of the designer, e.g. {'population': 16}")
    candidates: int = Field(20, ge=1, description="encoders to evaluate, the expert's included")
    seed: int = Field(0, ge=0, description="seed of the designer and of all training runs")
    workers: int = Field(0, ge=0, description="candidates evaluated at once; 0: one per CPU core")
    protocol: Protocol = Field(Protocol(), description="how a candidate is trained and evaluated")
    final_steps: int = Field(50_000, ge=1, description="environment steps of the final training of the winner and of "
                                                       "the expert's encoder")
    final_episodes: int = Field(20, ge=2, description="episodes of the final evaluation, on seeds that took no part "
                                                      "in the search")
    timeout: float = Field(7200, gt=0, description="seconds after which a run is ended and counted as failed")
    memory: float | None = Field(None, gt=0, description="GB that a candidate may use, its environments included; "
                                                         "default: an equal share of the machine's memory")
    max_env_steps: int | None = Field(None, ge=1, description="environment steps after which no candidate starts; "
                                                              "designers' own trainings and evaluations count")
    max_seconds: float | None = Field(None, gt=0, description="wall time after which no candidate starts, over all "
                                                              "sessions of a resumed search")
    max_tokens: int | None = Field(None, ge=1, description="LLM tokens, in and out, after which no candidate starts")
    repeats: Literal["reject", "reuse", "add"] = Field(
        "reject", description="an encoder that was proposed before is rejected, takes over the result, or is evaluated "
                              "again under another seed (its score is then the mean)")
    deterministic: bool = Field(False, description="the order in which results arrive does not change what is "
                                                   "proposed; workers may wait for each other")
    ahead: int | None = Field(None, ge=0, description="proposals to have ready before a worker is free; default: 1 "
                                                      "with an LLM, else 0")
    executor: Literal["process", "inprocess", "ray"] = Field(
        "process", description="where candidates run: worker processes on this machine, this process (to debug), or a "
                               "Ray cluster")
    ray_address: str | None = Field(None, description="Ray cluster to join, e.g. auto or ray://host:10001; default: "
                                                      "one is started on this machine")
    cpus_per_candidate: float = Field(1, gt=0, description="CPU cores that a candidate takes on a Ray cluster")
    gpus_per_candidate: float = Field(0, ge=0, description="GPUs that a candidate takes on a Ray cluster")
    storage: str | None = Field(None, description="Optuna storage URL, e.g. postgresql+psycopg://user@host/database; "
                                                  "default: study.db in the run folder")
    study_name: str | None = Field(None, description="Optuna study name; default: the run folder's name")
    space: dict[str, Any] | str = Field({}, description="search space: a preset (full, quick, paper, minigrid), a YAML "
                                                              "file, or options by decision, e.g. {'*.mlp.width': "
                                                              "[16, 32]}")
    limits: Limits = Field(Limits(), description="what an encoder may cost; larger proposals are rejected")
    expert: str | None = Field(None, description="encoder.json of the first candidate; default: a sensible one by hand")
    text_model: str = Field("all-MiniLM-L6-v2", description="frozen text model: name, local folder, or hash (none)")
    llm: str | None = Field(None, description="openai:MODEL, anthropic:MODEL, or replay:FILE")
    llm_base_url: str | None = Field(None, description="URL of any OpenAI-compatible server")
    llm_temperature: float | None = Field(None, ge=0, description="sampling temperature of the LLM; default: the "
                                                                  "designer's, 0 for genius, 1 for the others")
    llm_timeout: float = Field(120, gt=0, description="seconds that the LLM may take for a reply")
    batch: int = Field(1, ge=1, description="encoders that an LLM designer asks for at once")
    wandb: Literal["auto", "online", "offline", "off"] = Field(
        "auto", description="Weights & Biases; auto: online if logged in, else offline")
    wandb_project: str = Field("lacer", description="Weights & Biases project")


RESUMABLE = {"candidates", "workers", "timeout", "memory", "max_env_steps", "max_seconds", "max_tokens", "executor",
             "ray_address", "cpus_per_candidate", "gpus_per_candidate", "storage", "ahead", "llm", "llm_base_url",
             "llm_temperature", "llm_timeout", "batch", "wandb", "wandb_project"}
"""Fields that may be changed when a search is resumed; results before and after stay comparable."""


def validate(data: dict[str, Any], where: str) -> SearchConfig:
    """Checks plain data.

    Raises:
        LacerError: names ``where`` (a file; ``--`` for options), the key, what is wrong, and for unknown keys the
            nearest right one.
    """
    try:
        return SearchConfig.model_validate(data)
    except ValidationError as e:
        raise LacerError("\n".join(_explain(SearchConfig, err, where) for err in e.errors()[:5])) from None


def _explain(model: type[BaseModel], err: Any, where: str) -> str:
    key = ".".join(map(str, err["loc"]))
    if where == "--":  # the command line
        return f"--{key.replace('_', '-')}: {err['msg']} (got {str(err['input'])[:60]!r})"
    if err["type"] != "extra_forbidden":
        return f"{where}: {key}: {err['msg']} (got {str(err['input'])[:60]!r})"
    for part in err["loc"][:-1]:
        inner = model.model_fields[str(part)].annotation
        assert isinstance(inner, type)
        model = inner
    return f"{where}: unknown key {key!r}{did_you_mean(str(err['loc'][-1]), model.model_fields)}"


def expert_spec(card: TaskCard, path: str | None) -> EncoderSpec:
    """The expert's encoder: from a file, or a sensible one by modality (``configs/expert.yaml``).

    Raises:
        LacerError: if the file cannot be read or does not fit the task.
    """
    from lacer.encoders import EncoderSpec
    from lacer.search.space import expert_by_modality

    if path is not None:
        return EncoderSpec.load(path, card)
    blocks = yaml.safe_load((resources.files("lacer.configs") / "expert.yaml").read_text(encoding="utf-8"))
    return expert_by_modality(blocks, card)


def worker_count(config: SearchConfig) -> int:
    """Number of workers to use: as configured, or one per core, but no more than there are candidates."""
    if config.executor == "inprocess":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(config.workers or cores, max(config.candidates, 2))


def memory_share(workers: int) -> float | None:
    """GB of memory for each of some workers: of the machine, or of the container; None where neither is known."""
    known = []
    with contextlib.suppress(ValueError, OSError):
        known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(ValueError, OSError):  # "max" where there is no limit
        known.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(known) / 1e9 / workers if known else None
