"""A training that is killed and goes on from its checkpoint is, bit by bit, the one that was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lacer.agents import Evaluation, PPOConfig, Protocol, RunRequest, ppo, run
from lacer.agents.parts import read_state

KNOWN = RunRequest(
    env="lacer/KnownSources-v0", env_kwargs={"sources": ["position", "words"], "horizon": 10}, seed=4,
    text_model="hash",
    encoder={"sources": {"position": {"block": "mlp"}, "words": {"block": "sentence_mlp"}},
             "fusion": {"block": "concat", "modality_dropout": 0.1}},
    protocol=Protocol(steps=200, eval_episodes=3, checkpoint_every=60, ppo=PPOConfig(
        n_envs=2, n_steps=16, batch_size=16, n_epochs=2, use_sde=True, sde_sample_freq=4, head=(8,))))
TRAFFIC = KNOWN.model_copy(update={
    "env": "lacer/MixedTraffic-v0", "env_kwargs": {"scene": "small"},
    "encoder": {"sources": {"instruction": {"block": "sentence_mlp"}}, "fusion": {"block": "concat"}},
    "protocol": KNOWN.protocol.model_copy(update={"steps": 96, "eval_episodes": 2, "checkpoint_every": 32})})
PIECES = KNOWN.model_copy(update={"protocol": KNOWN.protocol.model_copy(update={"ppo": KNOWN.protocol.ppo.model_copy(
    update={"shortcuts": ("microbatches",), "microbatch_size": 5})})})


class Killed(BaseException):
    """Nothing handles it, as SIGKILL."""


def numbers(e: Evaluation) -> dict[str, Any]:
    return e.model_dump(exclude={"cost": {"train_seconds", "eval_seconds", "probe_seconds", "total_seconds",
                                          "steps_per_second"}})


def interrupted(request: RunRequest, at: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> RunRequest:
    """Runs it until it has taken ``at`` steps; what is left is its checkpoint, as after a kill."""
    request = request.model_copy(update={"checkpoint": str(folder / "c" / "0.safetensors"),
                                         "save_to": str(folder / "resumed")})

    def kill(progress: dict[str, Any]) -> None:
        if progress["steps"] >= at:
            raise Killed

    with monkeypatch.context() as m:
        m.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process tidies up nothing
        with pytest.raises(Killed):
            run(request, kill, start_method="fork")
    return request


@pytest.mark.parametrize(("request_", "at"), [
    (KNOWN, 32), (KNOWN, 96), (KNOWN, 224), (PIECES, 96),
    pytest.param(TRAFFIC, 64, marks=pytest.mark.slow)])
def test_interrupted_and_resumed_is_uninterrupted(request_: RunRequest, at: int, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = run(request_.model_copy(update={"save_to": str(tmp_path / "quiet")}), start_method="fork")
    assert quiet.ok, quiet.reason
    request = interrupted(request_, at, tmp_path, monkeypatch)
    taken: list[int] = []
    resumed = run(request, lambda p: taken.append(p["steps"]), start_method="fork")
    assert numbers(resumed) == numbers(quiet)
    rollout = request.protocol.ppo.n_envs * request.protocol.ppo.n_steps
    part = -(-request.protocol.checkpoint_every // rollout) * rollout
    assert taken[0] == (at - rollout) // part * part + rollout, "it went on from the last checkpoint"
    a, b = (load_file(tmp_path / f / "policy.safetensors") for f in ("quiet", "resumed"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    agents = [json.loads((tmp_path / f / "agent.json").read_text()) for f in ("quiet", "resumed")]
    assert agents[0]["strings"] == agents[1]["strings"]
    assert not Path(str(request.checkpoint)).exists(), "it is gone when the run has ended"


def test_checkpoints_are_off_by_default_and_then_change_nothing(tmp_path: Path) -> None:
    plain = KNOWN.model_copy(update={"protocol": KNOWN.protocol.model_copy(update={"checkpoint_every": 0})})
    path = tmp_path / "c.safetensors"
    assert Protocol().checkpoint_every == 0
    assert numbers(run(plain)) == numbers(run(plain.model_copy(update={"checkpoint": str(path)})))
    assert not path.exists()


@pytest.mark.parametrize("damage", ["cut", "another seed", "another encoder"])
def test_a_checkpoint_that_is_damaged_or_of_another_training_is_not_used(
        damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = interrupted(KNOWN, 96, tmp_path, monkeypatch)
    path = Path(str(request.checkpoint))
    assert read_state(path, json.loads(request.model_dump_json(
        exclude={"checkpoint", "save_to", "until", "keep_checkpoint"}))) is not None
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "another seed":
        request = request.model_copy(update={"seed": 5})
    else:
        request = request.model_copy(update={"encoder": {**KNOWN.encoder, "fusion": {"block": "gated_sum"}}})  # type: ignore[dict-item]
    taken: list[int] = []
    assert run(request, lambda p: taken.append(p["steps"])).ok
    assert taken[0] == 32, "it began anew"


def test_killed_after_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left to train: evaluation and probes follow, the gradient's shares of the last update among them."""
    request = KNOWN.model_copy(update={"protocol": KNOWN.protocol.model_copy(update={"probes": None})})
    quiet = run(request)
    request = request.model_copy(update={"checkpoint": str(tmp_path / "0.safetensors")})

    def kill(*args: Any) -> Any:
        raise Killed

    with monkeypatch.context() as m:
        m.setattr(Path, "unlink", lambda *_, **__: None)
        m.setattr(ppo, "evaluate", kill)
        with pytest.raises(Killed):
            run(request)
    taken: list[int] = []
    resumed = run(request, lambda p: taken.append(p["steps"]))
    assert not taken
    assert numbers(resumed) == numbers(quiet)
    assert "gradient_share" in resumed.probes["fused"]
