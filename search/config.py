"""The configuration of a search: one pydantic model behind the command line, YAML files and ``search()``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lacer.agents.evaluation import Protocol
from lacer.encoders.limits import Limits
from lacer.envs import LacerError, TaskCard, did_you_mean
from lacer.search.fidelity import Fidelity
from lacer.search.files import read_config

if TYPE_CHECKING:
    from lacer.encoders import EncoderSpec


FallbackName = Literal["evolution", "bo", "random", "stop"]
ReplyFormat = Literal["auto", "json_schema", "tool", "json_object", "plain"]
LARGEST_SEED = 2**31 - 1
"""NumPy takes seeds below 2**32, and environments and final trainings count on from a search's."""


class LLMFields(BaseModel):
    """The language model of the designers that need one. API keys are not part of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    llm: str | None = Field(None, description="openai:MODEL, anthropic:MODEL, replay:FILE (a recorded transcript), or "
                                              "human (answers from the terminal; human:- from a pipe)")
    llm_base_url: str | None = Field(None, description="address of any OpenAI-compatible server, e.g. "
                                                       "http://localhost:11434/v1")
    llm_temperature: float | None = Field(None, ge=0, le=2, description="sampling temperature of the LLM; default: the "
                                                                        "designer's, 0 for genius, 1 for the others")
    llm_seed: int | None = Field(None, description="sampling seed of the LLM, where the server knows one; default: the "
                                                   "search's seed")
    llm_format: ReplyFormat = Field("auto", description="what holds the LLM to the form of a reply: a JSON schema, a "
                                                        "tool call, the wish for a JSON object, or the prompt alone; "
                                                        "auto: tried in this order and remembered")
    llm_timeout: float = Field(180, gt=0, description="seconds until a request to the LLM is given up")
    llm_retries: int = Field(4, ge=0, le=20, description="further tries after HTTP 429, 5xx, timeouts and broken "
                                                         "connections")
    llm_repairs: int = Field(2, ge=0, le=10, description="how often an invalid reply goes back to the LLM with its "
                                                         "error before the fallback proposes")
    llm_max_output_tokens: int = Field(8192, ge=1, description="longest reply of the LLM, its thinking included")
    llm_token_limit: int | None = Field(None, ge=1, description="tokens, in and out, after which the LLM is not asked "
                                                                "any more and the fallback proposes")
    llm_request_limit: int | None = Field(None, ge=1, description="the same for requests, failed ones included")
    llm_cost_limit: float | None = Field(None, gt=0, description="the same for money, in US dollars; needs the prices")
    llm_price_in: float | None = Field(None, ge=0, description="US dollars per million tokens that the LLM reads")
    llm_price_out: float | None = Field(None, ge=0, description="US dollars per million tokens that the LLM writes")
    llm_fallback: FallbackName = Field(
        "evolution", description="who proposes where the LLM fails, is out of its limits or sends nothing valid; stop: "
                                 "the search ends and can be resumed")
    llm_replay_strict: bool = Field(False, description="a replay whose prompts differ from the recorded ones is an "
                                                       "error, not a warning")


class SearchConfig(LLMFields):
    """Everything that a search depends on."""

    env: str = Field("lacer/MixedTraffic-v0", description="registered environment id, or module:id")
    env_kwargs: dict[str, Any] = Field({}, description="constructor arguments of the environment")
    eval_env_kwargs: dict[str, Any] = Field({}, description="arguments that differ in evaluation, e.g. other wordings")
    designer: str = Field("auto", description="who proposes encoders; see `lacer designers`. auto: lacer if an LLM is "
                                              "given, else ranker")
    designer_kwargs: dict[str, Any] = Field({}, description="options of the designer, e.g. {'population': 12} for "
                                                            "evolution or {'bilevel': true} for darts")
    designer_steps: int | None = Field(None, ge=1, description="environment steps that a designer may train by itself "
                                                               "(darts, enas, pepnas); default: half of what all "
                                                               "candidates are trained for")
    candidates: int = Field(20, ge=1, description="encoders to evaluate, the expert's included")
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="seed of the designer and of all training runs")
    workers: int = Field(0, ge=0, description="candidates evaluated at once; 0: one per CPU core")
    protocol: Protocol = Field(Protocol(), description="how a candidate is trained and evaluated")
    fidelity: Fidelity = Field(Fidelity(), description="what is spent on which candidate; by default the same on all")
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
    expert_first: bool = Field(True, description="the expert's encoder is the first candidate, whoever the designer "
                                                 "is; else it is only trained with the winner, for comparison")
    text_model: str = Field("all-MiniLM-L6-v2", description="frozen text model: name, local folder, or hash (none)")
    batch: int = Field(1, ge=1, description="encoders that an LLM designer asks for at once")
    wandb: Literal["auto", "online", "offline", "off"] = Field(
        "auto", description="Weights & Biases; auto: online if logged in, else offline")
    wandb_project: str = Field("lacer", description="Weights & Biases project")
    wandb_runs: Literal["search", "candidate"] = Field(
        "search", description="one W&B run for the search, or one for each candidate too, whose configuration holds "
                              "its decisions")
    wandb_group: str | None = Field(None, description="W&B group, e.g. the comparison that the search belongs to; "
                                                      "default: the run folder's name")
    video: bool = Field(True, description="record an episode of the winner in best/, where the environment can be "
                                          "rendered")


COMMON = {"env", "env_kwargs", "eval_env_kwargs", "seed", "workers", "protocol", "timeout", "memory", "executor",
          "ray_address", "cpus_per_candidate", "gpus_per_candidate", "storage", "study_name", "space", "text_model"}
"""Fields of a search's configuration that a table has too."""


class TableConfig(SearchConfig):
    """What a table depends on: the fields of a search in ``COMMON``, and these."""

    encoders: int = Field(0, ge=0, description="encoders to measure, drawn with the seed; 0: the whole space")
    seeds: int = Field(3, ge=1, description="training seeds per encoder")


class BenchConfig(LLMFields):
    """What `lacer bench` runs."""

    table: str | None = Field(None, description="CSV (also .gz) or Parquet file of measured architectures")
    arch: str = Field("arch", description="column of the architecture, one decision per character; ncode for a table "
                                          "of `lacer bench make`; or several columns, A,B,C")
    score: str = Field("score", description="column that guides the search")
    test_score: str | None = Field(None, description="column that is reported; default: the guiding one")
    where: dict[str, str] = Field({}, description='keep rows with these values, e.g. {"env": "cc_cartpole"}')
    minimize: bool = Field(False, description="lower scores are better")
    repeated: bool = Field(False, description="rows of one architecture are repeated measurements: a run draws one for "
                                              "each architecture, their mean is reported")
    variable_length: bool = Field(False, description="architectures may differ in length")
    bins: int | None = Field(None, ge=2, description="cut numbers in the columns of --arch into so many bins")
    rank: bool = Field(False, description="replace scores by their rank, 0 to 1, where they differ by orders of "
                                          "magnitude")
    function: str | None = Field(None, description="instead of a table: module:name of a function that takes a point "
                                                   "(a dict) and returns its score")
    space: str | None = Field(None, description="with --function: module:name of its SearchSpace")
    designers: str = Field("random,evolution,bo", description="designers to compare, A,B,C; see `lacer designers`")
    budget: int = Field(100, ge=1, description="evaluations of a run")
    seeds: int = Field(20, ge=1, description="runs per designer")
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="seed of the first run; the others follow")
    checkpoints: str = Field("", description="evaluations at which designers are compared, e.g. 24,48,100; default: a "
                                             "quarter, a half and all of the budget")
    prune_seeds: bool = Field(False, description="every seed searches another random subspace of the table; scores are "
                                                 "then normalised to it, 0 its mean and 1 its best")
    workers: int = Field(0, ge=0, description="runs at once; 0: one per CPU core")


Config = TypeVar("Config", bound=BaseModel)

NESTED = ("protocol", "ppo", "fidelity", "limits", "base")
"""Fields of configurations that are models of their own."""

RESUMABLE = {"candidates", "workers", "timeout", "memory", "max_env_steps", "max_seconds", "max_tokens", "executor",
             "ray_address", "cpus_per_candidate", "gpus_per_candidate", "storage", "ahead", "batch", "wandb",
             "wandb_project", "wandb_runs", "wandb_group", "video", "seeds", *LLMFields.model_fields}
"""Fields that may be changed when a search is resumed; results before and after stay comparable."""


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data of a configuration with some of its fields changed; nested ones field by field."""
    out = dict(base)
    for k, v in over.items():
        out[k] = merge(out[k], v) if k in NESTED and isinstance(out.get(k), dict) and isinstance(v, dict) else v
    return out


def validate(data: dict[str, Any], where: str) -> SearchConfig:
    """Checks plain data as the configuration of a search; see :func:`validate_as`."""
    return validate_as(SearchConfig, data, where)


def validate_as(model: type[Config], data: dict[str, Any], where: str) -> Config:
    """Checks plain data as some configuration.

    Raises:
        LacerError: names ``where`` (a file; ``--`` for options), the key, what is wrong, and for unknown keys the
            nearest right one.
    """
    try:
        return model.model_validate(data)
    except ValidationError as e:
        raise LacerError("\n".join(_explain(model, err, where) for err in e.errors()[:5])) from None


def resumed(model: type[Config], folder: Path, changes: dict[str, Any]) -> Config:
    """Configuration of a run folder with some fields changed.

    Raises:
        LacerError: no run there, a damaged one or one of another kind, or a change that would make the trials
            incomparable.
    """
    if not (folder / "config.yaml").is_file():
        raise LacerError(f"{folder} is no run: it has no {'config.yaml' if folder.is_dir() else 'such folder'}")
    old = read_config(folder / "config.yaml")
    table = bool(set(old) & (TableConfig.model_fields.keys() - SearchConfig.model_fields.keys()))
    if table != issubclass(model, TableConfig):
        kind, command = ("table", "lacer bench make --resume") if table else ("search", "lacer search --resume")
        raise LacerError(f"{folder} is the run of a {kind}; go on with it by `{command} {folder}`")
    fixed = {"workers"} if old.get("deterministic") else set()
    for key, value in changes.items():
        if key not in RESUMABLE - fixed and key in old and old[key] != value:
            free = ", ".join(sorted(RESUMABLE - fixed))
            raise LacerError(f"{key} cannot change when a search is resumed ({old[key]!r} -> {value!r}); trials would "
                             f"not be comparable. These can: {free}.")
    return validate_as(model, {**old, **changes}, str(folder / "config.yaml"))


def _explain(model: type[BaseModel], err: Any, where: str) -> str:
    key, said = ".".join(map(str, err["loc"])), err["msg"].removeprefix("Value error, ")
    if where == "--":  # the command line
        return f"--{key.replace('_', '-')}: {said} (got {str(err['input'])[:60]!r})"
    if err["type"] != "extra_forbidden":
        return f"{where}: {key}: {said} (got {str(err['input'])[:60]!r})"
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


def own_steps(config: SearchConfig) -> int:
    """Environment steps that a designer may train by itself."""
    return config.designer_steps or max(1, config.candidates * config.protocol.steps // 2)


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
