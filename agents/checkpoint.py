"""A trained agent as a folder: ``policy.safetensors``, ``encoder.json``, ``agent.json``. No pickle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lacer.agents.evaluation import Evaluation, RunRequest
from lacer.agents.policy import CompositePolicy, policy_kwargs
from lacer.agents.vec import encode_batch, encoder_space
from lacer.encoders import EncoderSpec, TextTable
from lacer.envs import LacerError, TaskCard, task_card

FORMAT = 1


def _layout(card: TaskCard) -> dict[str, Any]:
    """What a saved policy needs the environment to agree with."""
    return {"sources": {n: [s.modality, list(s.shape)] for n, s in card.sources.items()},
            "action_space": str(card.action_space)}


def save_agent(folder: str | Path, policy: Any, spec: EncoderSpec, card: TaskCard, table: TextTable,
               request: RunRequest, evaluation: Evaluation) -> None:
    """Writes a trained policy with everything needed to load and judge it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.contiguous().cpu() for k, v in policy.state_dict().items()}
    # SB3 lists a shared extractor under three names; each tensor is stored once.
    state = {k: v for k, v in state.items() if not k.startswith(("pi_features_extractor.", "vf_features_extractor."))}
    save_file(state, folder / "policy.safetensors")
    (folder / "encoder.json").write_text(spec.to_json() + "\n", encoding="utf-8")
    shutil.copymode(folder / "encoder.json", folder / "policy.safetensors")  # safetensors keeps it from others
    about = {
        "format": FORMAT, "layout": _layout(card),
        "request": request.model_dump(mode="json", exclude={
            "save_to", "checkpoint", "pauses", "until", "pause_episodes", "keep_checkpoint", "warm_start"}),
        "strings": table.strings, "evaluation": evaluation.model_dump(mode="json"),
    }
    (folder / "agent.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _versions(evaluation: Evaluation) -> str:
    """What to say where a saved agent is not understood: the versions that differ."""
    from lacer.agents.ppo import versions

    names = ("lacer", "torch", "stable-baselines3", "gymnasium")
    here = versions()
    other = [f"{n} {evaluation.versions[n]} (here {here[n]})" for n in names
             if n in evaluation.versions and evaluation.versions[n] != here[n]]
    return f". It was saved with {', '.join(other)}" if other else ""


class Agent:
    """A trained agent. :attr:`policy` is an ordinary Stable-Baselines3 policy on the encoder's observation space.

    Attributes:
        policy: SB3 policy; its observations are those of :func:`lacer.agents.vec.encoder_space`.
        spec, card, table: encoder, task, and the embedded strings.
        request: the run that made it.
        evaluation: what that run measured.
    """

    def __init__(self, policy: CompositePolicy, spec: EncoderSpec, card: TaskCard, table: TextTable,
                 request: RunRequest, evaluation: Evaluation) -> None:
        self.policy, self.spec, self.card, self.table = policy, spec, card, table
        self.request, self.evaluation = request, evaluation

    def predict(self, observation: Mapping[str, Any], deterministic: bool = True) -> np.ndarray:
        """Action for one observation as the environment gives it (strings and all)."""
        batch = encode_batch({k: np.asarray(v)[None] if not isinstance(v, str) else [v]
                              for k, v in observation.items()}, self.card, self.table)
        action, _ = self.policy.predict(batch, deterministic=deterministic)
        return action[0]


def load(folder: str | Path, env_kwargs: Mapping[str, Any] | None = None, text_model: str | None = None) -> Agent:
    """Loads an agent that a search or ``lacer train`` saved. The folder is all that it needs, wherever it lies.

    Args:
        folder: e.g. ``runs/.../best``.
        env_kwargs: environment arguments, if they should differ from those of the training.
        text_model: name or folder of the same text model, where it lies elsewhere than in the training.

    Raises:
        LacerError: no agent there, another format, damaged weights, an encoder or weights that this version does not
            know, an environment with other sources or actions, or no text model.
    """
    folder = Path(folder)
    try:
        about = json.loads((folder / "agent.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = " It is a run; its agent is in best/." if (folder / "best").is_dir() else ""
        raise LacerError(f"{folder} is no agent: it has no agent.json.{hint}") from None
    except (OSError, ValueError, RecursionError) as e:
        raise LacerError(f"cannot read {folder / 'agent.json'}: {e}") from None
    try:
        if about["format"] != FORMAT:
            raise LacerError(f"{folder} has the format {about['format']}, this version reads {FORMAT}")
        request = RunRequest.model_validate(about["request"])
        evaluation = Evaluation.model_validate(about["evaluation"])
        strings, layout = [str(s) for s in about["strings"]], about["layout"]
    except (KeyError, TypeError, ValidationError) as e:
        raise LacerError(f"{folder / 'agent.json'} is not complete: {str(e)[:300]}") from None
    card = task_card(request.env, **{**request.env_kwargs, **(env_kwargs or {})})
    if _layout(card) != layout:
        raise LacerError(f"{folder} was trained for {request.env} with {json.dumps(layout)}, but the environment now "
                         f"has {json.dumps(_layout(card))}")
    try:
        spec = EncoderSpec.load(folder / "encoder.json", card)
    except LacerError as e:
        raise LacerError(f"{e}{_versions(evaluation)}") from None
    if text_model is not None:
        request = request.model_copy(update={"text_model": text_model})
    table = TextTable(request.text_model, strings)
    ppo = request.protocol.ppo
    policy = CompositePolicy(encoder_space(card), card.action_space, lambda _: 0.0, use_sde=ppo.use_sde,
                             **policy_kwargs(spec, card, table, ppo.head, ppo.log_std_init))
    try:
        state = load_file(folder / "policy.safetensors")
    except (OSError, SafetensorError) as e:
        raise LacerError(f"cannot read {folder / 'policy.safetensors'}: {e}") from None
    extractor = {k: v for k, v in state.items() if k.startswith("features_extractor.")}
    shared = {f"{side}_{k}": v for side in ("pi", "vf") for k, v in extractor.items()}
    try:
        policy.load_state_dict({**state, **shared})
    except RuntimeError as e:
        raise LacerError(f"{folder}: the weights do not fit the encoder: {str(e)[:300].strip(' .')}"
                         f"{_versions(evaluation)}") from None
    policy.set_training_mode(False)
    policy.features_extractor.encoder.bf16 = "bf16" in ppo.shortcuts  # type: ignore[union-attr]
    return Agent(policy, spec, card, table, request, evaluation)
