"""Trainings in parts, each ended with a checkpoint, so that one that was killed goes on from the last part.

A part begins with new episodes and with random numbers that depend on the seed and on the number of the part alone, in
a training that is interrupted as in one that is not, so both find the same, bit by bit. The state of a simulation need
not be saved for that, nor can it be: saved states of SUMO do not reproduce.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from lacer.agents.evaluation import RunRequest, WarmStart
from lacer.encoders import TextTable

POLICY = "policy"
"""Prefix of the policy's tensors in a checkpoint of a candidate."""


def part_seed(seed: int, *key: int) -> int:
    """A seed that depends on that of the training and on some numbers."""
    return int(np.random.SeedSequence([seed, *key]).generate_state(1)[0] >> 1)


def learn_part(model: PPO, steps: int, callback: Any, seed: int) -> None:
    """``model.learn``, begun with new episodes and the seed's random numbers."""
    model.set_random_seed(seed)
    model._last_obs = None  # SB3 then resets the environment
    model.learn(steps, callback, reset_num_timesteps=False)


class Kept(BaseCallback):
    """A callback whose state the checkpoints hold."""

    def data(self) -> dict[str, Any]:
        """Plain data that has to be kept."""
        return {}

    def load(self, data: Mapping[str, Any]) -> None:
        """Takes what :meth:`data` gave."""

    def _on_step(self) -> bool:
        return True


def learn(model: PPO, request: RunRequest, table: TextTable, callbacks: list[Kept]) -> None:
    """Trains a candidate for the steps of its protocol, or until the request's pause; in parts if it asks for
    checkpoints or pauses, going on from ``request.checkpoint`` if that is of this very training."""
    for callback in callbacks:
        callback.model = model  # they are asked for more even if a checkpoint holds all of the training
    protocol = request.protocol
    rollout = protocol.ppo.n_envs * protocol.ppo.n_steps
    job = json.loads(request.model_dump_json(exclude={"checkpoint", "save_to", "until", "keep_checkpoint"}))
    path = None if request.checkpoint is None else Path(request.checkpoint)

    def write(rollouts: int) -> None:
        if path is not None:
            write_state(path, job, {**pack(POLICY, model.policy.state_dict()),
                                    **pack("optimizer", optimizer_tensors(model.policy.optimizer))},
                        {"rollouts": rollouts, "timesteps": model.num_timesteps, "updates": model._n_updates,
                         "strings": table.strings, "callbacks": [c.data() for c in callbacks]})

    total = -(-protocol.steps // rollout)
    if not request.in_parts:
        model.learn(protocol.steps, list(callbacks))
        if request.keep_checkpoint:
            write(total)
        return
    each = -(-protocol.checkpoint_every // rollout) or total
    ends = sorted({*range(each, total, each), *(min(-(-p // rollout), total) for p in request.pauses), total})
    last = total if request.until is None else min(-(-request.until // rollout), total)
    done = 0
    kept = None if path is None else read_state(path, job)
    if kept is not None:
        tensors, state = kept
        model.policy.load_state_dict(unpack(POLICY, tensors))
        load_optimizer(model.policy.optimizer, unpack("optimizer", tensors))
        done, model.num_timesteps, model._n_updates = (int(state[k]) for k in ("rollouts", "timesteps", "updates"))
        for string in state["strings"]:
            table.index(string)
        for callback, data in zip(callbacks, state["callbacks"], strict=True):
            callback.load(data)
    for end in ends:
        if done < end <= last:
            learn_part(model, (end - done) * rollout, list(callbacks), part_seed(request.seed, done))
            done = end
            write(done)


def take_weights(policy: Any, start: WarmStart) -> WarmStart | None:
    """Gives a policy's encoder blocks of another run where they fit. Returns what was taken; None if there is no
    such checkpoint, or nothing fits."""
    encoder = policy.features_extractor.encoder
    try:
        with safe_open(start.path, "pt") as f:
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError):
        return None
    taken = []
    for name in start.modules:
        prefix = f"{POLICY}/features_extractor.encoder.blocks.{name}."
        state = {k[len(prefix):]: v for k, v in tensors.items() if k.startswith(prefix)}
        own = encoder.blocks[name].state_dict()
        if state.keys() == own.keys() and all(state[k].shape == v.shape for k, v in own.items()):
            encoder.blocks[name].load_state_dict(state)
            taken.append(name)
    return start.model_copy(update={"modules": tuple(taken)}) if taken else None


def write_state(path: Path, job: Mapping[str, Any], tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Writes a checkpoint: tensors, the job that they are of, and plain data beside them. A file that is there is
    whole, whatever happens meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    save_file({k: v.detach().contiguous().cpu().clone() for k, v in tensors.items()}, new,
              {"lacer": json.dumps({"job": job, "state": dict(state)})})
    with new.open("rb") as f:
        os.fsync(f.fileno())
    os.replace(new, path)


def read_state(path: Path, job: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and data of a checkpoint; None if there is none of this job, or a damaged one: the training then begins
    anew."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as f:
            about = json.loads(f.metadata()["lacer"])
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a dict)
        return (tensors, dict(about["state"])) if about["job"] == job else None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None


def pack(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same under ``PREFIX/NAME``."""
    return {f"{prefix}/{k}": v for k, v in tensors.items()}


def unpack(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of :func:`pack`."""
    return {k[len(prefix) + 1:]: v for k, v in tensors.items() if k.startswith(f"{prefix}/")}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimiser by ``NUMBER OF PARAMETER/NAME``."""
    return {f"{i}/{k}": v for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Takes what :func:`optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        i, name = key.split("/")
        state.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
